"""Which maps are kept: those whose layer is missed less with them than without, with the best ridge."""

import math

import numpy as np
import pytest
import torch

from dynadepth.proving.prove import proved_stack
from dynadepth.shortcuts.fit import explained_variance
from dynadepth.shortcuts.maps import LinearShortcut, Shortcuts
from dynadepth.shortcuts.moments import Moments
from dynadepth.wrapping.skipping import skips_of
from dynadepth_search.progress import silent
from dynadepth_search.scoring.own_text import Text, score_texts
from dynadepth_search.shortcuts import choosing
from dynadepth_search.shortcuts.card import shortcuts_card
from dynadepth_search.shortcuts.choosing import choose_maps, single_skips
from dynadepth_search.shortcuts.moment_files import MomentFiles
from tests.tiny import VOCAB_SIZE, tiny_model
from tests.tiny_shortcuts import random_shortcuts

RIDGES = (1e-4, 1e-1, 1e3)


def random_texts(count, *, seed):
    rng = np.random.default_rng(seed)
    return [Text(rng.integers(2, VOCAB_SIZE, int(rng.integers(6, 14))), 3) for _ in range(count)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def stack(model):
    return proved_stack(model)


@pytest.fixture(scope="module")
def moments(stack, tmp_path_factory):
    files = MomentFiles(tmp_path_factory.mktemp("work"), stack, torch.device("cpu"), 8)
    return (
        files.collect("moments", random_texts(40, seed=0), silent),
        files.collect("held-out moments", random_texts(6, seed=1), silent),
    )


TEXTS = random_texts(6, seed=1)


def choose(model, stack, moments, *, ridges=RIDGES, rank=8, progress=silent):
    return choose_maps(model, stack, *moments, TEXTS, rank=rank, ridges=ridges, progress=progress)


def skipped_alone(model, stack, maps):
    """Divergence and agreement of the plans that skip one layer each."""
    shortcuts = Shortcuts(maps=maps, fingerprint={}, rank=8)
    found = score_texts(
        model, stack, TEXTS, single_skips(4), skips=skips_of(shortcuts, 4)
    ).by_text()
    return [each.mean(axis=1) for each in found]


def test_plans_that_skip_one_layer():
    assert single_skips(3).tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert single_skips(3).dtype == np.uint8


def test_what_is_measured_is_what_the_kept_maps_do(model, stack, moments):
    chosen = choose(model, stack, moments)
    maps = [each.shortcut for each in chosen]
    assert [each.measured["layer"] for each in chosen] == [0, 1, 2, 3]
    plain = score_texts(model, stack, TEXTS, single_skips(4)).by_text()
    divergence, agreement = skipped_alone(model, stack, maps)
    for layer, (shortcut, measured) in enumerate((each.shortcut, each.measured) for each in chosen):
        assert measured["divergence_without"] == pytest.approx(plain[0][layer].mean())
        assert measured["agreement_without"] == pytest.approx(plain[1][layer].mean())
        assert measured["mapped"] is (shortcut is not None)
        assert measured["mapped"] == (measured["divergence"] < measured["divergence_without"])
        if shortcut is not None:
            assert measured["divergence"] == pytest.approx(divergence[layer])
            assert measured["agreement"] == pytest.approx(agreement[layer])
            assert measured["explained_variance"] == pytest.approx(
                explained_variance(shortcut, moments[1][layer])
            )


def test_the_best_ridge_of_each_layer_is_taken(model, stack, moments):
    chosen = choose(model, stack, moments)
    alone = [choose(model, stack, moments, ridges=(ridge,)) for ridge in RIDGES]
    for layer, each in enumerate(chosen):
        best = [found[layer].measured["divergence"] for found in alone]
        assert each.measured["divergence"] == pytest.approx(min(best))
        assert each.measured["ridge"] == RIDGES[int(np.argmin(best))]
    # The first of equals.
    again = choose(model, stack, moments, ridges=(1e-4, 1e-4))
    assert {each.measured["ridge"] for each in again} == {1e-4}


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_a_layer_whose_map_is_worse_than_nothing_has_none(model, stack, moments, bad, monkeypatch):
    fit = choosing.fit_shortcut

    def spoiled(given, **how):
        found = fit(given, **how)
        if given is moments[0][bad]:
            return LinearShortcut(found.A, found.B, found.b - 1e3)
        return found

    good = [each.shortcut for each in choose(model, stack, moments)]
    assert good[bad] is not None
    monkeypatch.setattr(choosing, "fit_shortcut", spoiled)
    chosen = choose(model, stack, moments)
    assert chosen[bad].shortcut is None
    assert chosen[bad].measured["mapped"] is False
    assert chosen[bad].measured["divergence"] > chosen[bad].measured["divergence_without"]
    for layer in {0, 1, 2, 3} - {bad}:
        assert (chosen[layer].shortcut is None) == (good[layer] is None)


def test_a_map_that_does_what_nothing_does_is_left_out(model, stack, moments, monkeypatch):
    def nothing(_moments, **_):
        return LinearShortcut(None, None, torch.zeros(32, dtype=torch.float64))

    monkeypatch.setattr(choosing, "fit_shortcut", nothing)
    assert [each.shortcut for each in choose(model, stack, moments)] == [None] * 4


@pytest.mark.parametrize("worst", [1e150, 1e250])
def test_a_map_that_overflows_is_no_candidate(model, stack, moments, worst, monkeypatch):
    fit = choosing.fit_shortcut

    def overflowing(given, *, ridge, **how):
        found = fit(given, ridge=ridge, **how)
        if ridge == RIDGES[0]:
            return LinearShortcut(found.A * worst, found.B * 1e10, found.b)
        return found

    monkeypatch.setattr(choosing, "fit_shortcut", overflowing)
    chosen = choose(model, stack, moments)
    assert {each.measured["ridge"] for each in chosen} <= set(RIDGES[1:])
    assert all(math.isfinite(each.measured["divergence"]) for each in chosen)
    monkeypatch.setattr(
        choosing, "fit_shortcut", lambda given, **how: overflowing(given, **{**how, "ridge": 1e-4})
    )
    chosen = choose(model, stack, moments)
    assert [each.shortcut for each in chosen] == [None] * 4
    # What JSON can hold, and the card can show.
    assert [each.measured["divergence"] for each in chosen] == [None] * 4
    card = shortcuts_card(
        Shortcuts(
            maps=random_shortcuts(model).maps,
            fingerprint={},
            rank=8,
            layers=[each.measured for each in chosen],
        )
    )
    assert card.count("| no map |") == 4


def test_a_divergence_without_bound_is_shown_in_words(model):
    row = {
        "layer": 0, "mapped": True, "ridge": 1e-4, "explained_variance": 0.5, "divergence": 0.25,
        "agreement": 0.75, "divergence_without": None, "agreement_without": 0.0,
    }  # fmt: skip
    shortcuts = random_shortcuts(model)
    found = Shortcuts(maps=shortcuts.maps, fingerprint={}, rank=8, layers=[row])
    assert "| 0 | overflows | 0.250 | 0.0 | 75.0 | 0.50 |" in shortcuts_card(found)


def test_progress_counts_the_ridges(model, stack, moments):
    said = []
    choose(model, stack, moments, progress=lambda *what: said.append(what))
    assert said == [("choosing shortcuts", done, 4) for done in range(5)]


def test_the_model_is_left_alone(model, stack, moments):
    before = [(type(each), set(each.__dict__)) for each in model.modules()]
    chosen = choose(model, stack, moments)
    assert [(type(each), set(each.__dict__)) for each in model.modules()] == before
    assert all(
        not each.requires_grad
        for one in chosen
        if one.shortcut is not None
        for each in (one.shortcut.A, one.shortcut.B, one.shortcut.b)
    )


def test_moments_of_no_token_are_refused(model, stack, moments):
    nothing = {layer: Moments.zero(32) for layer in range(4)}
    with pytest.raises(ValueError, match="there are no tokens to fit shortcuts on"):
        choose(model, stack, (nothing, moments[1]))

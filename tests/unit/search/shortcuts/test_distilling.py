"""The second stage: it lowers the divergence, is kept only then, goes on after a kill, and leaves the model alone."""

import copy

import numpy as np
import pytest
import torch

from dynadepth.errors import LabelError
from dynadepth.proving.prove import proved_stack
from dynadepth.shortcuts.maps import LinearShortcut
from dynadepth_search.progress import silent
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.shortcuts import distilling
from dynadepth_search.shortcuts.distilling import distil, draw_plans
from tests.tiny import tiny_model


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", dtype=torch.float32)


def texts(count, seed):
    rng = np.random.default_rng(seed)
    return [Text(rng.integers(3, 90, size=int(rng.integers(9, 14))), 5) for _ in range(count)]


def bad_maps(model):
    """Maps of rank 2 that do harm, so that there is something to learn; one layer has none."""
    width, generator = model.config.hidden_size, torch.Generator().manual_seed(0)
    maps = [
        LinearShortcut(
            torch.randn(width, 2, generator=generator) * 0.3,
            torch.randn(2, width, generator=generator) * 0.3,
            torch.randn(width, generator=generator),
        )
        for _ in range(4)
    ]
    return [*maps[:2], None, maps[3]]


def run(model, file, *, steps=12, progress=silent, maps=None):
    return distil(
        model,
        proved_stack(model),
        bad_maps(model) if maps is None else maps,
        np.array([0.5, 0.2, 0.1, 0.3]),
        texts(8, seed=1),
        texts(6, seed=2),
        file,
        steps=steps,
        seed=0,
        progress=progress,
    )


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(distilling, "_EVERY", 4)
    monkeypatch.setattr(distilling, "_LEARNING_RATE", 0.05)
    monkeypatch.setattr(distilling, "_WRITE_SECONDS", 0.0)


@pytest.mark.usefixtures("quick")
def test_it_lowers_the_divergence_and_leaves_the_model_alone(model, tmp_path):
    keys = [set(module.__dict__) for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    given = bad_maps(model)
    found = run(model, tmp_path / "state.safetensors", steps=40, maps=given)
    assert found.notes["kept"]
    assert found.notes["change"] < -found.notes["standard_error"] < 0
    rows = found.notes["by_share_of_layers_skipped"]
    changes = [row["divergence_after"] - row["divergence_before"] for row in rows]
    assert np.mean(changes) == pytest.approx(found.notes["change"])
    assert found.maps[2] is None
    for old, new in zip(given, found.maps, strict=True):
        if old is not None:
            assert new.A.shape == old.A.shape
            assert not torch.equal(new.b, old.b)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert [set(module.__dict__) for module in model.modules()] == keys


@pytest.mark.usefixtures("quick")
def test_what_is_no_better_is_not_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(distilling, "_LEARNING_RATE", 0.0)
    given = bad_maps(model)
    found = run(model, tmp_path / "state.safetensors", maps=given)
    assert not found.notes["kept"]
    assert found.maps == given


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_killed_run_ends_alike(at, model, tmp_path):
    whole = run(model, tmp_path / "whole.safetensors")

    def kill(_stage, done, _total):
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        run(model, tmp_path / "killed.safetensors", progress=kill)
    assert all(weight.requires_grad for weight in model.parameters())
    found = run(model, tmp_path / "killed.safetensors")
    assert found.notes == whole.notes
    for one, other in zip(found.maps, whole.maps, strict=True):
        if one is not None:
            assert torch.equal(one.A, other.A)
            assert torch.equal(one.b, other.b)


@pytest.mark.usefixtures("quick")
def test_a_damaged_state_is_refused(model, tmp_path):
    file = tmp_path / "state.safetensors"
    run(model, file, steps=4)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(LabelError, match="is damaged"):
        run(model, file, steps=4)


def test_it_stops_when_nothing_is_gained_any_more():
    assert not distilling._stalled([3.0, 2.0, 2.5, 2.4])
    assert distilling._stalled([3.0, 2.0, 2.5, 2.4, 2.3])
    assert not distilling._stalled([3.0, 2.0, 2.5, 2.4, 1.9])


def test_plans_skip_what_is_missed_least_and_never_a_layer_without_a_map():
    harm = np.array([np.inf, 0.01, 5.0, 5.0, 5.0, 0.01, 5.0, 5.0])
    plans = draw_plans(harm, [0.25] * 400, np.random.default_rng(0))
    assert (plans.sum(axis=1) == 6).all()
    assert (plans[:, 0] == 1).all()
    assert (plans[:, [1, 5]] == 0).mean() > 0.9
    assert draw_plans(harm, [0.0, 1.0], np.random.default_rng(0)).sum(axis=1).tolist() == [7, 1]

"""Training: the loss by hand, and heads that learn what was planted and nothing else."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from dynadepth.errors import ConfigError, PlanError
from dynadepth.policies.router_heads import RouterConfig
from dynadepth.training.losses import effective_number_weights, focal_loss
from dynadepth.training.router_training import (
    centre_heads,
    logits_of,
    train_heads,
    train_skip_cost_heads,
)
from dynadepth.training.train_config import TrainConfig

LAYERS, WIDTH = 4, 24
CONFIG = RouterConfig(num_layers=LAYERS, hidden_size=WIDTH, num_windows=3, bottleneck=16)


def planted(num_prompts: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Features and labels: layer 0 reads the last token, layer 1 the windows, 2 and 3 nothing.

    Layer 0 skips where the last token's state leans to +u, and layer 1 where the windows lean to -u; each about one
    prompt in three. Layer 2 is labelled at random, layer 3 always executes. Dimensions differ much in offset and size.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_prompts, LAYERS, CONFIG.num_views, WIDTH, generator=generator)
    direction = torch.zeros(WIDTH)
    direction[:4] = 0.5
    labels = np.ones((num_prompts, LAYERS), dtype=np.uint8)
    labels[(features[:, 0, -1] @ direction > 0.45).numpy(), 0] = 0
    labels[(features[:, 1, :-1].mean(dim=1) @ direction < -0.25).numpy(), 1] = 0
    labels[(torch.rand(num_prompts, generator=generator) < 0.35).numpy(), 2] = 0
    size = torch.logspace(-2, 3, WIDTH)[
        torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    ]
    return features * size + 3.0 * size, labels


def accuracy(heads, features, labels):
    return (heads.all_logits(features).argmax(dim=-1).numpy() == labels).mean(axis=0)


@pytest.fixture(scope="module")
def data():
    return planted(1200)


@pytest.fixture(scope="module")
def trained(data):
    recipe = TrainConfig(
        centre=False, class_balance=0.0, focal_gamma=0.0, epochs=20, learning_rate=5e-3
    )
    return train_heads(data[0][:800], data[1][:800], CONFIG, recipe, seed=0)


def test_the_focal_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(2.0), 0.0], [0.0, 0.0, 0.0]])
    weights = torch.tensor([1.0, 3.0, 0.5])
    loss = focal_loss(logits, torch.tensor([1, 2]), gamma=2.0, weights=weights)
    expected = [3.0 * 0.5**2 * math.log(2.0), 0.5 * (2.0 / 3.0) ** 2 * math.log(3.0)]
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_without_gamma_the_focal_loss_is_the_weighted_cross_entropy():
    logits, actions = torch.randn(50, 3), torch.randint(0, 3, (50,))
    weights = torch.tensor([0.5, 1.0, 2.0])
    expected = functional.cross_entropy(logits, actions, weight=weights, reduction="none")
    torch.testing.assert_close(focal_loss(logits, actions, gamma=0.0, weights=weights), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_focal_loss_of_a_certain_decision_has_a_finite_gradient(gamma):
    logits = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([1]), gamma=gamma, weights=torch.ones(3)).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_effective_number_weights_by_hand():
    counts = torch.tensor([10, 1000, 0])
    weights = effective_number_weights(counts, 0.999)
    rare = (1 - 0.999) / (1 - 0.999**10)
    common = (1 - 0.999) / (1 - 0.999**1000)
    expected = torch.tensor([2 * rare / (rare + common), 2 * common / (rare + common), 0.0])
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(effective_number_weights(counts, 0.0), torch.tensor([1.0, 1.0, 0.0]))


def test_heads_learn_the_planted_rules_and_beat_the_majority(data, trained):
    features, labels = data[0][800:], data[1][800:]
    majority = np.maximum(labels.mean(axis=0), 1 - labels.mean(axis=0))
    right = accuracy(trained, features, labels)
    assert right[0] > majority[0] + 0.2
    assert right[1] > majority[1] + 0.2
    # Where labels are noise or constant, nothing better than the majority is claimed.
    assert abs(right[2] - majority[2]) < 0.05
    assert right[3] == 1.0


def test_a_layer_without_signal_keeps_a_constant_output(data, trained):
    spread = trained.all_logits(data[0][800:]).std(dim=0)
    assert spread[2].max() < 0.25 * spread[:2, :2].min()
    # Neither an action that no label has, nor a layer with one action only, may depend on the prompt.
    assert spread[:, 2].max() < 1e-5
    assert spread[3].max() < 1e-5


def test_scaling_is_folded_into_raw_features(data):
    """Features that were standardised by hand give the same decisions as raw ones."""
    features, labels = data[0][:200], data[1][:200]
    recipe = TrainConfig(epochs=3, held_out=0.0)
    raw = train_heads(features, labels, CONFIG, recipe, seed=0)
    flat = torch.cat([features[:, :, :-1].transpose(1, 2).reshape(-1, LAYERS, WIDTH)])
    mean, spread = flat.mean(dim=0)[:, None], flat.std(dim=0, correction=0)[:, None]
    by_hand = features.clone()
    by_hand[:, :, :-1] = (features[:, :, :-1] - mean) / spread
    last = features[:, :, -1:]
    by_hand[:, :, -1:] = (last - last.mean(dim=0)) / last.std(dim=0, correction=0)
    again = train_heads(by_hand, labels, CONFIG, recipe, seed=0)
    torch.testing.assert_close(
        raw.all_logits(features), again.all_logits(by_hand), rtol=1e-3, atol=1e-3
    )


def test_a_dimension_that_never_varies_is_not_read(data):
    features = data[0][:100].clone()
    features[..., 5] = 1000.0
    heads = train_heads(features, data[1][:100], CONFIG, TrainConfig(epochs=2), seed=0)
    assert heads.windows.first_weight[:, 5].eq(0).all()
    assert heads.last.first_weight[:, 5].eq(0).all()
    assert heads.windows.first_weight[:, 6].ne(0).any()


def test_centred_heads_say_nothing_on_average(data):
    features = data[0][:200]
    heads = train_heads(features, data[1][:200], CONFIG, TrainConfig(learning_rate=5e-3), seed=0)
    mean = heads.all_logits(features).mean(dim=0)
    torch.testing.assert_close(mean, torch.zeros(LAYERS, 3), rtol=0, atol=1e-4)
    assert heads.all_logits(features)[:, 0].std(dim=0).max() > 0.05
    shifted = centre_heads(heads, features[:50])
    mean = shifted.all_logits(features[:50]).mean(dim=0)
    torch.testing.assert_close(mean, torch.zeros(LAYERS, 3), rtol=0, atol=1e-4)


def test_the_same_seed_gives_the_same_heads_and_another_seed_others(data):
    def heads(seed):
        recipe = TrainConfig.for_preset("drllm")
        config = RouterConfig(num_layers=LAYERS, hidden_size=WIDTH, last_token=False, num_windows=3)
        return train_heads(data[0][:64], data[1][:64], config, recipe, seed=seed).state_dict()

    first, again, other = heads(1), heads(1), heads(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_layers_are_trained_as_if_alone(data):
    """Two layers with equal features and labels of another layer's do not touch each other."""
    features, labels = data[0][:96], data[1][:96].copy()
    recipe = TrainConfig(epochs=2, held_out=0.0, class_balance=0.0)
    before = train_heads(features, labels, CONFIG, recipe, seed=0)
    changed = features.clone()
    changed[:, 3] = torch.randn_like(changed[:, 3])
    after = train_heads(changed, labels, CONFIG, recipe, seed=0)
    torch.testing.assert_close(
        after.all_logits(features)[:, :3], before.all_logits(features)[:, :3], rtol=1e-4, atol=1e-4
    )


def test_the_papers_routers_do_not_read_the_last_token(data):
    config = RouterConfig(num_layers=LAYERS, hidden_size=WIDTH, last_token=False, num_windows=3)
    recipe = TrainConfig.for_preset("drllm")
    spoilt = data[0][:64].clone()
    spoilt[:, :, -1] = 1.0
    first = train_heads(data[0][:64], data[1][:64], config, recipe, seed=0)
    second = train_heads(spoilt, data[1][:64], config, recipe, seed=0)
    assert first.last is None
    assert torch.equal(first.windows.first_weight, second.windows.first_weight)


def test_training_works_on_features_made_in_inference_mode(data):
    with torch.inference_mode():
        features = data[0][:40] * 1.0
    with torch.no_grad():
        heads = train_heads(features, data[1][:40], CONFIG, TrainConfig(epochs=1), seed=0)
    assert not any(tensor.requires_grad for tensor in heads.state_dict().values())


def test_progress_counts_epochs(data):
    seen = []
    recipe = TrainConfig(epochs=3)
    train_heads(
        data[0][:20],
        data[1][:20],
        CONFIG,
        recipe,
        seed=0,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda f, a: (f[:, :2], a),
            ConfigError,
            r"expected torch.float32 of shape \(prompts, 4, 4 views",
        ),
        (lambda f, a: (f[:, :, :3], a), ConfigError, "4 views or more"),
        (lambda f, a: (f.double(), a), ConfigError, "features are torch.float64"),
        (lambda f, a: (f[:1], a[:1]), ConfigError, "1 prompts were given to train routers"),
        (
            lambda f, a: (torch.where(torch.arange(20)[:, None, None, None] == 7, torch.inf, f), a),
            ConfigError,
            "features of prompt 7 are not finite",
        ),
        (lambda f, a: (f, a[:19]), PlanError, "19 plans were given for 20 rows"),
        (lambda f, a: (f, a + 2), PlanError, "has action 3"),
    ],
)
def test_bad_arrays_are_refused(data, spoil, error, message):
    features, actions = spoil(data[0][:20], data[1][:20])
    with pytest.raises(error, match=message):
        train_heads(features, actions, CONFIG, TrainConfig(epochs=1), seed=0)


def by_heart(seed: int) -> tuple[torch.Tensor, np.ndarray, list[str]]:
    """Sixty prompts, each five times, whose labels and costs are chance: they can only be learnt by heart."""
    generator = torch.Generator().manual_seed(seed)
    rows = np.tile(np.arange(60), 5)
    features = torch.randn(60, LAYERS, CONFIG.num_views, WIDTH, generator=generator)[rows]
    labels = 1 + (torch.rand(60, LAYERS, generator=generator) < 0.5).numpy().astype(np.uint8)[rows]
    return features, labels, [f"prompt {row}" for row in rows]


@pytest.mark.parametrize("train", [train_heads, train_skip_cost_heads])
def test_copies_of_prompts_do_not_vouch_for_what_is_learnt_by_heart(train):
    features, labels, names = by_heart(0)
    recipe = TrainConfig(epochs=12, learning_rate=5e-3, warmup_steps=2)
    spreads = []
    for groups in (names, None):
        heads = train(features, labels, CONFIG, recipe, seed=0, groups=groups)
        spreads.append(float(logits_of(heads, features).std(dim=0).mean()))
    assert spreads[1] > 4 * spreads[0]


@pytest.mark.parametrize("train", [train_heads, train_skip_cost_heads])
def test_prompts_that_all_differ_train_as_without_names(data, train):
    recipe = TrainConfig(epochs=2)
    features, labels = data[0][:50], data[1][:50]
    names = [f"prompt {row}" for row in range(50)]
    first = train(features, labels, CONFIG, recipe, seed=0).state_dict()
    second = train(features, labels, CONFIG, recipe, seed=0, groups=names).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("train", [train_heads, train_skip_cost_heads])
@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            ["one text"] * 24,
            "1 prompts were given to train routers; expected 2 or more that differ",
        ),
        (["a", "b"], "groups has 2 entries for 24 prompts; expected one for each"),
    ],
)
def test_names_that_cannot_train_are_refused(data, train, groups, message):
    with pytest.raises(ConfigError, match=message):
        train(data[0][:24], data[1][:24], CONFIG, TrainConfig(), seed=0, groups=groups)


def planted_costs(num_prompts: int) -> tuple[torch.Tensor, np.ndarray]:
    """Features, and what skipping costs: layer 0 by the last token, 1 by the windows, 2 by chance, 3 always 0.25."""
    features, _ = planted(num_prompts, seed=5)
    standard = (features - features.mean(dim=0)) / features.std(dim=0)
    generator = torch.Generator().manual_seed(6)
    costs = torch.full((num_prompts, LAYERS), 0.25)
    costs[:, 0] = 0.5 + 0.1 * standard[:, 0, -1, :4].sum(dim=1)
    costs[:, 1] = 0.1 - 0.1 * standard[:, 1, :-1, :4].mean(dim=1).sum(dim=1)
    costs[:, 2] = 0.3 + 0.2 * torch.randn(num_prompts, generator=generator)
    return features, costs.numpy()


def correlation(predicted, wanted):
    return float(np.corrcoef(predicted, wanted)[0, 1])


class TestSkipCosts:
    RECIPE = TrainConfig(centre=False, epochs=20, learning_rate=5e-3)

    @pytest.fixture(scope="class")
    def data(self):
        return planted_costs(1200)

    @pytest.fixture(scope="class")
    def heads(self, data):
        return train_skip_cost_heads(data[0][:800], data[1][:800], CONFIG, self.RECIPE, seed=0)

    def test_skips_logit_is_minus_the_cost_in_spreads_of_all(self, data, heads):
        features, costs = data[0][800:], data[1][800:]
        skip = heads.all_logits(features)[..., 0].numpy()
        wanted = -costs / data[1][:800].std(ddof=1)
        assert correlation(skip[:, 0], wanted[:, 0]) > 0.8
        assert correlation(skip[:, 1], wanted[:, 1]) > 0.8
        # As large as the costs, and of its mean, so that layers can be compared with each other.
        np.testing.assert_allclose(skip.mean(axis=0), wanted.mean(axis=0), atol=0.25)
        assert np.square(skip - wanted)[:, :2].mean() < 0.5 * wanted[:, :2].var(axis=0).mean()

    def test_noise_teaches_nothing_and_what_never_varies_is_constant(self, data, heads):
        skip = heads.all_logits(data[0][800:])[..., 0]
        spread = skip.std(dim=0)
        assert spread[2] < 0.3 * spread[0]
        assert spread[3] == 0.0
        assert heads.varying_layers()[:2] == (0, 1)
        assert 3 not in heads.varying_layers()
        expected = -0.25 / data[1][:800].std(ddof=1)
        assert float(skip[0, 3]) == pytest.approx(expected, rel=1e-3)

    def test_execute_and_repeat_are_never_moved(self, data, heads):
        assert heads.all_logits(data[0][:50])[..., 1:].eq(0).all()

    def test_the_unit_of_skip_costs_does_not_matter(self, data, heads):
        again = train_skip_cost_heads(
            data[0][:800], 1000.0 * data[1][:800], CONFIG, self.RECIPE, seed=0
        )
        torch.testing.assert_close(
            again.all_logits(data[0][:50]), heads.all_logits(data[0][:50]), rtol=1e-3, atol=1e-3
        )

    def test_skips_that_cost_nothing_leave_constant_heads(self, data):
        heads = train_skip_cost_heads(
            data[0][:40], np.zeros((40, LAYERS)), CONFIG, self.RECIPE, seed=0
        )
        assert heads.varying_layers() == ()
        assert heads.constant_logits().eq(0).all()

    def test_the_same_seed_gives_the_same_heads_and_another_seed_others(self, data):
        def heads(seed):
            recipe = TrainConfig(epochs=2)
            return train_skip_cost_heads(data[0][:64], data[1][:64], CONFIG, recipe, seed=seed)

        first, again, other = (heads(seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (
                lambda d: d[:19],
                r"skip_costs has shape \(19, 4\) .* finite numbers of shape \(20, 4\)",
            ),
            (lambda d: d[:, :3], r"skip_costs has shape \(20, 3\)"),
            (lambda d: np.where(d == d[7, 2], np.nan, d), "numbers that are not finite"),
        ],
    )
    def test_bad_skip_costs_are_refused(self, data, spoil, message):
        with pytest.raises(ConfigError, match=message):
            train_skip_cost_heads(
                data[0][:20], spoil(data[1][:20]), CONFIG, TrainConfig(epochs=1), seed=0
            )

    def test_bad_features_are_refused(self, data):
        with pytest.raises(ConfigError, match=r"features are torch.float64"):
            train_skip_cost_heads(
                data[0][:20].double(), data[1][:20], CONFIG, TrainConfig(epochs=1), seed=0
            )

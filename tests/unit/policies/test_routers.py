"""Window pooling and the stacked heads."""

import pytest
import torch
from torch import nn

from dynadepth.errors import ConfigError
from dynadepth.policies.pooling import Pooling, last_token_state, window_means
from dynadepth.policies.router_heads import RouterConfig, RouterHeads, pool


def random_heads(config: RouterConfig, seed: int = 0) -> RouterHeads:
    generator = torch.Generator().manual_seed(seed)
    shapes = RouterHeads.expected_shapes(config)
    return RouterHeads.from_state_dict(
        config, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    )


@pytest.fixture
def config():
    return RouterConfig(num_layers=3, hidden_size=6, num_windows=4, bottleneck=5)


def test_windows_of_ten_tokens_by_hand():
    hidden = torch.arange(10.0).reshape(1, 10, 1)
    means = window_means(hidden, torch.ones(1, 10), 4)
    # Windows 0-1, 2-4, 5-6, 7-9.
    assert means[0, :, 0].tolist() == [0.5, 3.0, 5.5, 8.0]


def test_a_prompt_shorter_than_the_windows_repeats_tokens():
    hidden = torch.tensor([10.0, 20.0, 30.0]).reshape(1, 3, 1)
    means = window_means(hidden, torch.ones(1, 3), 8)
    assert means[0, :, 0].tolist() == [10.0, 10.0, 10.0, 20.0, 20.0, 20.0, 30.0, 30.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pooling_is_float32_whatever_the_model_is(dtype, config):
    hidden = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    pooled = pool(hidden, torch.ones(2, 7, dtype=torch.bool), config)
    assert pooled.dtype == torch.float32
    assert pooled.shape == (2, 5, 6)
    torch.testing.assert_close(pooled[:, 4], hidden[:, 6].float(), rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 23])
@pytest.mark.parametrize("last_token", [True, False])
def test_rows_without_padding_are_pooled_alike_by_spans(tokens, last_token):
    config = RouterConfig(num_layers=3, hidden_size=6, num_windows=4, last_token=last_token)
    hidden, mask = torch.randn(2, tokens, 6), torch.ones(2, tokens, dtype=torch.bool)
    pooling = Pooling.of(mask, 4, last_token=last_token).unpadded()
    assert len(pooling.spans) == config.num_views
    torch.testing.assert_close(pooling(hidden), pool(hidden, mask, config), rtol=1e-6, atol=1e-6)


def test_values_under_padding_never_matter(config):
    hidden = torch.randn(1, 6, 6)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0]])
    spoilt = hidden.clone()
    spoilt[:, [0, 3]] = torch.nan
    spoilt[:, 5] = torch.inf
    assert torch.equal(pool(spoilt, mask, config), pool(hidden, mask, config))
    assert torch.equal(last_token_state(spoilt, mask), hidden[:, 4])


def test_a_row_without_real_tokens_is_zeros(config):
    assert pool(torch.randn(1, 3, 6), torch.zeros(1, 3), config).eq(0).all()


def test_pooling_puts_windows_first_and_the_last_token_last(config):
    hidden, mask = torch.randn(2, 9, 6), torch.tensor([[1] * 9, [0, 0, 0, 1, 1, 1, 1, 0, 0]])
    pooled = pool(hidden, mask, config)
    torch.testing.assert_close(pooled[:, :4], window_means(hidden, mask, 4), rtol=0, atol=0)
    torch.testing.assert_close(pooled[:, 4], last_token_state(hidden, mask), rtol=0, atol=0)
    windows_only = RouterConfig(num_layers=3, hidden_size=6, num_windows=4, last_token=False)
    assert pool(hidden, mask, windows_only).shape == (2, 4, 6)


@pytest.mark.parametrize("last_token", [True, False])
def test_logits_are_those_of_plain_modules_averaged_over_windows(last_token):
    config = RouterConfig(
        num_layers=3, hidden_size=6, num_windows=4, bottleneck=5, last_token=last_token
    )
    heads = random_heads(config)
    pooled = torch.randn(2, config.num_views, 6)

    def module(part, layer_idx):
        built = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
        tensors = {name: getattr(part, name)[layer_idx] for name in part.tensors()}
        built[0].weight.data, built[0].bias.data = tensors["first_weight"].T, tensors["first_bias"]
        built[2].weight.data, built[2].bias.data = (
            tensors["second_weight"].T,
            tensors["second_bias"],
        )
        return built

    for layer_idx in range(3):
        with torch.no_grad():
            expected = module(heads.windows, layer_idx)(pooled[:, :4]).mean(dim=1)
            if last_token:
                expected = expected + module(heads.last, layer_idx)(pooled[:, 4])
        torch.testing.assert_close(heads.logits(layer_idx, pooled), expected, rtol=1e-5, atol=1e-5)


def test_all_layers_at_once_equal_one_by_one(config):
    heads = random_heads(config)
    features = torch.randn(4, 3, 5, 6)
    together = heads.all_logits(features)
    assert together.shape == (4, 3, 3)
    for layer_idx in range(3):
        torch.testing.assert_close(
            together[:, layer_idx],
            heads.logits(layer_idx, features[:, layer_idx]),
            rtol=1e-5,
            atol=1e-5,
        )


def test_cached_features_with_the_last_token_serve_routers_without_it():
    config = RouterConfig(num_layers=3, hidden_size=6, num_windows=4, last_token=False)
    features = torch.randn(4, 3, 5, 6)
    heads = random_heads(config)
    assert torch.equal(heads.all_logits(features), heads.all_logits(features[:, :, :4]))


def test_a_state_dict_makes_the_same_heads_again(config):
    heads = random_heads(config)
    again = RouterHeads.from_state_dict(config, heads.state_dict())
    features = torch.randn(2, 3, 5, 6)
    assert torch.equal(again.all_logits(features), heads.all_logits(features))
    assert {
        name: tuple(t.shape) for name, t in heads.state_dict().items()
    } == RouterHeads.expected_shapes(config)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: t.pop("last.first_bias"),
            "router tensor 'last.first_bias' is missing; expected exactly",
        ),
        (
            lambda t: t.update(extra=torch.zeros(1)),
            "router tensor 'extra' is unknown; expected exactly",
        ),
        (
            lambda t: t.update({"windows.first_bias": torch.zeros(3, 4)}),
            r"'windows.first_bias' is torch.float32 of shape \(3, 4\); expected torch.float32 of shape \(3, 5\)",
        ),
        (
            lambda t: t.update({"windows.first_bias": torch.zeros(3, 5).double()}),
            r"'windows.first_bias' is torch.float64 of shape \(3, 5\); expected torch.float32",
        ),
        (
            lambda t: t.update({"windows.second_bias": torch.full((3, 3), torch.nan)}),
            "'windows.second_bias' holds values that are not finite",
        ),
    ],
)
def test_bad_tensors_are_named(config, spoil, message):
    tensors = random_heads(config).state_dict()
    spoil(tensors)
    with pytest.raises(ConfigError, match=message):
        RouterHeads.from_state_dict(config, tensors)


def test_heads_carry_both_parts_or_only_windows(config):
    heads = random_heads(config)
    with pytest.raises(
        ConfigError, match="weights for the last token are missing; give both or neither"
    ):
        RouterHeads(config, heads.windows, None)

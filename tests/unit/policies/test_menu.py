"""Menus: what belongs together, which plans are open, and the way to a file and back."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from dynadepth.errors import ConfigError, PlanError
from dynadepth.policies.menu import Menu, MenuHead
from dynadepth.policies.pooling import last_token_state, window_means
from tests.tiny_menus import PLANS, random_head, random_menu

WIDTH = 48


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 9, WIDTH, generator=generator)
    mask = torch.ones(5, 9, dtype=torch.bool)
    mask[1, :4], mask[2, 6:], mask[3, 3] = False, False, False
    return hidden, mask


class TestHeads:
    @pytest.mark.parametrize("num_windows", [0, 3])
    def test_a_linear_head_by_hand(self, batch, num_windows):
        head = random_head(2, num_windows)
        assert (head.num_views, head.hidden_size) == (num_windows + 1, WIDTH)
        views = head.read(*batch)
        assert views.shape == (5, num_windows + 1, WIDTH)
        assert torch.equal(views[:, -1], last_token_state(*batch))
        if num_windows:
            assert torch.equal(views[:, :-1], window_means(*batch, num_windows))
        expected = sum(
            views[:, view] @ head.weight[:, WIDTH * view : WIDTH * (view + 1)].T
            for view in range(num_windows + 1)
        )
        torch.testing.assert_close(head.scores(views), expected + head.bias)

    def test_a_perceptron_by_hand(self, batch):
        head = random_head(2, 3, inner=7)
        assert (head.num_views, head.hidden_size) == (4, WIDTH)
        assert head.weight.shape == (len(PLANS), 7)
        inner = functional.gelu(
            head.read(*batch).flatten(1) @ head.inner_weight.T + head.inner_bias
        )
        torch.testing.assert_close(
            head.scores(head.read(*batch)), inner @ head.weight.T + head.bias
        )

    def test_half_precision_is_read_as_float32(self, batch):
        head, half = random_head(2, 3), batch[0].to(torch.bfloat16)
        views = head.read(half, batch[1])
        assert views.dtype == torch.float32
        torch.testing.assert_close(views, head.read(half.float(), batch[1]))

    def test_padding_is_not_read(self, batch):
        head, (hidden, mask) = random_head(2, 3), batch
        expected = head.scores(head.read(hidden, mask))
        spoilt = hidden.masked_fill(~mask.unsqueeze(2), torch.nan)
        assert torch.equal(head.scores(head.read(spoilt, mask)), expected)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layer_idx": -1}, "reads layer -1 with 0 windows; expected 0 or more of both"),
            ({"num_windows": -1}, "reads layer 2 with -1 windows"),
            ({"inner_bias": torch.zeros(3)}, "has one of inner_weight and inner_bias; give both"),
            ({"inner_weight": torch.zeros(3, 8)}, "has one of inner_weight and inner_bias"),
            (
                {"weight": torch.zeros(4, 8).double()},
                "'weight' is torch.float64; .* train the menu",
            ),
            ({"bias": torch.full((4,), torch.inf)}, "'bias' holds values that are not finite"),
            ({"weight": torch.full((4, 8), torch.nan)}, "'weight' .* not finite"),
            ({"num_windows": 2}, r"shapes .*'weight': \(4, 8\).* for 3 views"),
            ({"weight": torch.zeros(8)}, r"'weight': \(8,\).* do not belong together"),
            ({"bias": torch.zeros(3)}, r"'bias': \(3,\).* do not belong together"),
            (
                {"inner_weight": torch.zeros(3, 8), "inner_bias": torch.zeros(3)},
                "do not belong together",
            ),
            (
                {"inner_weight": torch.zeros(8, 6), "inner_bias": torch.zeros(7)},
                "do not belong together",
            ),
        ],
    )
    def test_what_does_not_belong_together_is_refused(self, changes, message):
        parts = {
            "layer_idx": 2,
            "num_windows": 0,
            "weight": torch.zeros(4, 8),
            "bias": torch.zeros(4),
        }
        assert MenuHead(**parts).hidden_size == 8
        with pytest.raises(ConfigError, match=message):
            MenuHead(**{**parts, **changes})

    def test_heads_are_immutable(self):
        with pytest.raises(AttributeError):
            random_head(2, 0).bias = torch.zeros(6)


class TestMenus:
    def test_what_it_says_of_itself(self):
        menu = random_menu(layers=(2, 4), windows=(3, 0)).menu
        assert (menu.num_layers, menu.hidden_size, menu.decision_layers) == (6, WIDTH, (2, 4))
        assert menu.plans.dtype == np.uint8
        np.testing.assert_allclose(menu.depths, PLANS.sum(axis=1) / 6)
        assert menu.edited_layers() == (2, 3, 4, 5)
        assert Menu(PLANS[:2], (random_head(0, 0, num_plans=2),)).edited_layers() == (4,)

    def test_open_plans_agree_with_all_that_is_decided(self):
        menu = random_menu(layers=(2, 4)).menu
        so_far = np.array(
            [[1, 1, 1, 1, 9, 9], [1, 1, 0, 1, 0, 0], [1, 1, 2, 0, 1, 1], [1, 1, 2, 1, 1, 1]]
        )
        expected = [
            [True, True, False, False, False, True],
            [False, False, True, True, False, False],
            [False, False, False, False, True, False],
            [False] * 6,
        ]
        assert menu.open_plans(1, so_far).tolist() == expected
        assert menu.open_plans(0, so_far).all()
        so_far[0, 0] = 0
        assert not menu.open_plans(0, so_far)[0].any()

    @pytest.mark.parametrize(
        ("plans", "layers", "error", "message"),
        [
            (PLANS[[0, 1, 1]], (2,), PlanError, "plan 111101 is on the menu twice"),
            (PLANS[:3], (3,), PlanError, "differ before layer 3, where the first head reads"),
            (PLANS[:3] * 0, (2,), PlanError, "skips all 6 layers"),
            ([[1, 3]], (0,), PlanError, "has action 3"),
            (PLANS[:3], (), ConfigError, r"read layers \[\]; expected one or more, ascending"),
            (PLANS[:3], (2, 2), ConfigError, r"read layers \[2, 2\]; expected .* ascending"),
            (PLANS[:3], (2, 1), ConfigError, r"read layers \[2, 1\]"),
            (PLANS[:3], (2, 6), ConfigError, r"read layers \[2, 6\]; expected .* below 6"),
        ],
    )
    def test_what_is_no_menu_is_refused(self, plans, layers, error, message):
        heads = tuple(random_head(layer, 0, num_plans=len(plans)) for layer in layers)
        with pytest.raises(error, match=message):
            Menu(plans, heads)

    @pytest.mark.parametrize(
        "wrong", [random_head(4, 0, num_plans=5), random_head(4, 0, hidden_size=24)]
    )
    def test_heads_of_another_menu_are_refused(self, wrong):
        with pytest.raises(ConfigError, match=r"head at layer 4 scores . plans from width .*; exp"):
            Menu(PLANS, (random_head(2, 0), wrong))


class TestStateDict:
    SHAPES = ((2, 3), (4, 0))

    @pytest.fixture
    def menu(self):
        return random_menu(layers=(2, 4), windows=(3, 0), inner=(0, 8)).menu

    def test_it_comes_back(self, menu, batch):
        tensors = menu.state_dict()
        assert sorted(tensors) == [
            "heads.0.bias",
            "heads.0.weight",
            "heads.1.bias",
            "heads.1.inner_bias",
            "heads.1.inner_weight",
            "heads.1.weight",
        ]
        again = Menu.from_state_dict(menu.plans, self.SHAPES, tensors)
        assert again.decision_layers == (2, 4)
        assert (again.plans == menu.plans).all()
        for one, other in zip(again.heads, menu.heads, strict=True):
            assert torch.equal(one.scores(one.read(*batch)), other.scores(other.read(*batch)))

    def test_what_is_read_has_no_gradients_and_leaves_the_tensors_given(self, menu):
        tensors = {name: t.clone().requires_grad_() for name, t in menu.state_dict().items()}
        again = Menu.from_state_dict(menu.plans, self.SHAPES, tensors)
        assert not any(tensor.requires_grad for tensor in again.state_dict().values())
        assert len(tensors) == 6

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("heads.0.bias"), r"'heads\.0\.bias' is missing; copy or save"),
            (lambda t: t.pop("heads.1.weight"), r"'heads\.1\.weight' is missing"),
            (lambda t: t.pop("heads.1.inner_bias"), "has one of inner_weight and inner_bias"),
            (
                lambda t: t.update({"heads.2.weight": torch.zeros(1)}),
                r"'heads\.2\.weight' is unknown; expected those of 2 heads only",
            ),
            (lambda t: t.update(extra=torch.zeros(1)), "'extra' is unknown"),
            (lambda t: t.update({"heads.0.bias": torch.zeros(5)}), "do not belong together"),
        ],
    )
    def test_tensors_that_do_not_fit_are_refused(self, menu, change, message):
        tensors = menu.state_dict()
        change(tensors)
        with pytest.raises(ConfigError, match=message):
            Menu.from_state_dict(menu.plans, self.SHAPES, tensors)

    def test_a_menu_that_edits_a_protected_layer_is_refused(self):
        with pytest.raises(ConfigError, match=r"plans of the menu edit layers \[2, 5\], which are"):
            random_menu(protect=(0, 2, 5))
        assert random_menu(protect=(1, 0, 1)).protect == (0, 1)
        with pytest.raises(ConfigError, match="protect names layer 6"):
            random_menu(protect=(6,))

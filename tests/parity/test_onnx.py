"""ONNX decides as torch does: logits within 1e-5, actions wherever the margin exceeds that."""

import numpy as np
import onnxruntime
import pytest
import torch

from dynadepth.onnx.router_graph import build_onnx
from dynadepth.onnx.router_policy import OnnxRouterPolicy
from dynadepth.policies.router_heads import pool
from dynadepth.policies.router_policy import RouterPolicy
from tests.tiny_routers import CALIBRATION, random_routers, seen

TOLERANCE = 1e-5
LAYERS = (0, 2, 5)
BUDGETS = (0.5, 0.59, 0.61, 0.8, 0.95, 1.0)


class Pair:
    """Routers and the session that runs their graph."""

    def __init__(self, **settings):
        self.routers = random_routers(num_layers=6, hidden_size=48, **settings)
        self.content = build_onnx(self.routers)
        self.session = onnxruntime.InferenceSession(
            self.content, providers=["CPUExecutionProvider"]
        )

    def run(self, hidden, mask, layer, budget):
        feed = {
            "hidden_states": hidden.numpy(),
            "attention_mask": mask.numpy(),
            "layer": np.asarray(layer, dtype=np.int64),
            "budget": np.asarray(budget, dtype=np.float32),
        }
        return self.session.run(["logits", "action"], feed)

    def expected(self, hidden, mask, layer, budget):
        """Logits by torch, written out as DESIGN has them."""
        routers = self.routers
        trained = routers.heads.logits(layer, pool(hidden, mask, routers.config))
        price = CALIBRATION.penalty_for(budget) * torch.tensor([0.0, 1.0, 2.0])
        return (routers.bias[layer] + routers.shrinkage * trained - price).numpy()


PAIRS = {
    "windows and last token": {},
    "windows only": {"last_token": False, "shrinkage": 1.0},
    "three windows": {"num_windows": 3, "shrinkage": 0.25},
    "static": {"shrinkage": 0.0},
}


@pytest.fixture(scope="module", params=PAIRS.values(), ids=PAIRS.keys())
def pair(request):
    return Pair(**request.param)


def prompts(rows, tokens, padding):
    """Random states and masks; what stands on padding is NaN, so that it is seen if it is read."""
    generator = torch.Generator().manual_seed(1000 * rows + tokens)
    hidden = 3.0 * torch.randn(rows, tokens, 48, generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    for row in range(rows):
        missing = 0 if padding == "none" else row % tokens
        if missing:
            where = slice(0, missing) if padding == "left" else slice(tokens - missing, tokens)
            mask[row, where] = 0
    return hidden.masked_fill(mask.unsqueeze(2) == 0, float("nan")), mask


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("tokens", [1, 3, 7, 40])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_logits_and_actions_are_those_of_torch(pair, rows, tokens, padding):
    hidden, mask = prompts(rows, tokens, padding)
    for layer in LAYERS:
        for budget in BUDGETS:
            logits, actions = pair.run(hidden, mask, layer, budget)
            expected = pair.expected(hidden, mask, layer, budget)
            assert np.abs(logits - expected).max() <= TOLERANCE
            ordered = np.sort(expected, axis=1)
            clear = ordered[:, -1] - ordered[:, -2] > TOLERANCE
            assert (actions[clear] == expected[clear].argmax(axis=1)).all()


def test_the_policies_of_both_runtimes_agree(pair):
    hidden, mask = prompts(17, 40, "left")
    routers = pair.routers
    given = set()
    for budget in BUDGETS:
        penalty = CALIBRATION.penalty_for(budget)
        by_torch = RouterPolicy(
            routers.heads, routers.bias, shrinkage=routers.shrinkage, penalty=penalty
        )
        by_onnx = OnnxRouterPolicy(pair.content, budget)
        assert by_onnx.decision_layers == by_torch.decision_layers
        assert (by_onnx.initial_plans(2) == by_torch.initial_plans(2)).all()
        for layer in range(6):
            actions = by_onnx.decide(layer, hidden, seen(mask))
            assert (actions == by_torch.decide(layer, hidden, seen(mask))).all()
            given |= set(actions.ravel().tolist())
    assert given == {0, 1, 2}


def test_a_row_does_not_depend_on_its_neighbours_or_its_padding(pair):
    hidden, mask = prompts(3, 7, "left")
    together, _ = pair.run(hidden, mask, 2, 0.8)
    for row in range(3):
        real = mask[row] == 1
        alone, _ = pair.run(hidden[row : row + 1, real], mask[row : row + 1, real], 2, 0.8)
        assert np.abs(alone[0] - together[row]).max() <= TOLERANCE


@pytest.mark.parametrize("budget", [0.4999, 1.0001, 0.0, -1.0, 3.0, float("nan"), float("inf")])
def test_a_budget_out_of_range_gives_nan_and_no_action(pair, budget):
    hidden, mask = prompts(3, 7, "left")
    logits, actions = pair.run(hidden, mask, 2, budget)
    assert np.isnan(logits).all()
    assert (actions == -1).all()


def test_a_row_of_padding_only_is_what_torch_makes_of_it(pair):
    hidden, mask = prompts(3, 7, "none")
    mask[1] = 0
    hidden[1] = float("nan")
    logits, _ = pair.run(hidden, mask, 2, 0.8)
    assert np.abs(logits - pair.expected(hidden, mask, 2, 0.8)).max() <= TOLERANCE


def test_equal_logits_go_to_the_lowest_action():
    pair = Pair(shrinkage=0.0, bias=torch.tensor([[1.0, 2.0, 3.0]]).repeat(6, 1))
    hidden, mask = prompts(3, 7, "none")
    # lambda is 1 at 0.7, so the priced logits are 1, 1, 1.
    logits, actions = pair.run(hidden, mask, 0, 0.7)
    assert (logits == 1.0).all()
    assert (actions == 0).all()


def test_protected_layers_are_executed_whatever_the_logits_say():
    free, held = Pair(), Pair(protect=(2,))
    hidden, mask = prompts(17, 7, "left")
    logits, actions = held.run(hidden, mask, 2, 0.5)
    assert (logits == free.run(hidden, mask, 2, 0.5)[0]).all()
    assert (free.run(hidden, mask, 2, 0.5)[1] != 1).any()
    assert (actions == 1).all()
    assert (held.run(hidden, mask, 5, 0.5)[1] == free.run(hidden, mask, 5, 0.5)[1]).all()

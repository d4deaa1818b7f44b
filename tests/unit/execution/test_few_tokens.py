"""Products with few tokens: the same numbers whichever product runs, and nothing left behind."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dynadepth.execution import few_tokens
from dynadepth.execution.few_tokens import few_token_products


class OtherLinear(nn.Linear):
    """A linear layer that may do more than multiply."""


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the transposed product be the faster one, and note the numbers of tokens that it is asked for."""
    asked: list[int] = []
    monkeypatch.setattr(few_tokens, "_transposed_is_faster", lambda *_: True)

    product = few_tokens._transposed

    def noted(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        asked.append(len(tokens))
        return product(tokens, weight)

    monkeypatch.setattr(few_tokens, "_transposed", noted)
    return asked


def run(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), few_token_products(module, states.shape[:-1].numel()):
        output: torch.Tensor = module(states)
    # Complex rotary embeddings ask for a last dimension of stride 1.
    assert output.is_contiguous()
    return output


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 8), (1, 5, 8), (3, 4, 8), (64, 8)])
def test_both_products_are_the_same_numbers(
    shape: tuple[int, ...], bias: bool, products: list[int]
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 6, bias=bias), nn.GELU(), nn.Linear(6, 8)).double()
    states = torch.randn(shape, dtype=torch.float64)
    expected = module(states)
    found = run(module, states)
    assert products == [states.shape[:-1].numel()] * 2
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 65])
def test_one_token_and_many_have_the_ordinary_product(tokens: int, products: list[int]) -> None:
    module = nn.Linear(8, 8)
    states = torch.randn(tokens, 8)
    assert torch.equal(run(module, states), module(states))
    assert not products


@pytest.mark.parametrize(
    "make",
    [
        lambda: OtherLinear(8, 8),
        lambda: nn.Linear(8, 8, device="meta"),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    ],
    ids=["subclass", "another device", "parametrised"],
)
def test_what_is_no_plain_linear_layer_is_left_alone(
    make: Callable[[], nn.Module], products: list[int]
) -> None:
    module = make()
    device = next(module.parameters()).device
    run(module, torch.randn(3, 8, device=device))
    assert not products


def test_a_forward_that_another_library_has_put_there_stays(products: list[int]) -> None:
    module = nn.Linear(8, 8)
    module.forward = lambda states: states + 1  # type: ignore[method-assign]
    states = torch.randn(3, 8)
    assert torch.equal(run(module, states), states + 1)
    assert "forward" in module.__dict__
    assert not products


def test_gradients_and_deterministic_algorithms_keep_the_ordinary_product(
    products: list[int],
) -> None:
    module, states = nn.Linear(8, 8), torch.randn(3, 8)
    with few_token_products(module, 3):
        module(states).sum().backward()
    assert module.weight.grad is not None
    torch.use_deterministic_algorithms(True)
    try:
        run(module, states)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not products


def test_nothing_is_left_behind_not_even_by_an_error() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(7, 8))
    before = [dict(each.__dict__) for each in module]
    with pytest.raises(RuntimeError):
        run(module, torch.randn(3, 8))
    assert [dict(each.__dict__) for each in module] == before


def test_no_module_and_other_threads_do_no_harm(products: list[int]) -> None:
    with torch.no_grad(), few_token_products(None, 3):
        pass
    module, states = nn.Linear(8, 8), torch.randn(3, 8)
    with torch.no_grad(), few_token_products(module, 3), few_token_products(module, 3):
        module(states)
    assert products == [3]
    assert "forward" not in module.__dict__


def test_the_choice_is_measured_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(few_tokens, "_measured", {})
    measured = []
    monkeypatch.setattr(few_tokens, "_measure", lambda *given: bool(measured.append(given[1])))
    module = nn.Linear(8, 8)
    for tokens in (2, 3, 4, 4, 5):
        run(module, torch.randn(tokens, 8))
    assert measured == [2, 4, 8]


def test_the_measurement_says_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each reading of the clock is later by what the next way is to take.
    for times, faster in (((3.0, 1.0), True), ((1.0, 1.0), False), ((1.0, 3.0), False)):
        ticks = iter([tick for _ in range(4) for each in times for tick in (0.0, each)])
        monkeypatch.setattr(few_tokens.time, "perf_counter", lambda ticks=ticks: next(ticks))
        assert few_tokens._measure(torch.zeros(4, 4), 2) is faster

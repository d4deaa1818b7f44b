"""Maps multiplied into the weights of a layer that stays: which weights take one, how it is fitted, what they become.

Knows modules and arrays; texts, plans to judge and what a fold does to a model are the caller's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynadepth.errors import ConfigError, PlanError, UnsupportedModelError
from dynadepth.models.structure import LayerStack, position_arguments
from dynadepth.plans import SKIP, plan_text
from dynadepth.shortcuts.fit import fit_shortcut
from dynadepth.shortcuts.maps import LinearShortcut
from dynadepth.shortcuts.moments import Moments

__all__ = ["OutputProjection", "SkippedRun", "find_projection", "fit_fold", "skipped_runs"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What rounding may do to what is linear otherwise, in units of the dtype's precision; a norm does a hundred times more.
_ROUNDING = 8
_TOKENS = 8
# Module outputs that the layer is given, in sizes of its state: large, so that rounding of their sum matters little.
_PROBES = (4.0, 16.0)


@dataclass(frozen=True, slots=True)
class SkippedRun:
    """Consecutive layers that a plan skips.

    Args:
        first: The first of them.
        last: The last of them.
        place: Where the last visit before them stands among the visits of the plan.
    """

    first: int
    last: int
    place: int

    @property
    def below(self) -> int:
        """The layer of that visit."""
        return self.first - 1


def skipped_runs(plan: Any) -> tuple[SkippedRun, ...]:
    """Return the runs of consecutive layers that a plan skips, from the first to the last.

    Args:
        plan: The plan, checked. Shape (num_layers,), uint8.

    Raises:
        PlanError: The plan skips no layer, or the first one.

    Example:
        >>> [(run.first, run.last, run.place) for run in skipped_runs([1, 0, 0, 2, 1, 0])]
        [(1, 2, 0), (5, 5, 3)]
    """
    actions = np.asarray(plan).tolist()
    if SKIP not in actions:
        raise PlanError(
            f"plan {plan_text(plan)} skips no layer, so there is nothing to fold; bake it"
        )
    if actions[0] == SKIP:
        raise PlanError(
            f"plan {plan_text(plan)} skips layer 0; what layers leave behind is folded into the layer that runs before "
            "them, and before layer 0 there is none: execute it"
        )
    runs: list[SkippedRun] = []
    place = -1
    for layer, action in enumerate(actions):
        place += action
        if action == SKIP:
            joined = bool(runs) and runs[-1].last == layer - 1
            first = runs.pop().first if joined else layer
            runs.append(SkippedRun(first, layer, place))
    return tuple(runs)


def fit_fold(moments: Moments, *, ridge: float, bias: bool) -> LinearShortcut:
    """Fit the map T = I + A of a module's output, so that states with the mapped output are those behind the run.

    Args:
        moments: Of what the module adds to the state, h, and of what the state lacks, u; see `Moments.add`.
        ridge: As for `fit_shortcut`; it draws T to the identity.
        bias: Whether the projection has a bias, which takes the map's; otherwise the fit goes through the origin.

    Returns:
        The map, in the dtype of the moments; its bias is 0 if there is no place for it.

    Raises:
        ConfigError: The ridge is out of range, or there are no tokens.

    Source:
        ReplaceMe, arXiv 2505.02819, section 3. Deviations: tokens are weighted; the ridge is relative and draws T to
        the identity instead of to 0; a bias is fitted where the projection has one.
    """
    if not bias:
        # Around the origin in place of the means.
        means = {name: torch.zeros_like(moments.mean_h) for name in ("mean_h", "mean_u")}
        moments = replace(moments, **means)
    return fit_shortcut(moments, rank="full", ridge=ridge, dtype=moments.hh.dtype)


class OutputProjection:
    """The matrix that ends a layer's feed-forward module, and takes maps of that module's output.

    Args:
        module: The feed-forward module.
        linear: Its last linear module.
        share: How much of the module's output the layer adds to its state: 1, or a family's own factor.
    """

    def __init__(self, module: nn.Module, linear: nn.Module, share: float = 1.0) -> None:
        self.module, self.share = module, share
        self._linear: Any = linear
        self._weight = cast("nn.Parameter", linear.weight)
        self._bias = cast("nn.Parameter | None", linear.bias)

    @property
    def has_bias(self) -> bool:
        """Whether it has a bias."""
        return self._bias is not None

    def fold(self, shortcut: LinearShortcut | None) -> None:
        """Give the projection its original weights times a map, so that what the module adds goes through that map.

        New parameters take the place of the old ones, whose values do not change.

        Args:
            shortcut: The map of what the module adds to the state; None: the original weights.

        Raises:
            ConfigError: The map has a bias, and the projection has none.
        """
        if shortcut is None:
            self._linear.weight, self._linear.bias = self._weight, self._bias
            return
        if self._bias is None and bool(shortcut.b.any()):
            raise ConfigError("a map with a bias was given to a projection that has none")
        exact = torch.float32 if self._weight.device.type == "mps" else torch.float64
        added = shortcut.b.to(self._weight.device, exact)
        turned = isinstance(self._linear, Conv1D)
        with torch.no_grad():
            weight = self._weight.detach().to(exact)
            mapped = shortcut(weight if turned else weight.T) - added
            self._linear.weight = _like(self._weight, mapped if turned else mapped.T)
            if self._bias is not None:
                bias = shortcut(self._bias.detach().to(exact)) - added + added / self.share
                self._linear.bias = _like(self._bias, bias)


def _like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    values = values.to(parameter.dtype).contiguous()
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def find_projection(
    stack: LayerStack, layer_idx: int, *, called: int | None = None
) -> OutputProjection:
    """Find the output projection of a layer's feed-forward module, and try on both that a map can be folded in.

    Tried is, on random states: weights times a map make the module's output times that map, and the layer adds that
    output to its state as it is, or times one factor.

    Args:
        stack: The layers of an unwrapped model in evaluation mode, with the traits of a proof; not changed.
        layer_idx: The layer.
        called: The number by which messages call it, which may be another in the model that it was baked from; None:
            `layer_idx`.

    Raises:
        UnsupportedModelError: There is no such projection, its weights are quantised or elsewhere, or the layer does
            something else with its output, such as a norm.
    """
    layer = stack.layers[layer_idx]
    name = None if stack.traits is None else stack.traits.feed_forward
    number = layer_idx if called is None else called

    def refuse(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"nothing can be folded into layer {number} of this {stack.model_type}: {reason}; `dynadepth bake` "
            "writes the plan without what its skipped layers leave behind"
        )

    if name is None:
        raise refuse("its layers have no feed-forward module that takes and returns states alone")
    module = layer.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, _TOKENS, stack.hidden_size, generator=generator, dtype=torch.float64)
    weight = next((each for each in layer.parameters() if _ordinary(each)), None)
    if weight is None or any(each.device.type == "meta" for each in layer.parameters()):
        raise refuse("its weights are quantised or not in memory")
    linears = [each for each in module.modules() if isinstance(each, (nn.Linear, Conv1D))]
    if not all(_ordinary(each.weight) for each in linears):
        raise refuse(f"the weights of its {name} are quantised")
    states = states.to(weight.device, weight.dtype)
    linear = _last_linear(module, linears, states)
    if linear is None:
        raise refuse(f"its {name} does not end in one projection to a state, as experts do not")
    if not _takes_maps(OutputProjection(module, linear), states, generator):
        raise refuse(
            f"its {name} does more with the output of its projection than to return it, as experts do"
        )
    share = _share(stack, layer, module, generator)
    if share is None:
        raise refuse(
            f"the layer does not add the output of its {name} as it is; a norm, or something else, is behind it"
        )
    return OutputProjection(module, linear, share)


def _ordinary(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in _DTYPES


def _last_linear(
    module: nn.Module, linears: Sequence[nn.Linear | Conv1D], states: Tensor
) -> nn.Module | None:
    """Return the linear module inside one that runs last, if it gives states; else None, as if it cannot be run."""
    projections = [
        each
        for each in linears
        if (each.nf if isinstance(each, Conv1D) else each.out_features) == states.shape[-1]
    ]
    if not projections:
        # Without running them: experts are large.
        return None
    order: list[nn.Module] = []
    handles = [
        each.register_forward_hook(lambda ran, _given, _output: order.append(ran))
        for each in linears
    ]
    try:
        with torch.no_grad():
            module(states)
    except (RuntimeError, ValueError, TypeError):
        return None
    finally:
        for handle in handles:
            handle.remove()
    return order[-1] if order and order[-1] in projections else None


def _takes_maps(projection: OutputProjection, states: Tensor, generator: torch.Generator) -> bool:
    """Say whether the module's output goes through the map that is folded into its projection."""
    width = states.shape[-1]
    first, second = torch.randn(2, width, width, generator=generator) / width**0.5
    bias = torch.randn(width, generator=generator) * float(projection.has_bias)
    shortcut = LinearShortcut(first, second, bias)
    with torch.no_grad():
        expected = shortcut(projection.module(states).cpu().double())
        projection.fold(shortcut)
        try:
            found = projection.module(states).cpu().double()
        finally:
            projection.fold(None)
    return _close(found, expected, states.dtype)


def _share(
    stack: LayerStack, layer: nn.Module, module: nn.Module, generator: torch.Generator
) -> float | None:
    """Return how much of its module's output a layer adds to its state; None if it does anything else with it."""
    rest, dtype = _leaving(stack, layer, module, torch.zeros_like)
    size = rest.square().mean(dim=-1, keepdim=True).sqrt()
    shares = []
    for factor in _PROBES:
        noise = torch.randn(rest.shape, generator=generator, dtype=torch.float64)
        probe = (factor * size * noise).to(dtype)

        def given(output: Tensor, probe: Tensor = probe) -> Tensor:
            # Some layers add to it in place.
            return probe.to(output.device, copy=True)

        moved = _leaving(stack, layer, module, given)[0] - rest
        exact = probe.double()
        share = float((moved * exact).sum() / exact.square().sum())
        if not share or not _close(moved, share * exact, dtype):
            return None
        shares.append(share)
    first, last = (torch.tensor([each], dtype=torch.float64) for each in shares)
    return shares[-1] if _close(first, last, dtype) else None


def _leaving(
    stack: LayerStack, layer: nn.Module, module: nn.Module, change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, torch.dtype]:
    """Return the states that leave a layer if its module's output is another, in float64, and their own dtype."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _given: Any, output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        seen.append(states.clone())

    handles = [
        module.register_forward_hook(lambda _module, _given, output: change(output)),
        layer.register_forward_hook(keep),
    ]
    try:
        ids = torch.arange(_TOKENS, device=next(stack.stack.parameters()).device).unsqueeze(0)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            stack.stack(
                input_ids=ids,
                attention_mask=mask,
                use_cache=False,
                **position_arguments(stack.stack, mask),
            )
    finally:
        for handle in handles:
            handle.remove()
    return seen[0].cpu().double(), seen[0].dtype


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Say whether two tensors are equal but for rounding in a dtype; what is not finite is not."""
    allowed = max(_ROUNDING * torch.finfo(dtype).eps, 1e-9)
    return bool((found - expected).norm() <= allowed * expected.norm())

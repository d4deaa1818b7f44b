"""The laws that a model must keep on its tiny copy: identity, every plan, every way to decode, and undoing.

The reference of a plan is the model rebuilt as the plan's visits, which knows nothing of dynadepth. Everything runs in
float64. What differs is measured against the largest logit; the limit is 1e-9, or what the base model's own padded
and cached rows differ by.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dynadepth.execution.sweep import Sweeper
from dynadepth.models.rebuild import rebuild
from dynadepth.models.structure import LayerStack, LayerTraits, layer_signature, layer_stack
from dynadepth.plans import Plans, identity_plan, plan_text
from dynadepth.proving.driving import MODES, Batch, FixedPlans, Mode, generate, prompts, run
from dynadepth.proving.exit_law import why_no_exits
from dynadepth.proving.observing import observe_layers
from dynadepth.proving.tiny_copy import failure

__all__ = ["Kept", "LawBroken", "check_laws"]

_LIMIT = 1e-9
_LIMIT_FLOAT32 = 1e-6
# The base model's own differences are those of a few rows, a plan's may be somewhat larger.
_SLACK = 16.0
# A base model that differs by more from itself gives no reference.
_LARGEST_NOISE = 1e-4
_LENGTHS = (9, 5, 7, 11)
_GENERATED = 5


class LawBroken(Exception):  # noqa: N818 - it is an answer, not a fault
    """A copy broke a law; the message says which, and how."""


@dataclass(frozen=True, slots=True)
class Kept:
    """That a copy kept all laws.

    Attributes:
        traits: How its layers are called.
        noise: Largest difference between the base model's own padded, single and cached rows, as a fraction of the
            largest logit.
        worst: Largest difference between a plan's rows and their reference, as a fraction of the largest logit.
    """

    traits: LayerTraits
    noise: float
    worst: float


def check_laws(model: Any, *, in_float64: bool = True) -> Kept:
    """Run every law on a tiny copy.

    Args:
        model: The copy, in float64; left as it was.
        in_float64: Whether all of it computes in float64. Otherwise differences as large as the last digits of float32
            are those of modules that narrow to it.

    Returns:
        What was found.

    Raises:
        LawBroken: A law is broken, or the base model itself gives no reference.
        UnsupportedModelError: The runtime refuses the model.
    """
    stack = layer_stack(model)
    plans = _plans(stack.num_layers)
    lengths = [_LENGTHS[row % len(_LENGTHS)] for row in range(len(plans))]
    batch = prompts(lengths, seed=1)
    traits = observe_layers(model, stack, (prompts([6, 3, 4], 2), prompts([7, 2, 6, 3, 4], 3)))
    stack = stack.with_traits(traits)
    few = prompts(list(_LENGTHS), seed=1)
    modes = MODES if _keeps_cache(stack) else MODES[:1]
    base = _Base(model, few, modes, _LIMIT if in_float64 else _LIMIT_FLOAT32)
    _identity(model, stack, few, base, modes)
    references = _References(model, plans)
    worst = _every_plan(model, stack, plans, batch, base, references, modes)
    try:
        swept = _sweep(model, stack, plans, few, base, references)
    except RuntimeError:
        # Some stacks give their result the shape of their input.
        traits = replace(traits, fixed_rows=True)
        stack = stack.with_traits(traits)
        swept = _sweep(model, stack, plans, few, base, references)
    worst = max(worst, swept)
    _generation(model, stack, plans[: len(_LENGTHS)], few, references)
    traits = replace(traits, no_exits=_no_exits(model, stack, few, base))
    _undone(model, stack, few, base)
    return Kept(traits, base.noise, worst)


def _no_exits(model: Any, stack: LayerStack, batch: Batch, base: "_Base") -> str | None:
    steps = base.logits.get("one token at a time")
    if steps is None:
        return "it keeps no cache, so what a token owes has no place"
    return why_no_exits(model, stack, batch, steps, base.limit)


def _keeps_cache(stack: LayerStack) -> bool:
    return all(layer_signature(type(layer).forward).cache_name for layer in stack.layers)


def _plans(num_layers: int) -> Plans:
    """Return mixed plans, one for each length of prompt, then every single edit."""
    rng = np.random.default_rng(0)
    mixed = rng.integers(0, 3, size=(len(_LENGTHS), num_layers)).astype(np.uint8)
    # Whose slot is empty decides what lengths and masks are read from.
    mixed[0, 0] = 0
    mixed[1, min(1, num_layers - 1)] = 0
    mixed[2, 0] = 2
    mixed[mixed.sum(axis=1) == 0, -1] = 1
    edits = []
    for layer_idx in range(num_layers):
        for action in (0, 2):
            plan = identity_plan(num_layers)
            plan[layer_idx] = action
            if plan.any():
                edits.append(plan)
    return np.concatenate([mixed, np.stack(edits)])


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a fraction of the largest logit; infinite if there are values that are none."""
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    return difference if difference == difference else float("inf")


class _Base:
    """What the base model gives, and how far it differs from itself."""

    def __init__(self, model: Any, batch: Batch, modes: tuple[Mode, ...], least: float) -> None:
        whole = run(model, batch, "uncached")
        if not bool(torch.isfinite(whole[batch.mask.bool()]).all()):
            raise LawBroken("the base model's logits on its tiny copy are not finite")
        if not torch.equal(run(model, batch, "uncached"), whole):
            raise LawBroken(
                "the base model gives two answers to one input (law 1 cannot hold): something in it changes between "
                "calls"
            )
        self._causal(model, batch, whole)
        self.logits = {
            mode: whole if mode == "uncached" else run(model, batch, mode) for mode in modes
        }
        padding = cached = 0.0
        for row in range(len(batch.ids)):
            real = batch.mask[row].bool()
            alone = run(model, batch.row(row, padded=False), "uncached")[0]
            padding = max(padding, _relative(whole[row][real], alone))
            for mode in modes[1:]:
                cached = max(cached, _relative(self.logits[mode][row][real], whole[row][real]))
        if cached > _LARGEST_NOISE:
            raise LawBroken(
                f"the base model itself differs by {cached:.2g} (of its largest logit) between decoding with a "
                "cache and without, so there is no reference for a plan"
            )
        # With padding that the base itself does not ignore, a row is compared with itself in the same padding.
        self.same_padding = padding > _LARGEST_NOISE
        self.noise = cached if self.same_padding else max(cached, padding)
        self.limit = max(least, _SLACK * self.noise)

    def _causal(self, model: Any, batch: Batch, whole: torch.Tensor) -> None:
        cut = batch.prefill
        before = run(model, Batch(batch.ids[:, :cut], batch.mask[:, :cut], cut), "uncached")
        real = batch.mask[:, :cut].bool()
        difference = _relative(whole[:, :cut][real], before[real])
        if difference > _LARGEST_NOISE:
            raise LawBroken(
                f"the base model is not causal: later tokens change the logits of earlier ones by {difference:.2g} of "
                "the largest"
            )


class _References:
    """Each plan's rebuilt model, made once."""

    def __init__(self, model: Any, plans: Plans) -> None:
        self._model = model
        self._made: dict[bytes, Any] = {}
        self._plans = plans

    def model(self, row: int) -> Any:
        """Return the rebuilt model of a row's plan."""
        key = self._plans[row].tobytes()
        if key not in self._made:
            self._made[key] = rebuild(self._model, self._plans[row].tolist())
        return self._made[key]

    def expected(self, batch: Batch, *, padded: bool) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each row's logits on its real tokens, alone and without a cache."""
        for row in range(len(batch.ids)):
            try:
                logits = run(self.model(row), batch.row(row, padded=padded), "uncached")[0]
            except (RuntimeError, IndexError, KeyError, ValueError) as error:
                raise LawBroken(
                    f"there is no reference for plan {plan_text(self._plans[row])}: the model rebuilt as its visits "
                    f"fails with {failure(error)}"
                ) from error
            yield row, logits[-int(batch.mask[row].sum()) :]


def _identity(
    model: Any, stack: LayerStack, batch: Batch, base: _Base, modes: tuple[Mode, ...]
) -> None:
    with FixedPlans(model, stack, identity_plan(stack.num_layers)[None]):
        for mode in modes:
            found = run(model, batch, mode)
            if not torch.equal(found, base.logits[mode]):
                raise LawBroken(
                    f"law 1 (identity): {mode}, the plan of every layer once differs from the base model by "
                    f"{_relative(found, base.logits[mode]):.2g} of the largest logit; expected no difference at all"
                )


def _every_plan(
    model: Any,
    stack: LayerStack,
    plans: Plans,
    batch: Batch,
    base: _Base,
    references: _References,
    modes: tuple[Mode, ...],
) -> float:
    expected = list(references.expected(batch, padded=base.same_padding))
    worst = 0.0
    with FixedPlans(model, stack, plans):
        for mode in modes:
            logits = run(model, batch, mode)
            for row, reference in expected:
                found = logits[row][batch.mask[row].bool()]
                worst = max(worst, _compare(found, reference, plans[row], f"law 2: {mode}", base))
    return worst


def _sweep(
    model: Any,
    stack: LayerStack,
    plans: Plans,
    batch: Batch,
    base: _Base,
    references: _References,
) -> float:
    """Run all plans on a few prompts in one forward: more plans than the model's own forward is given rows."""
    last = batch.ids.shape[1] - 1
    prompt = np.arange(len(plans)) % len(batch.ids)
    score = torch.tensor([[row, last] for row in range(len(plans))])
    with Sweeper(model, stack) as sweeper:
        found = sweeper.sweep(batch.ids, batch.mask, plans, prompt, score=score).logits
    worst = 0.0
    for row, plan in enumerate(plans):
        alone = batch.row(int(prompt[row]), padded=base.same_padding)
        reference = run(references.model(row), alone, "uncached")[0, -1:]
        worst = max(
            worst, _compare(found[row : row + 1], reference, plan, "law 2: in a sweep", base)
        )
    return worst


def _compare(
    found: torch.Tensor, reference: torch.Tensor, plan: Plans, where: str, base: _Base
) -> float:
    difference = _relative(found, reference)
    if difference > base.limit:
        wrong = (found.argmax(dim=-1) != reference.argmax(dim=-1)).nonzero().flatten().tolist()
        token = f", first wrong token at position {wrong[0]}" if wrong else ", same tokens"
        raise LawBroken(
            f"{where}, plan {plan_text(plan)} differs from the model rebuilt as its visits by {difference:.2g} of the "
            f"largest logit{token}; expected at most {base.limit:.2g}"
        )
    return difference


def _generation(
    model: Any, stack: LayerStack, plans: Plans, batch: Batch, references: _References
) -> None:
    if not callable(getattr(model, "generate", None)):
        return
    with FixedPlans(model, stack, plans):
        tokens, logits = generate(model, batch, _GENERATED)
    for row in range(len(plans)):
        alone, expected = generate(references.model(row), batch.row(row, padded=True), _GENERATED)
        # `generate` returns its logits in float32.
        difference = _relative(logits[:, row], expected[:, 0])
        if tokens[row] != alone[0] or difference > 1e-5:
            step = next(
                (i for i, (a, b) in enumerate(zip(tokens[row], alone[0], strict=True)) if a != b),
                None,
            )
            raise LawBroken(
                f"law 2: generate, plan {plan_text(plans[row])} differs from the model rebuilt as its visits by "
                f"{difference:.2g} of the largest logit, first wrong new token: {step}"
            )


def _undone(model: Any, stack: LayerStack, batch: Batch, base: _Base) -> None:
    before = _trace(model)
    with FixedPlans(model, stack, identity_plan(stack.num_layers)[None]):
        pass
    if _trace(model) != before:
        raise LawBroken("law 4: what was put on the model could not be removed without a trace")
    if not torch.equal(run(model, batch, "uncached"), base.logits["uncached"]):
        raise LawBroken("law 4: after all plans, the model gives other logits than before")


def _trace(model: Any) -> list[Any]:
    return [
        (
            name,
            type(module),
            sorted(module.__dict__),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ] + [sorted(model.state_dict())]

"""Plans judged on the base model's own text: at every token of it, what the plan would have said instead.

The text is given (teacher forcing), so one token that turns does not spoil the next. It shows harm that the first token
of an answer does not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.execution.executor import Skipped
from dynadepth.execution.sweep import Sweeper
from dynadepth.models.structure import LayerStack, position_arguments, takes
from dynadepth.plans import Plans, check_plans, identity_plan
from dynadepth_search.scoring.batching import cheapest_groups, pad_left, sweep_size

__all__ = ["Text", "TextOutcomes", "compare_models", "score_texts"]

_Floats = npt.NDArray[np.float64]
# The most logits of one sweep, in bytes, and its most tokens.
_LOGIT_BYTES, _MAX_TOKENS = 400_000_000, 24_576
_LOGIT_ROWS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A prompt and how the base model goes on.

    Args:
        ids: Token ids, without padding. Shape (tokens,), int64.
        prompt: Number of tokens of the prompt, 1 or more.
    """

    ids: npt.NDArray[np.int64]
    prompt: int

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """The places whose next token is compared: the end of the prompt, and all but the last token after it."""
        return np.arange(self.prompt - 1, max(self.prompt, len(self.ids) - 1))


@dataclass(frozen=True, slots=True, eq=False)
class TextOutcomes:
    """The outcomes of K plans on N texts, at each new token; NaN behind the end of a text.

    Args:
        divergence: KL(base, plan) in nats over the whole vocabulary; infinite where logits overflow. Shape
            (K, N, longest), float64.
        agreement: 1 where the plan's first choice is the base's, else 0. Shape (K, N, longest), float64.
    """

    divergence: _Floats
    agreement: _Floats

    def by_text(self) -> tuple[_Floats, _Floats]:
        """Return divergence and agreement as means over the tokens of each text. Shape (K, N), float64, each."""
        return np.nanmean(self.divergence, axis=2), np.nanmean(self.agreement, axis=2)


def score_texts(
    model: Any,
    stack: LayerStack,
    texts: Sequence[Text],
    plans: Any,
    *,
    skips: Sequence[Skipped] | None = None,
    sweep_tokens: int | None = None,
) -> TextOutcomes:
    """Compare plans with the identity plan at every new token of some texts.

    Args:
        model: The unwrapped base model, in evaluation mode.
        stack: Its layers, proved.
        texts: The texts.
        plans: The plans. Shape (K, layers), uint8.
        skips: What states go through in place of skipped layers; None: nothing.
        sweep_tokens: Padded tokens at which a sweep takes no further text; None: what suits the device.

    Returns:
        The outcomes, in the order given.

    Raises:
        PlanError: A plan is not one of this model.
        WrapError: The model is wrapped.
    """
    rows = check_plans(plans, stack.num_layers)
    longest = max(len(text.places) for text in texts)
    found = TextOutcomes(*(np.full((len(rows), len(texts), longest), np.nan) for _ in range(2)))
    vocabulary = model.config.get_text_config().vocab_size
    most = max(1, _LOGIT_BYTES // (4 * vocabulary))
    aim, cost = sweep_size(model.device, _MAX_TOKENS)
    aim = sweep_tokens or aim
    with Sweeper(model, stack, skips) as sweeper:
        for group, columns in _groups(texts, len(rows), most, aim, cost):
            _run(sweeper, model.device, texts, group, rows[columns], found, columns)
    return found


@torch.inference_mode()
def compare_models(
    base: Any, other: Any, texts: Sequence[Text], *, num_places: int
) -> tuple[_Floats, _Floats]:
    """Compare a model with the base model on some texts, which run as one batch.

    Args:
        base: The base model.
        other: A model with the same vocabulary, on the same device.
        texts: The texts.
        num_places: The most new tokens of a text that are compared; the first ones are.

    Returns:
        KL(base, other) in nats, and the share of tokens at which the other's first choice is the base's; as means over
        the tokens of each text. Shape (texts,), float64, each.
    """
    ids, mask = pad_left((text.ids for text in texts), base.device)
    places = [text.places[:num_places] for text in texts]
    # Logits before the first compared place are left out, where a model can do so.
    kept = max(len(text.ids) - int(at[0]) for text, at in zip(texts, places, strict=True))
    logits = []
    for model in (base, other):
        more: dict[str, Any] = {"logits_to_keep": kept} if takes(model, "logits_to_keep") else {}
        more.update(position_arguments(model, mask))
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, **more)
        logits.append(output.logits[:, -kept:])
    means: _Floats = np.empty((2, len(texts)))
    for row, (text, at) in enumerate(zip(texts, places, strict=True)):
        here = torch.from_numpy(at - len(text.ids) + kept).to(ids.device)
        outcome = _compare(torch.stack([each[row, here] for each in logits]))
        means[:, row] = [each.mean() for each in outcome]
    return means[0], means[1]


def _groups(
    texts: Sequence[Text], num_plans: int, most: int, aim: int, cost: int
) -> Iterator[tuple[list[int], slice]]:
    """Yield texts that share a sweep, shortest first, and which of the plans they run; the base runs besides."""
    order = sorted(range(len(texts)), key=lambda row: (len(texts[row].ids), row))
    groups = cheapest_groups(
        [num_plans + 1] * len(texts),
        [len(texts[row].ids) for row in order],
        [(num_plans + 1) * len(texts[row].places) for row in order],
        max_scored=most,
        max_tokens=aim,
        sweep_cost=cost,
    )
    for rows in (order[group] for group in groups):
        # A text whose plans alone are too many logits runs them in parts.
        size = num_plans
        if len(rows) == 1:
            size = max(1, min(num_plans, most // len(texts[rows[0]].places) - 1))
        for first in range(0, num_plans, size):
            yield rows, slice(first, min(first + size, num_plans))


def _run(
    sweeper: Sweeper,
    device: torch.device,
    texts: Sequence[Text],
    group: list[int],
    plans: Plans,
    found: TextOutcomes,
    columns: slice,
) -> None:
    ids, mask = pad_left((texts[row].ids for row in group), device)
    every = np.concatenate([identity_plan(plans.shape[1])[None], plans])
    score, example = [], []
    for number, row in enumerate(group):
        text = texts[row]
        at = ids.shape[1] - len(text.ids) + text.places
        for plan in range(len(every)):
            pairs = np.stack([np.full(len(at), number * len(every) + plan), at], axis=1)
            score.append(pairs)
        example.append(np.full(len(every), number))
    result = sweeper.sweep(
        ids,
        mask,
        np.tile(every, (len(group), 1)),
        np.concatenate(example),
        score=torch.from_numpy(np.concatenate(score).astype(np.int64)),
    )
    start = 0
    for row in group:
        count = len(texts[row].places)
        logits = result.logits[start : start + count * len(every)].unflatten(0, (len(every), count))
        start += count * len(every)
        for first in range(0, count, _LOGIT_ROWS):
            here = slice(first, min(first + _LOGIT_ROWS, count))
            divergence, agreement = _compare(logits[:, here])
            found.divergence[columns, row, here] = divergence
            found.agreement[columns, row, here] = agreement


@torch.inference_mode()
def _compare(logits: torch.Tensor) -> tuple[_Floats, _Floats]:
    """Compare the plans' logits with the first one's. Shape (1 + plans, places, vocabulary)."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    base = torch.log_softmax(logits[0], dim=-1, dtype=exact)
    probs, choice = base.exp(), logits[0].argmax(dim=-1)
    divergence, agreement = [], []
    # One plan at a time: the vocabulary in full precision is the largest thing here.
    for plan in logits[1:]:
        other = torch.log_softmax(plan, dim=-1, dtype=exact)
        # A token that the base excludes (log-probability minus infinity) contributes nothing.
        terms = torch.where(base.isneginf(), 0.0, probs * (base - other))
        whole = terms.sum(dim=-1, dtype=torch.float64).clamp_min(0.0)
        divergence.append(torch.where(whole.isnan(), torch.inf, whole))
        agreement.append((plan.argmax(dim=-1) == choice).double())
    return torch.stack(divergence).cpu().numpy(), torch.stack(agreement).cpu().numpy()

"""What late exits, or a plan, make of freely written text: passes, tokens that are the base model's choice, answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.exits.exit_forward import Exits
from dynadepth_search.exits.producing import Produced, changed_shares, produce
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.batching import batches_of
from dynadepth_search.scoring.generating import continue_prompts
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.scoring.runtime_checks import wrapped

__all__ = ["Written", "base_texts", "begins_alike", "write_with_exits", "write_with_plans"]

_Floats = npt.NDArray[np.float64]
_READ_ROWS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """Texts that were written from N prompts; arrays are over those with at least one decoded token.

    Attributes:
        prompts: Which prompts they are. Shape (texts,), int64.
        passes: Mean passes of the decoded tokens. Shape (texts,), float64.
        kept: Share of the decoded tokens that are the base model's own choice after the same text. Shape (texts,).
        common: New tokens with which the text and the base model's own begin alike. Shape (texts,), int64.
        identical: Whether all of the text is the base model's own. Shape (texts,), bool.
        audited: Share of kept tokens that its own audits measured; None where there were none.
        produced: The texts of all prompts, and how many layers each token had.
    """

    prompts: npt.NDArray[np.int64]
    passes: _Floats
    kept: _Floats
    common: npt.NDArray[np.int64]
    identical: npt.NDArray[np.bool_]
    audited: float | None
    produced: Sequence[Produced]


def base_texts(
    model: Any,
    prompts: Sequence[npt.NDArray[np.int64]],
    *,
    new_tokens: int,
    progress: Progress,
    finished: Callable[[Sequence[int]], object] | None = None,
) -> list[Text]:
    """Return the base model's own greedy text after each prompt.

    Args:
        model: The unwrapped base model.
        prompts: Token ids of each prompt.
        new_tokens: The most tokens of a continuation.
        progress: Called with the stage, the number of finished prompts and of all.
        finished: Called after each batch with its prompts.
    """
    found: dict[int, Text] = {}
    for rows in batches_of([len(prompt) for prompt in prompts], 16):
        progress("base text", len(found), len(prompts))
        texts = continue_prompts(model, [prompts[row] for row in rows], new_tokens=new_tokens)
        found |= dict(zip(rows, texts, strict=True))
        if finished is not None:
            finished(rows)
    return [found[row] for row in range(len(prompts))]


def write_with_exits(
    model: Any,
    prompts: Sequence[npt.NDArray[np.int64]],
    own: Sequence[Text],
    exits: Exits,
    *,
    num_layers: int,
    new_tokens: int,
    progress: Progress,
) -> Written:
    """Let a model write with exits on, and read the text again.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        prompts: Token ids of each prompt.
        own: The base model's own texts, from `base_texts`.
        exits: Where new tokens may leave; their dial moves as it does for a user.
        num_layers: Decoder layers of the model.
        new_tokens: The most tokens of a continuation.
        progress: Called with the stage, the number of finished prompts and of all.
    """
    audited: list[float | None] = []
    produced = produce(
        model,
        prompts,
        exits,
        new_tokens=new_tokens,
        batch_size=4,
        name="writing with exits",
        progress=progress,
        finished=lambda wrapped_model: audited.append(wrapped_model.dynadepth.exit_totals.fidelity),
    )
    return _judged(
        model,
        produced,
        own,
        lambda row: produced[row].passes(num_layers, exits.window),
        num_layers,
        audited=audited[0],
        progress=progress,
    )


def write_with_plans(
    model: Any,
    prompts: Sequence[npt.NDArray[np.int64]],
    own: Sequence[Text],
    *,
    num_layers: int,
    new_tokens: int,
    progress: Progress,
    **arguments: Any,
) -> Written:
    """Let a model write under a plan for each prompt, and read the text again.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        prompts: Token ids of each prompt.
        own: The base model's own texts, from `base_texts`.
        num_layers: Decoder layers of the model.
        new_tokens: The most tokens of a continuation.
        progress: Called with the stage, the number of finished prompts and of all.
        **arguments: Of `wrap_model`: a plan, or a policy that plans prompts and its budget.

    Raises:
        PlanError: The plan does not fit this model.
    """
    depths = np.empty(len(prompts))
    with wrapped(model, **arguments) as inner:
        controller = inner.dynadepth

        def noted(rows: Sequence[int]) -> None:
            depths[rows] = controller.last_depths

        texts = base_texts(inner, prompts, new_tokens=new_tokens, progress=progress, finished=noted)
    # No token waits for later layers, and every one may be another than the base model's.
    produced = [
        Produced(text, np.zeros(len(text.ids) - text.prompt, dtype=np.int64)) for text in texts
    ]
    return _judged(
        model,
        produced,
        own,
        lambda row: float(depths[row]),
        num_layers,
        audited=None,
        progress=progress,
    )


def _judged(
    model: Any,
    produced: Sequence[Produced],
    own: Sequence[Text],
    passes: Callable[[int], float],
    num_layers: int,
    *,
    audited: float | None,
    progress: Progress,
) -> Written:
    changed = changed_shares(model, produced, num_layers, batch_size=_READ_ROWS, progress=progress)
    rows = list(changed)
    return Written(
        prompts=np.array(rows, dtype=np.int64),
        passes=np.array([passes(row) for row in rows], dtype=np.float64),
        kept=1.0 - np.array(list(changed.values()), dtype=np.float64),
        common=np.array(
            [begins_alike(produced[row].text, own[row]) for row in rows], dtype=np.int64
        ),
        identical=np.array(
            [np.array_equal(produced[row].text.ids, own[row].ids) for row in rows], dtype=np.bool_
        ),
        audited=audited,
        produced=produced,
    )


def begins_alike(text: Text, own: Text) -> int:
    """Return with how many new tokens two texts of one prompt begin alike."""
    ours, base = (each.ids[each.prompt :] for each in (text, own))
    length = min(len(ours), len(base))
    differ = np.flatnonzero(ours[:length] != base[:length])
    return int(differ[0]) if len(differ) else length

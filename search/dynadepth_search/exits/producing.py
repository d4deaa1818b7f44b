"""Text that a model produces with exits on, and what became of its tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth.exits.exit_forward import Exits
from dynadepth.exits.exit_stats import passes_alone
from dynadepth.models.structure import position_arguments, takes
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.batching import batches_of, pad_left
from dynadepth_search.scoring.generating import continue_prompts
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.scoring.runtime_checks import wrapped

__all__ = ["Produced", "base_choices", "changed_shares", "produce"]

_Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Produced:
    """A text that was produced with exits on.

    Attributes:
        text: Prompt and new tokens.
        layers_run: For each new token, how many layers had run when it was chosen. Shape (new tokens,), int64.
    """

    text: Text
    layers_run: _Ids

    @property
    def num_decoded(self) -> int:
        """New tokens but the first, which the prompt's own forward gives; passes and changes are over these."""
        return len(self.layers_run) - 1

    def passes(self, num_layers: int, window: int) -> float:
        """Return the mean passes of its decoded tokens, of which there have to be some."""
        return passes_alone(self.layers_run[1:], num_layers, window)

    def changed(self, choices: _Ids, num_layers: int) -> npt.NDArray[np.bool_]:
        """Return which decoded tokens left early and are not the base model's choice.

        Args:
            choices: What the base model would have chosen for each new token. Shape (new tokens,).
            num_layers: Decoder layers of the model.

        Returns:
            Shape (decoded tokens,), bool.
        """
        new = self.text.ids[self.text.prompt :]
        wrong: npt.NDArray[np.bool_] = (self.layers_run < num_layers) & (new != choices)
        return wrong[1:]


def produce(
    model: Any,
    prompts: Sequence[_Ids],
    exits: Exits,
    *,
    new_tokens: int,
    batch_size: int,
    name: str,
    progress: Progress,
    finished: Callable[[Any], object] | None = None,
) -> list[Produced]:
    """Let a model continue prompts greedily with exits on.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        prompts: Token ids of each prompt.
        exits: Where new tokens may leave.
        new_tokens: The most tokens of a continuation.
        batch_size: Prompts of one batch; which of them share one does not change what leaves, but by rounding.
        name: What messages call this stage.
        progress: Called with the stage, the number of finished prompts and of all.
        finished: Called with the wrapped model when all is written, before it is unwrapped.

    Returns:
        The texts, in the order of the prompts.
    """
    found: dict[int, Produced] = {}
    with wrapped(model, exits=exits) as inner:
        for rows in batches_of([len(prompt) for prompt in prompts], batch_size):
            progress(name, len(found), len(prompts))
            texts = continue_prompts(inner, [prompts[row] for row in rows], new_tokens=new_tokens)
            run = inner.dynadepth.last_layers_run
            for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
                new = len(text.ids) - text.prompt
                layers = np.full(new, inner.dynadepth.num_layers, dtype=np.int64)
                if run is not None and new > 1:
                    layers[1:] = run[number, : new - 1]
                found[row] = Produced(text, layers)
        if finished is not None:
            finished(inner)
    progress(name, len(prompts), len(prompts))
    return [found[row] for row in range(len(prompts))]


@torch.inference_mode()
def base_choices(
    model: Any, texts: Sequence[Text], *, batch_size: int, name: str, progress: Progress
) -> list[_Ids]:
    """Return what the base model would have chosen for each new token, after the text before it.

    Args:
        model: The unwrapped base model.
        texts: The texts.
        batch_size: Texts of one forward.
        name: What messages call this stage.
        progress: Called with the stage, the number of finished texts and of all.

    Returns:
        For each text, shape (new tokens,), int64.
    """
    found: dict[int, _Ids] = {}
    for rows in batches_of([len(text.ids) for text in texts], batch_size):
        progress(name, len(found), len(texts))
        ids, mask = pad_left((texts[row].ids for row in rows), model.device)
        new = max(len(texts[row].ids) - texts[row].prompt for row in rows)
        kept: dict[str, Any] = {"logits_to_keep": new + 1} if takes(model, "logits_to_keep") else {}
        kept |= position_arguments(model, mask)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
        choices = logits.argmax(dim=-1).cpu().numpy()
        for number, row in enumerate(rows):
            own = len(texts[row].ids) - texts[row].prompt
            found[row] = choices[number, choices.shape[1] - own - 1 : choices.shape[1] - 1]
    progress(name, len(texts), len(texts))
    return [found[row] for row in range(len(texts))]


def changed_shares(
    model: Any,
    produced: Sequence[Produced],
    num_layers: int,
    *,
    batch_size: int,
    progress: Progress,
) -> dict[int, float]:
    """Read texts again, and return the share of decoded tokens that are not the base model's choice.

    Args:
        model: The unwrapped base model.
        produced: The texts.
        num_layers: Decoder layers of the model.
        batch_size: Texts of one forward.
        progress: Called with the stage, the number of finished texts and of all.

    Returns:
        The share, by the index of the text; texts of one new token, which have nothing to decode, are left out.
    """
    choices = base_choices(
        model,
        [each.text for each in produced],
        batch_size=batch_size,
        name="reading it again",
        progress=progress,
    )
    return {
        row: float(each.changed(chosen, num_layers).mean())
        for row, (each, chosen) in enumerate(zip(produced, choices, strict=True))
        if each.num_decoded > 0
    }

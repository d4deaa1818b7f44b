"""The texts that shortcuts are fitted and judged on: prompts with the base model's own continuations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynadepth_search.scoring.batching import pad_left
from dynadepth_search.scoring.own_text import Text

__all__ = ["batches_of", "continue_prompts"]


def continue_prompts(
    model: Any, prompts: Sequence[npt.NDArray[np.int64]], *, new_tokens: int, batch_size: int = 32
) -> list[Text]:
    """Let the base model continue prompts greedily, up to the end of its answer.

    Args:
        model: The unwrapped base model.
        prompts: Token ids of each prompt.
        new_tokens: The most tokens of a continuation; 0: none.
        batch_size: Prompts that run together.

    Returns:
        The texts, in the order of the prompts; the token that ends an answer is the last one.
    """
    if not new_tokens:
        return [Text(prompt, len(prompt)) for prompt in prompts]
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    texts: dict[int, Text] = {}
    for rows in batches_of([len(prompt) for prompt in prompts], batch_size):
        ids, mask = pad_left((prompts[row] for row in rows), model.device)
        with torch.inference_mode():
            # What a model's own config says of sampling and penalties does not hold here.
            grown = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                pad_token_id=min(ends, default=0),
            )
        for row, answer in zip(rows, grown[:, ids.shape[1] :].cpu().numpy(), strict=True):
            stop = next(
                (place for place, token in enumerate(answer.tolist(), start=1) if token in ends),
                len(answer),
            )
            texts[row] = Text(np.concatenate([prompts[row], answer[:stop]]), len(prompts[row]))
    return [texts[row] for row in range(len(prompts))]


def batches_of(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the indices of rows in batches of similar length, the shortest first.

    Args:
        lengths: Number of tokens of each row.
        batch_size: Rows of a batch.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]

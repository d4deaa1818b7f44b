"""The texts that shortcuts and exits are made from: prompts with the base model's own continuations, in a journal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth_search.files.journal import Journal, read_journal
from dynadepth_search.files.stored import Stored
from dynadepth_search.progress import Progress, silent
from dynadepth_search.scoring.batching import batches_of
from dynadepth_search.scoring.generating import continue_prompts
from dynadepth_search.scoring.own_text import Text

__all__ = ["TextFile"]

_Ids = npt.NDArray[np.int64]
_ADVICE = "delete the file and fit again"


class TextFile:
    """The continuations that a fit has made so far.

    Args:
        path: The journal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def continued(
        self,
        model: Any,
        prompts: Sequence[_Ids],
        *,
        new_tokens: int,
        batch_size: int = 32,
        progress: Progress = silent,
    ) -> list[Text]:
        """Return every prompt with its continuation; those that are not in the file yet are made and added.

        Args:
            model: The unwrapped base model.
            prompts: Token ids of each prompt.
            new_tokens: The most tokens of a continuation.
            batch_size: Prompts of one batch.
            progress: Called with the stage, the number of finished prompts and of all.

        Raises:
            LabelError: The file is damaged.
        """
        vocabulary = model.config.get_text_config().vocab_size

        def read(line: Stored) -> tuple[int, list[int]]:
            found = line.fields(["prompt", "continuation"])
            tokens = found["continuation"].entries()
            if len(tokens) > new_tokens:
                line.damaged(f"{len(tokens)} tokens; expected {new_tokens} or fewer")
            row = found["prompt"].whole(0, len(prompts) - 1)
            return row, [token.whole(0, vocabulary - 1) for token in tokens]

        known, length = read_journal(self._path, read, advice=_ADVICE)
        answers = dict(known)
        journal = Journal(self._path, length)
        batches = batches_of([len(prompt) for prompt in prompts], batch_size)
        for rows in batches:
            progress("continuing prompts", len(answers), len(prompts))
            # Which prompts share a batch decides the last bits, so a batch is made as a whole or not at all.
            if not all(row in answers for row in rows):
                made = continue_prompts(
                    model, [prompts[row] for row in rows], new_tokens=new_tokens
                )
                for row, text in zip(rows, made, strict=True):
                    answer = text.ids[text.prompt :].tolist()
                    if row not in answers:
                        answers[row] = answer
                        journal.append({"prompt": row, "continuation": answer})
        progress("continuing prompts", len(prompts), len(prompts))
        return [
            Text(np.concatenate([prompt, np.array(answers[row], dtype=np.int64)]), len(prompt))
            for row, prompt in enumerate(prompts)
        ]

"""What workers do for a score table: they score a block of prompts under all plans, by itself, and make its files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynadepth.errors import SearchError
from dynadepth.models.structure import layer_stack
from dynadepth.plans import Plans, plan_text
from dynadepth_search.data.tasks import ChatForm, Example
from dynadepth_search.runners.work import Loaded
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.scoring.states import PromptStates
from dynadepth_search.storage.score_store import METRICS, Part, block_of, part_of

__all__ = ["ScoreJob", "ScoreWork"]


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """A block of prompts to be scored.

    Args:
        number: Number of the block, from 0.
        examples: The prompts.
    """

    number: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ScoreWork:
    """Scores blocks of prompts.

    Args:
        scoring: How choices are scored, see `Task`.
        chat: The chat form of the prompts, see `Task`.
        plans: The plans, the identity first. Shape (K, layers), uint8.
        asked: The settings of the table, as its manifest has them.
    """

    scoring: str
    chat: ChatForm | None
    plans: Plans
    asked: dict[str, Any]

    def start(self, loaded: Loaded) -> Callable[[ScoreJob], Part]:
        """Return what scores a block."""
        scorer = Scorer(
            loaded.model,
            loaded.tokenizer,
            self.scoring,
            chat=self.chat,
            shortcuts=loaded.shortcuts,
        )
        hidden_size = layer_stack(loaded.model).hidden_size
        return lambda job: self._score(scorer, hidden_size, job)

    def _score(self, scorer: Scorer, hidden_size: int, job: ScoreJob) -> Part:
        # Its metrics depend on nothing before it.
        scorer.forget()
        examples, plans = job.examples, self.plans
        states = PromptStates(
            plans,
            self.asked["layers"],
            num_windows=self.asked["num_windows"],
            num_prompts=len(examples),
            hidden_size=hidden_size,
            dtype=scorer.model.dtype,
        )
        outcomes = scorer.outcomes(
            examples,
            np.tile(plans, (len(examples), 1)),
            np.repeat(np.arange(len(examples)), len(plans)),
            states=states,
        )
        shape = (len(examples), len(plans))
        metrics = {
            name: np.asarray(getattr(outcomes, name), dtype=np.float64).reshape(shape)
            for name in METRICS
        }
        graded = examples[0].kind != "prompt"
        for name, values in metrics.items():
            bad = np.argwhere(~np.isfinite(values))
            if len(bad) and (graded or name != "reward"):
                row, column = bad[0].tolist()
                raise SearchError(
                    f"plan {plan_text(plans[column])} gives prompt {examples[row].prompt[:40]!r} the {name} "
                    f"{values[row, column]}; the model's logits overflow there: load it in another dtype, or leave the "
                    "plan out"
                )
        given = outcomes.answer.reshape(shape)
        return part_of(examples, given, metrics, states.views, block_of(self.asked, job.number))

"""What workers do in a per-prompt search: they probe, and they search a block of prompts, each by itself.

Here a finished tree is confirmed and becomes a row of labels. Nothing here writes to disk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.plans import Plans
from dynadepth.tree_search.forest import EditPrior, Forest, SearchConfig
from dynadepth_search.data.tasks import ChatForm, Example, Task
from dynadepth_search.runners.work import Loaded
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.search.confirming import Confirmation
from dynadepth_search.search.per_prompt_spec import PromptSearchSpec
from dynadepth_search.storage.labels import label_row

__all__ = [
    "BlockJob",
    "BlockLabels",
    "ProbeJob",
    "Reading",
    "RewardWork",
    "Rewards",
    "SearchWork",
    "new_forest",
]


@dataclass(frozen=True, slots=True)
class Reading:
    """How the prompts of a search are read and judged.

    Args:
        kind: What the prompts ask for, see `Task`.
        scoring: How choices are scored, see `Task`.
        chat: The chat form of the prompts, see `Task`.
        spec: Settings of the search.
    """

    kind: str
    scoring: str
    chat: ChatForm | None
    spec: PromptSearchSpec

    @classmethod
    def of(cls, task: Task, spec: PromptSearchSpec) -> "Reading":
        """Return how a search reads a task."""
        return cls(task.kind, task.scoring, task.chat, spec)

    def scorer(self, loaded: Loaded) -> Scorer:
        """Return the scorer of a search."""
        return Scorer(
            loaded.model,
            loaded.tokenizer,
            self.scoring,
            chat=self.chat,
            shortcuts=loaded.shortcuts,
            max_logit_bytes=self.spec.max_logit_bytes,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ProbeJob:
    """Some prompts of the probe, and the plans that are evaluated on them.

    Args:
        examples: The prompts.
        plans: Shape (N, layers), uint8.
        tree: Index into `examples` for each plan. Shape (N,), uint32.
    """

    examples: tuple[Example, ...]
    plans: Plans
    tree: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class Rewards:
    """Rewards, and the visits of token rows to layers that they took, naive and executed."""

    rewards: npt.NDArray[np.float64]
    naive: int
    executed: int


@dataclass(frozen=True, slots=True)
class RewardWork:
    """Evaluates plans on prompts, for the probe.

    Args:
        reading: How prompts are read.
    """

    reading: Reading

    def start(self, loaded: Loaded) -> Callable[[ProbeJob], Rewards]:
        """Return what does a job."""
        scorer, objective = self.reading.scorer(loaded), self.reading.spec.objective

        def evaluate(job: ProbeJob) -> Rewards:
            scorer.forget()
            return Rewards(*scorer.rewards(job.examples, job.plans, job.tree, objective))

        return evaluate


@dataclass(frozen=True, slots=True)
class BlockJob:
    """A block of prompts to be searched together.

    Args:
        first: Index of the first one in the task.
        examples: The prompts.
    """

    first: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class BlockLabels:
    """What a block came to.

    Args:
        rows: A row of labels for each prompt, in the order of the task.
        evaluations: Number of plans that were evaluated.
        confirming: Number of evaluations that confirmed labels.
        naive: Visits of token rows to layers that one forward for each plan would have made.
        executed: Visits that were made.
    """

    rows: tuple[dict[str, Any], ...]
    evaluations: int
    confirming: int
    naive: int
    executed: int


@dataclass(frozen=True, slots=True, eq=False)
class SearchWork:
    """Searches blocks of prompts.

    Args:
        reading: How prompts are read.
        depth_penalty: Lambda of the labels' value.
        prior: What the probe measured.
    """

    reading: Reading
    depth_penalty: float
    prior: EditPrior

    def start(self, loaded: Loaded) -> Callable[[BlockJob], BlockLabels]:
        """Return what searches a block."""
        scorer = self.reading.scorer(loaded)
        return lambda job: _BlockSearch(self, scorer, job).run()


class _BlockSearch:
    """The search of one block."""

    def __init__(self, work: SearchWork, scorer: Scorer, job: BlockJob) -> None:
        self._spec, self._scorer, self._job = work.reading.spec, scorer, job
        self._config = replace(self._spec.config, depth_penalty=work.depth_penalty)
        self._confirmation = Confirmation(scorer, work.reading.kind, self._spec)
        self._forest = new_forest(
            scorer.num_layers, job.examples, self._config, seed=self._spec.seed, prior=work.prior
        )
        self._naive = self._executed = 0

    def run(self) -> BlockLabels:
        # The base is scored again in every block; otherwise sweeps would differ from those of a resumed run.
        self._scorer.forget()
        forest, examples = self._forest, self._job.examples
        while not forest.finished:
            batch = forest.ask(self._spec.block_size * self._config.round_size)
            forest.tell(batch.ticket, self._rewards(examples, batch.plans, batch.tree))
        evaluated = [forest.evaluated(tree) for tree in range(len(examples))]
        # All prompts at once, so that sweeps and batches of generated answers are full.
        choices = self._confirmation.choose(
            examples, evaluated, self._config.depth_penalty, self._rewards
        )
        rows = tuple(
            label_row(
                self._job.first + tree,
                examples[tree],
                tried,
                # A tree starts with the identity plan.
                base_reward=float(tried.rewards[0]),
                choice=choice,
            )
            for tree, (tried, choice) in enumerate(zip(evaluated, choices, strict=True))
        )
        evaluations, confirming = sum(map(len, evaluated)), self._confirmation.evaluations
        return BlockLabels(rows, evaluations, confirming, self._naive, self._executed)

    def _rewards(
        self, examples: Sequence[Example], plans: Plans, tree: npt.NDArray[np.uint32]
    ) -> npt.NDArray[np.float64]:
        rewards, naive, executed = self._scorer.rewards(examples, plans, tree, self._spec.objective)
        self._naive, self._executed = self._naive + naive, self._executed + executed
        return rewards


def new_forest(
    num_layers: int,
    examples: tuple[Example, ...],
    config: SearchConfig,
    *,
    seed: int,
    prior: EditPrior | None = None,
) -> Forest:
    """Return a forest with one tree for each prompt.

    Args:
        num_layers: Decoder layers of the model.
        examples: The prompts; what a tree draws follows from the prompt's id, not from its place.
        config: Settings of the forest.
        seed: Seed of everything random.
        prior: What a probe measured; None: nothing yet.
    """
    keys = np.array([int(item.prompt_id, 16) for item in examples], dtype=np.uint64)
    return Forest(num_layers, len(examples), config=config, seed=seed, prior=prior, tree_keys=keys)

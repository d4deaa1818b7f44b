"""The settings of a per-prompt search, with their checks, and the summary of a run."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dynadepth.config import config_from_dict, config_to_dict, plain_number
from dynadepth.errors import ConfigError
from dynadepth.tree_search.forest import SearchConfig
from dynadepth_search.data.variants import check_wording
from dynadepth_search.scoring.objectives import Objective, check_objective

__all__ = ["PromptSearchSpec", "PromptSearchSummary"]

_LEAST = {
    "seed": 0,
    "block_size": 1,
    "blocks_per_shard": 1,
    "max_logit_bytes": 1,
    "confirm": 0,
    "variants": 1,
    "own_tokens": 1,
    "new_tokens": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSearchSpec:
    """The settings of a per-prompt search; labels depend only on these, the model and the task.

    A finished prompt's best plans are scored again on variants of it, see `dynadepth_search.search.confirming`, since
    the best of many plans owes its reward partly to luck. By default these are the two best plans and the identity, on
    two variants: 6 evaluations or fewer beside 40. More variants refute more, more candidates are more chances to be
    lucky again.

    Args:
        config: Settings of the forest. Its `depth_penalty` is ignored, and its `probe_trees` is the number of prompts
            that are probed.
        objective: What is maximised: `preserve` (label-free) or `reward`.
        depth_penalty: Lambda of value = reward - lambda * depth, in units of the objective; None: the probe chooses it,
            see `probe_penalty`.
        seed: Seed of everything random.
        block_size: Number of prompts that are searched together and share sweeps.
        blocks_per_shard: Number of blocks of a shard of labels.
        max_logit_bytes: Maximum size of the logits of one sweep in bytes, see `Scorer`.
        confirm: Number of plans that are scored on variants, the identity besides; 0: the label is the best plan of the
            search.
        margin: By how much the value of a label has to exceed that of the identity plan, in units of the objective. It
            has to on every variant (on the prompt, if none is confirmed).
        variants: Maximum number of orders of lettered choices; there is one other wording, and one continuation.
        wording: The second wording of a prompt, which it stands in as `{prompt}`; for choices that the prompt does not
            list, and for completions with the objective `reward`.
        own_tokens: Number of tokens of the base model's own continuation that are read, for prompts without choices
            with the objective `preserve`.
        new_tokens: The most tokens of a generated answer, for tasks with solutions and the objective `reward`.

    Raises:
        ConfigError: A value has the wrong type or is out of range.
    """

    config: SearchConfig = field(
        default_factory=lambda: SearchConfig(max_evaluations=40, probe_trees=8, stop_at=1.5)
    )
    objective: Objective = "preserve"
    depth_penalty: float | None = None
    seed: int = 0
    block_size: int = 16
    blocks_per_shard: int = 4
    max_logit_bytes: int = 400_000_000
    confirm: int = 2
    margin: float = 0.0
    variants: int = 2
    wording: str = "Read the following carefully.\n\n{prompt}"
    own_tokens: int = 8
    new_tokens: int = 128

    def __post_init__(self) -> None:
        check_objective(self.objective)
        for name, least in _LEAST.items():
            value = plain_number(getattr(self, name))
            object.__setattr__(self, name, value)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"PromptSearchSpec.{name} is {value!r}; expected a whole number, {least} or more"
                )
        if self.config.probe_trees < 1:
            raise ConfigError(
                "PromptSearchSpec.config.probe_trees is 0; a search opens with a probe of 1 prompt or more"
            )
        if self.depth_penalty is not None and not 0 <= self.depth_penalty < float("inf"):
            raise ConfigError(
                f"PromptSearchSpec.depth_penalty is {self.depth_penalty}; expected 0 or more, or None"
            )
        object.__setattr__(self, "margin", plain_number(self.margin))
        margin: Any = self.margin
        number = isinstance(margin, int | float) and not isinstance(margin, bool)
        if not number or not 0 <= margin < float("inf"):
            raise ConfigError(f"PromptSearchSpec.margin is {self.margin!r}; expected 0 or more")
        object.__setattr__(self, "margin", float(self.margin))
        check_wording(self.wording)

    @property
    def shard_size(self) -> int:
        """Number of prompts of a shard."""
        return self.block_size * self.blocks_per_shard

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as values that JSON can hold."""
        forest = self.config.to_dict()
        # The penalty of the spec itself is used instead.
        del forest["depth_penalty"]
        return {**config_to_dict(self), "config": forest}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PromptSearchSpec":
        """Make the spec from what `to_dict` wrote.

        Raises:
            ConfigError: A key is unknown, or a value has the wrong type or is out of range.
        """
        config = SearchConfig.from_dict(content.get("config"))
        return config_from_dict(cls, {**content, "config": config})


@dataclass(frozen=True, slots=True)
class PromptSearchSummary:
    """A summary of one run of a search.

    Args:
        prompts: Number of prompts of the task, all of which now have a label.
        searched: Number of prompts that this run searched.
        evaluations: Number of plans that this run evaluated for labels, with identity plans but without the probe.
        probe_evaluations: Number of plans that the probe evaluated.
        confirming_evaluations: Number of times that this run scored a plan on a variant, let the base model continue
            a prompt, and let a plan answer a prompt or a variant.
        naive_visits: Visits of token rows to layers that one forward for each plan would have made, probe included.
        executed_visits: Visits of token rows to layers that were actually made.
        depth_penalty: Lambda of the labels' value.
        probe_seconds: Wall time of the probe in seconds; 0 if an earlier run made it.
        search_seconds: Wall time of the search in seconds.
    """

    prompts: int
    searched: int
    evaluations: int
    probe_evaluations: int
    confirming_evaluations: int
    naive_visits: int
    executed_visits: int
    depth_penalty: float
    probe_seconds: float
    search_seconds: float

    @property
    def evaluations_per_label(self) -> float:
        """Plans evaluated for each prompt that this run searched; NaN if it searched none.

        Without those that confirmed its label, see `confirming_per_label`.
        """
        return self.evaluations / self.searched if self.searched else float("nan")

    @property
    def confirming_per_label(self) -> float:
        """Confirming evaluations for each prompt that this run searched; NaN if it searched none."""
        return self.confirming_evaluations / self.searched if self.searched else float("nan")

    @property
    def sharing_factor(self) -> float:
        """Naive visits divided by the visits made; NaN if none was made."""
        return self.naive_visits / self.executed_visits if self.executed_visits else float("nan")

    @property
    def seconds_per_evaluation(self) -> float:
        """Wall time per evaluation in seconds, of whatever kind; NaN if there was none."""
        total = self.evaluations + self.probe_evaluations + self.confirming_evaluations
        return (self.probe_seconds + self.search_seconds) / total if total else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold; None for NaN."""
        rates = {
            "evaluations_per_label": self.evaluations_per_label,
            "confirming_per_label": self.confirming_per_label,
            "sharing_factor": self.sharing_factor,
            "seconds_per_evaluation": self.seconds_per_evaluation,
        }
        finite = {name: rate if math.isfinite(rate) else None for name, rate in rates.items()}
        return {**asdict(self), **finite}

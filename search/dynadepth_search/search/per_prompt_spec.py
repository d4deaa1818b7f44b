"""What a search is asked for, and what a run of it reports.

Owns the checks of the settings. Knows nothing of how a search is run.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from dynadepth.config import config_to_dict, plain_number
from dynadepth.errors import ConfigError
from dynadepth.tree_search.forest import SearchConfig
from dynadepth_search.scoring.objectives import Objective, check_objective

__all__ = ["PromptSearchSpec", "PromptSearchSummary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSearchSpec:
    """What a search is asked for; labels depend on it, on the model and on the task alone.

    Args:
        config: Settings of the forest. Its `depth_penalty` is not used, and its `probe_trees` is the number of prompts
            that are probed.
        objective: What is maximised: `preserve` (label-free) or `reward`.
        depth_penalty: Lambda of value = reward - lambda * depth, in units of the objective; None lets the probe choose,
            see `probe_penalty`.
        seed: Of everything random.
        block_size: Prompts that are searched together and share sweeps.
        blocks_per_shard: Blocks of a shard of labels.
        max_logit_bytes: Bounds the logits of one sweep, see `Scorer`.

    Raises:
        ConfigError: A value of the wrong type or out of range.
    """

    config: SearchConfig = field(default_factory=lambda: SearchConfig(probe_trees=8))
    objective: Objective = "preserve"
    depth_penalty: float | None = None
    seed: int = 0
    block_size: int = 16
    blocks_per_shard: int = 4
    max_logit_bytes: int = 400_000_000

    def __post_init__(self) -> None:
        check_objective(self.objective)
        for name in ("seed", "block_size", "blocks_per_shard", "max_logit_bytes"):
            value = plain_number(getattr(self, name))
            object.__setattr__(self, name, value)
            if not isinstance(value, int) or isinstance(value, bool) or value < (name != "seed"):
                least = int(name != "seed")
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

    @property
    def shard_size(self) -> int:
        """Prompts of a shard."""
        return self.block_size * self.blocks_per_shard

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as values that JSON knows."""
        forest = self.config.to_dict()
        # The spec's own penalty is the one that counts.
        del forest["depth_penalty"]
        return {**config_to_dict(self), "config": forest}


@dataclass(frozen=True, slots=True)
class PromptSearchSummary:
    """What one run of a search did.

    Args:
        prompts: Prompts of the task, all of which have a label now.
        searched: Prompts that this run searched.
        evaluations: Plans that this run evaluated for labels, the identity plans included and the probe's left out.
        probe_evaluations: Plans that the probe evaluated.
        naive_visits: Visits of token rows to layers that one forward for each plan would have made, probe included.
        executed_visits: Visits made.
        depth_penalty: Lambda of the labels' value.
        probe_seconds: Wall time of the probe; 0 if an earlier run made it.
        search_seconds: Wall time of the search.
    """

    prompts: int
    searched: int
    evaluations: int
    probe_evaluations: int
    naive_visits: int
    executed_visits: int
    depth_penalty: float
    probe_seconds: float
    search_seconds: float

    @property
    def evaluations_per_label(self) -> float:
        """Plans evaluated for each prompt that this run searched; NaN if it searched none."""
        return self.evaluations / self.searched if self.searched else float("nan")

    @property
    def sharing_factor(self) -> float:
        """Naive visits for each visit made; NaN if none was made."""
        return self.naive_visits / self.executed_visits if self.executed_visits else float("nan")

    @property
    def seconds_per_evaluation(self) -> float:
        """Wall time of an evaluation, probe included; NaN if there was none."""
        total = self.evaluations + self.probe_evaluations
        return (self.probe_seconds + self.search_seconds) / total if total else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as values that JSON knows; None where there is none."""
        rates = {
            "evaluations_per_label": self.evaluations_per_label,
            "sharing_factor": self.sharing_factor,
            "seconds_per_evaluation": self.seconds_per_evaluation,
        }
        finite = {name: rate if math.isfinite(rate) else None for name, rate in rates.items()}
        return {**asdict(self), **finite}

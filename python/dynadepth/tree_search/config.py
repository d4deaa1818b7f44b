"""Settings of the search for plans and its prior over single edits, with their checks and their JSON form."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dynadepth.config import check_fields, config_from_dict, config_to_dict
from dynadepth.errors import ConfigError

__all__ = ["EditPrior", "SearchConfig"]

_Floats = npt.NDArray[np.float64]

_RANGES: dict[str, tuple[float, float]] = {
    "max_evaluations": (1, 1_000_000),
    "depth_penalty": (0, 1e100),
    "exploration": (0, 1e6),
    "max_depth": (1, 2),
    "max_repeats": (0, 4096),
    "max_edits": (0, 4096),
    "virtual_loss": (0, 1e6),
    "probe_trees": (0, 2**32 - 1),
    "round_size": (1, 4096),
    "temperature": (1e-3, 1e6),
    "prior_weight": (0, 1e6),
    "random_child": (0, 1),
    "interaction": (0, 1e6),
    "noise": (1e-6, 1e6),
    "stop_at": (0, 1e6),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """Settings of the search.

    Under `"posterior"`, the rule that measures best, `exploration` is in standard deviations of the posterior. Under
    `"puct"`, `exploration` (0.5 suits it) and `virtual_loss` are in units of the tree's spread (the median difference
    in value between its told plans and the identity plan), `temperature` in units of the prior's spread (the median
    size of its effects). None of them depends on the scale of the rewards. Under `"drllm"`, `exploration` is in units
    of the reward, as in the paper. `virtual_loss` is not used under `"posterior"`, `temperature` and `prior_weight`
    only under `"puct"`, `interaction`, `noise` and `stop_at` only under `"posterior"`.

    Args:
        max_evaluations: Plans evaluated for each tree, including the identity plan but not those of the probe.
        depth_penalty: What a depth of 1 costs, in units of reward: value = reward - depth_penalty * depth.
        exploration: Weight of the exploration bonus.
        selection: Rule of descent: `"posterior"`, `"puct"`, or `"drllm"` for that of the Dr.LLM paper.
        protect: Layers that stay at EXECUTE.
        max_depth: Largest depth of a plan, 1 to 2. At 1 a REPEAT needs a SKIP in the same plan.
        max_repeats: Maximum number of REPEATs in a plan.
        max_edits: Maximum number of layers of a plan that are not EXECUTE.
        virtual_loss: By how much an open ticket lowers the scores of the nodes on its path.
        probe_trees: Number of trees that start with every single edit if the forest is given no prior; 0: no probe.
        round_size: Number of plans of one tree that are asked before any of them is told.
        temperature: Flatness of the prior probabilities of the edits.
        prior_weight: Weight of the prior, in units of a tree's own measurements of an edit.
        random_child: Probability that a step of a descent takes a random child instead of the best.
        interaction: Variance of the interaction of two edits, in units of the mean variance of an effect over prompts.
        noise: Variance of a reward around the model of edits and pairs, in the same units.
        stop_at: A tree stops when no plan that it finds promises more than the best one told, at so many standard
            deviations; 0: only when its evaluations are spent.

    Raises:
        ConfigError: A value has the wrong type or is out of range.

    Example:
        >>> SearchConfig(max_evaluations=50).selection
        'posterior'
    """

    max_evaluations: int = 24
    depth_penalty: float = 1.0
    exploration: float = 5.0
    selection: Literal["posterior", "puct", "drllm"] = "posterior"
    protect: tuple[int, ...] = ()
    max_depth: float = 1.0
    max_repeats: int = 2
    max_edits: int = 12
    virtual_loss: float = 0.03
    probe_trees: int = 16
    round_size: int = 4
    temperature: float = 4.0
    prior_weight: float = 0.5
    random_child: float = 0.0
    interaction: float = 0.1
    noise: float = 0.01
    stop_at: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, (least, most) in _RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(
                    f"SearchConfig.{name} is {getattr(self, name)}; expected {least} to {most}"
                )
        if any(not 0 <= layer < 2**32 for layer in self.protect):
            raise ConfigError(
                f"SearchConfig.protect is {self.protect}; expected layer indices from 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as values that JSON can hold."""
        return config_to_dict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "SearchConfig":
        """Make the settings from what `to_dict` wrote.

        Raises:
            ConfigError: A key is unknown, or a value has the wrong type or size.
        """
        return config_from_dict(cls, content)


@dataclass(frozen=True, slots=True, eq=False)
class EditPrior:
    """The effects of single edits on the reward, over the prompts that a probe measured.

    Edit l skips layer l; edit num_layers + l repeats it.

    Args:
        mean: Mean difference in reward from the identity plan; NaN for an edit that was not measured.
            Shape (2 * num_layers,), float64.
        variance: Sample variance over the prompts (0 for one prompt). Shape (2 * num_layers,), float64.
        count: Number of prompts measured.
    """

    mean: _Floats
    variance: _Floats
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Return the prior as values that JSON can hold; an edit that was not measured is None."""
        return {
            "mean": [None if math.isnan(entry) else entry for entry in self.mean.tolist()],
            "variance": [None if math.isnan(entry) else entry for entry in self.variance.tolist()],
            "count": self.count,
        }

    @classmethod
    def from_dict(cls, content: Any) -> "EditPrior":
        """Make the prior from what `to_dict` wrote.

        Raises:
            ConfigError: A key is missing or unknown, or a value is invalid.
        """
        if not isinstance(content, dict) or set(content) != {"mean", "variance", "count"}:
            raise ConfigError(
                f"EditPrior is {content!r}; expected an object with mean, variance and count"
            )
        try:
            mean, variance = (
                np.array(
                    [math.nan if entry is None else entry for entry in content[name]], np.float64
                )
                for name in ("mean", "variance")
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"EditPrior holds something other than numbers: {error}") from error
        if mean.ndim != 1 or mean.shape != variance.shape or not isinstance(content["count"], int):
            raise ConfigError(
                f"EditPrior has mean {mean.shape}, variance {variance.shape} and count "
                f"{content['count']!r}; expected two lists of one length and a whole number"
            )
        return cls(mean, variance, content["count"])

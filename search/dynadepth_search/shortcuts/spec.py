"""The settings of a fit of shortcuts."""

from dataclasses import dataclass

from dynadepth.config import check_lowest, config_to_dict
from dynadepth.errors import ConfigError
from dynadepth.shortcuts.maps import Rank

__all__ = ["ShortcutSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortcutSpec:
    """The settings of a fit of shortcuts.

    Args:
        rank: Rank of the maps; 0: the bias alone; "full"; None: an eighth of the width of the states.
        new_tokens: The most tokens by which the model continues each prompt before it is fitted on; 0: prompts alone.
        ridges: Ridges to choose from for each layer, as fractions of the mean variance of the states.
        num_heldout: Number of prompts that choose the ridges and measure the harm; at most a fifth of all.
        num_places: The most tokens of a held-out text at which the harm is measured.
        distil_steps: Steps of the second stage, which trains the maps further through the frozen model; 0: none.
        batch_size: Texts of one forward.
        seed: Seed of everything random.

    Raises:
        ConfigError: A value is out of range.
    """

    rank: Rank | None = None
    new_tokens: int = 64
    ridges: tuple[float, ...] = (1e-4, 1e-2)
    num_heldout: int = 32
    num_places: int = 16
    distil_steps: int = 0
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rank, str) and self.rank != "full":
            raise ConfigError(
                f"rank is {self.rank!r}; expected a whole number of 0 or more, or full"
            )
        if isinstance(self.rank, int) and self.rank < 0:
            raise ConfigError(f"rank is {self.rank}; expected 0 or more, or full")
        lowest = {
            "new_tokens": 0,
            "num_heldout": 1,
            "num_places": 1,
            "distil_steps": 0,
            "batch_size": 1,
        }
        check_lowest(self, lowest)
        if not self.ridges or not all(0 < ridge < float("inf") for ridge in self.ridges):
            raise ConfigError(f"ridges are {self.ridges}; expected one or more, each above 0")

    def to_dict(self) -> dict[str, object]:
        """Return the settings as values that JSON can hold."""
        return config_to_dict(self)

    def rank_for(self, hidden_size: int) -> Rank:
        """Return the rank for states of a width.

        Raises:
            ConfigError: The rank exceeds the width.
        """
        rank = max(1, hidden_size // 8) if self.rank is None else self.rank
        if isinstance(rank, int) and rank > hidden_size:
            raise ConfigError(
                f"rank is {rank}, more than the {hidden_size} numbers of a state; give a lower one, or full"
            )
        return rank

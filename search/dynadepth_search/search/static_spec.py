"""The settings of a search for plans that suit all prompts."""

from dataclasses import dataclass

from dynadepth.config import check_fields, check_lowest
from dynadepth.errors import ConfigError
from dynadepth_search.scoring.objectives import Objective, check_objective

__all__ = ["StaticSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticSpec:
    """The settings of a search for static plans.

    Args:
        objective: How plans are compared: `preserve`, or `reward` for the right answers.
        from_layer: No plan edits a layer before this one.
        min_depth: No plan has a lower depth than this, as a fraction of the number of layers.
        size: Number of plans on the menu, including the identity.
        beam: Number of plans of each depth that are extended further.
        num_candidates: Number of layers that plans may skip: those whose removal on its own costs least.
        num_prompts: Number of prompts on which the plans of a depth are compared.
        num_screened: Number of these prompts on which all plans are compared; only the best one and a half times
            `beam` plans are evaluated on the rest.
        num_confirmed: Number of other prompts, on which the pool of plans is measured and the menu is chosen.
        protect: Layers that are never removed.
        seed: Seed of the choice of prompts.

    Raises:
        ConfigError: A value has the wrong type or is out of range.
    """

    objective: Objective = "preserve"
    from_layer: int = 0
    min_depth: float = 0.75
    size: int = 16
    beam: int = 6
    num_candidates: int = 12
    num_prompts: int = 48
    num_screened: int = 16
    num_confirmed: int = 200
    protect: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_objective(self.objective)
        if not 0 < self.min_depth < 1:
            raise ConfigError(
                f"StaticSpec.min_depth is {self.min_depth}; expected more than 0 and less than 1"
            )
        ranges = {
            "from_layer": 0,
            "size": 2,
            "beam": 1,
            "num_candidates": 1,
            "num_prompts": 1,
            "num_screened": 1,
            "num_confirmed": 20,
            "seed": 0,
        }
        check_lowest(self, ranges)

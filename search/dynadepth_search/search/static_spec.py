"""What a search of plans for all prompts is asked for."""

from dataclasses import dataclass

from dynadepth.config import check_fields
from dynadepth.errors import ConfigError
from dynadepth_search.scoring.objectives import Objective, check_objective

__all__ = ["StaticSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticSpec:
    """How plans for all prompts are searched.

    Args:
        objective: What plans are compared by: `preserve`, or `reward` for the right answers.
        from_layer: No plan edits a layer before this one.
        min_depth: No plan falls below this depth.
        size: Plans on the menu, the identity included.
        beam: Plans of each depth that are carried on.
        num_candidates: Layers that plans are made of: those whose removal alone costs least.
        num_prompts: Prompts on which the plans of a depth are compared.
        num_screened: How many of these all of them are compared on; half a beam more than is carried on goes on to the
            rest.
        num_confirmed: Other prompts, on which the pool of plans is measured and the menu is chosen.
        protect: Layers that are never removed.
        seed: Of the choice of prompts.

    Raises:
        ConfigError: A value of the wrong type or out of range.
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
        for name, lowest in ranges.items():
            if getattr(self, name) < lowest:
                raise ConfigError(
                    f"StaticSpec.{name} is {getattr(self, name)}; expected {lowest} or more"
                )

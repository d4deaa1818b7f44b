"""What late exits are compared with at equal passes: static mixtures, and policies that plan each prompt.

They write from the same prompts, are read again and timed in the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.checkpoints.trained_policy import TrainedPolicy
from dynadepth.evaluation.mixtures import mix_to_depth
from dynadepth.plans import Plans, plan_depth, plan_text
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth_search.exits.judging.timing import TimeOverBase
from dynadepth_search.exits.judging.written import Written

__all__ = ["Opponent", "Part", "Pool", "opponents_at", "static_shares"]

# Static plans, and what they are worth on other prompts. Shapes (plans, num_layers) and (plans,).
Pool = tuple[Plans, npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A way to write that some of the prompts get.

    Attributes:
        name: Tells it from others.
        share: Of the prompts.
        arguments: Of `wrap_model`.
        plan: The plan in digits, if it is one for all prompts.
    """

    name: str
    share: float
    arguments: Mapping[str, Any]
    plan: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Opponent:
    """Who writes with as many passes.

    Attributes:
        parts: Its ways to write, whose shares sum to 1.
    """

    parts: Sequence[Part]

    def figures(
        self, written: Mapping[str, Written], times: Mapping[str, TimeOverBase]
    ) -> dict[str, Any] | None:
        """Return what it keeps and costs; None if some of it answers every prompt with one token, which says nothing.

        Args:
            written: By the name of each part.
            times: The same; empty if nothing was timed.
        """
        if not all(len(written[part.name].prompts) for part in self.parts):
            return None
        found = {
            name: sum(
                part.share * float(getattr(written[part.name], name).mean()) for part in self.parts
            )
            for name in ("passes", "kept", "identical")
        }
        time = None
        if all(part.name in times for part in self.parts):
            time = sum(part.share * times[part.name].median for part in self.parts)
        plans = [part.plan for part in self.parts if part.plan is not None]
        shares = [part.share for part in self.parts]
        return {**found, "time": time, **({"plans": plans, "shares": shares} if plans else {})}


def opponents_at(
    passes: float,
    *,
    pool: Pool | None,
    shortcuts: Shortcuts | None,
    against: Mapping[str, TrainedPolicy],
) -> tuple[Opponent | None, dict[str, Opponent | None]]:
    """Return the best static mixture of a number of passes, and the others; None for who cannot have so few or many.

    Args:
        passes: Mean passes of new tokens.
        pool: Static plans of which the best mixture is taken; None: there is none.
        shortcuts: What these plans leave in place of layers that they skip; None: nothing.
        against: Policies that plan prompts, by name.
    """
    static = None if pool is None else _mixture(passes, pool, shortcuts)
    found: dict[str, Opponent | None] = {}
    for name, policy in against.items():
        lowest, highest = policy.calibration.range
        found[name] = None
        if lowest <= passes <= highest:
            part = Part(f"{name} at {passes!r}", 1.0, {"routers": policy, "budget": passes})
            found[name] = Opponent([part])
    return static, found


def static_shares(pool: Pool, depth: float) -> dict[int, float] | None:
    """Return the plans of the best static mixture of a mean depth and their shares; None if none is as shallow or deep.

    Args:
        pool: The static plans.
        depth: As a fraction of the layers.

    Returns:
        One or two plans, by their index in the pool.
    """
    plans, values = pool
    depths = plan_depth(plans)
    if not depths.min() <= depth <= depths.max():
        return None
    mixed = mix_to_depth(depths, values, depth)
    both = [(mixed.low, 1.0 - mixed.weight), (mixed.high, mixed.weight)]
    return {index: share for index, share in both if share > 0}


def _mixture(passes: float, pool: Pool, shortcuts: Shortcuts | None) -> Opponent | None:
    shares = static_shares(pool, passes)
    if shares is None:
        return None
    parts = []
    for index, share in shares.items():
        plan = pool[0][index]
        text = plan_text(plan)
        parts.append(Part(f"plan {text}", share, {"plan": plan, "shortcuts": shortcuts}, text))
    return Opponent(parts)

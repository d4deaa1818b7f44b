"""What an evaluation says besides its figures: who got which plan, drifts, and what to know of the training.

Works on plans and records; runs nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dynadepth.checkpoints.trained_policy import Routers, TrainedPolicy
from dynadepth.errors import CheckpointError, ConfigError, ShortcutError
from dynadepth.plans import Plans, plan_depth, plan_text
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.training.train_config import TrainConfig
from dynadepth_search.data.tasks import Example
from dynadepth_search.evaluation.metrics import show_budget
from dynadepth_search.files.stored import Stored

__all__ = [
    "describe",
    "drift_notes",
    "fitted_on",
    "one_line",
    "plan_map",
    "remembered_prompts",
    "unrecorded_notes",
    "warm_up_notes",
    "who_took_part",
]

# Of the map of plans: the plans that most prompts got, and prompts of each.
_SHOWN_PLANS = 24
_SHOWN_PROMPTS = 2
# Of a prompt: its length in one line, and how much of it is looked at for that.
_SHOWN_LETTERS = 90
_READ_LETTERS = 2000


def drift_notes(drift: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say how far the mean depth drifts on prompts of another kind."""
    if not drift:
        return []
    shown = ", ".join(f"{row['depth']:.3f} for {show_budget(row['budget'])}" for row in drift)
    return [
        f"On {drift[0]['n']} prompts of another kind ({drift[0]['task']}), which took no part in the calibration, "
        f"the mean depth is {shown}."
    ]


def fitted_on(shortcuts: Shortcuts) -> list[str] | None:
    """Return the hashes of the prompts that shortcuts were fitted on; None if they do not say.

    Args:
        shortcuts: The shortcuts.

    Raises:
        ShortcutError: What they say is not a list of texts.
    """
    known = shortcuts.training.get("prompt_hashes")
    if known is None:
        return None
    if not isinstance(known, list) or not all(isinstance(each, str) for each in known):
        raise ShortcutError(
            f"prompt_hashes of the shortcuts is {str(known)[:60]!r}; expected a list of texts: fit them again"
        )
    return list(known)


def remembered_prompts(trained: TrainedPolicy) -> list[str] | None:
    """Return the hashes of the prompts that a policy learned from or that chose its plans; None if it has none."""
    known = [trained.training.get(key) for key in ("prompt_hashes", "plan_prompt_hashes")]
    lists = [each for each in known if isinstance(each, list)]
    return [name for each in lists for name in each] if lists else None


def who_took_part(
    sources: Mapping[str, TrainedPolicy], seen: Mapping[str, Iterable[str] | None]
) -> dict[str, Iterable[str] | None]:
    """Return the hashes of the prompts that took part in anything, by who remembers them; None: it does not say.

    Args:
        sources: Policies, by name.
        seen: The same of what else took part, by the user's name of it.

    Raises:
        CheckpointError: A policy's memory of its prompts is damaged.
    """
    policies = {}
    for name, trained in sources.items():
        what = f"the training of {name}"
        _check_remembered(what, trained)
        policies[what] = remembered_prompts(trained)
        if trained.shortcuts is not None:
            policies[f"the shortcuts of {name}"] = fitted_on(trained.shortcuts)
    return {**seen, **policies}


def _check_remembered(what: str, trained: TrainedPolicy) -> None:
    """Refuse a policy whose memory of its prompts is damaged: it would pass for one that has none."""
    advice = "train the policy again, or take the folder's own router_config.json"
    stored = Stored(
        dict(trained.training), f"what is said of {what}", advice, error=CheckpointError
    )
    for key, item in stored.mapping().items():
        if key in ("prompt_hashes", "plan_prompt_hashes"):
            item.texts()


def unrecorded_notes(names: Sequence[str]) -> list[str]:
    """Say of what it is not known which prompts took part in it, so that held-out ones may have."""
    if not names:
        return []
    return [
        f"It is not recorded which prompts took part in {', '.join(names)}: nobody has checked that none of the "
        "held-out ones did."
    ]


def describe(routers: TrainedPolicy) -> dict[str, Any]:
    """Return what kind of policy is under test."""
    described: dict[str, Any] = {"kind": routers.kind, "range": list(routers.calibration.range)}
    if routers.shortcuts is not None:
        described["shortcuts"] = f"rank {routers.shortcuts.rank}, {routers.shortcuts.digest}"
    if isinstance(routers, Routers):
        return described | {"preset": routers.config.preset, "shrinkage": routers.shrinkage}
    recipe = routers.training.get("recipe")
    return described | (dict(recipe) if isinstance(recipe, Mapping) else {})


def plan_map(plans: Plans, examples: Sequence[Example]) -> dict[str, Any]:
    """Return which plans were given to how many prompts, with a few of the prompts.

    Args:
        plans: The plan of each prompt. Shape (prompts, num_layers), uint8.
        examples: The prompts.
    """
    different, inverse = np.unique(plans, axis=0, return_inverse=True)
    counts = np.bincount(inverse.reshape(-1), minlength=len(different))
    rows = []
    for index in np.argsort(-counts, kind="stable")[:_SHOWN_PLANS].tolist():
        prompts = np.flatnonzero(inverse.reshape(-1) == index)[:_SHOWN_PROMPTS].tolist()
        rows.append(
            {
                "plan": plan_text(different[index]),
                "depth": float(plan_depth(different[index])),
                "share": float(counts[index] / counts.sum()),
                "examples": [one_line(examples[prompt].prompt) for prompt in prompts],
            }
        )
    return {"different_plans": len(different), "rows": rows}


def one_line(text: str) -> str:
    """Return the beginning of a text in one line, without characters that a terminal or a page would obey."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text[:_READ_LETTERS])
    line = " ".join(plain.split())
    cut = len(line) > _SHOWN_LETTERS or len(text) > _READ_LETTERS
    return f"{line[: _SHOWN_LETTERS - 3]}..." if cut else line


def warm_up_notes(sources: Mapping[str, TrainedPolicy]) -> list[str]:
    """Say whose training ended inside its warm-up, from what the routers record of it."""
    notes = []
    for name, routers in sources.items():
        prompts = routers.training.get("train_prompts")
        try:
            recipe = TrainConfig.from_dict(routers.training.get("recipe"))
        except ConfigError:
            continue  # routers need not record it
        if not isinstance(prompts, int):
            continue
        used = prompts - round(recipe.held_out * prompts)
        steps = recipe.epochs * math.ceil(used / recipe.batch_size)
        if steps <= recipe.warmup_steps:
            notes.append(
                f"The training of {name} ended inside its warm-up: {steps} steps on {used} prompts, "
                f"{recipe.warmup_steps} steps of warm-up."
            )
    return notes

"""What workers do for an evaluation: they score the plans of one prompt, by itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.errors import RunnerError, SearchError
from dynadepth.models.fingerprint import fingerprint, fingerprint_digest
from dynadepth.plans import Plans, parse_plan, plan_text
from dynadepth_search.data.tasks import ChatForm, Example
from dynadepth_search.runners.work import Loaded
from dynadepth_search.scoring.scorer import Scorer
from dynadepth_search.storage.compatibility import dtype_name, shortcut_fields

__all__ = ["OutcomeJob", "OutcomeWork", "outcome_conditions", "score_outcomes"]


def outcome_conditions(scorer: Scorer, kind: str) -> dict[str, Any]:
    """Return what outcomes depend on besides prompt and plan, as values that JSON knows.

    The fingerprint is the same in every dtype; the outcomes are not. Outcomes of both objectives are kept, so none is
    named here. How a prompt is read is part of its own name in the file.

    Args:
        scorer: Of the base model.
        kind: Of the prompts; which ones there are does not matter.
    """
    model = scorer.model
    return {
        "base_model": fingerprint_digest(fingerprint(model)),
        "num_layers": scorer.num_layers,
        "dtype": dtype_name(model),
        "device": model.device.type,
        "kind": kind,
        "limits": scorer.limits,
        **shortcut_fields(scorer.shortcuts),
    }


@dataclass(frozen=True, slots=True)
class OutcomeJob:
    """A prompt and the plans to score it under.

    Args:
        example: The prompt.
        plans: One digit for each layer.
    """

    example: Example
    plans: list[str]


@dataclass(frozen=True, slots=True, eq=False)
class OutcomeWork:
    """Scores prompts under plans.

    Args:
        scoring: How choices are scored, see `Task`.
        chat: The chat form of the prompts, see `Task`.
        metrics: Which figures are wanted.
        conditions: What `outcome_conditions` returns in the driver; a worker where they differ is refused.
        plain: Leave out the shortcuts that are loaded.
    """

    scoring: str
    chat: ChatForm | None
    metrics: tuple[str, ...]
    conditions: dict[str, Any]
    plain: bool

    def start(self, loaded: Loaded) -> Callable[[OutcomeJob], dict[str, list[float]]]:
        """Return what scores a prompt.

        Raises:
            RunnerError: Outcomes of this process would not be those of the driver.
        """
        scorer = Scorer(
            loaded.model,
            loaded.tokenizer,
            self.scoring,
            chat=self.chat,
            shortcuts=None if self.plain else loaded.shortcuts,
        )
        here = outcome_conditions(scorer, self.conditions["kind"])
        for name, there in self.conditions.items():
            if here.get(name) != there:
                raise RunnerError(
                    f"outcomes are kept for {name} {there}, as in the driver, but a worker has {here.get(name)}; give "
                    "the driver a --device of the workers' kind"
                )
        return lambda job: score_outcomes(scorer, job.example, job.plans, self.metrics)


def score_outcomes(
    scorer: Scorer, example: Example, texts: list[str], metrics: tuple[str, ...]
) -> dict[str, list[float]]:
    """Return the figures of a prompt under some plans, by metric.

    Args:
        scorer: Of the base model; what it has cached is forgotten.
        example: The prompt.
        texts: The plans, one digit for each layer.
        metrics: Which figures are wanted.

    Raises:
        SearchError: A reward is not a finite number.
    """
    # They depend on this prompt alone, whatever was scored before it.
    scorer.forget()
    plans = np.stack([parse_plan(text, scorer.num_layers) for text in texts])
    outcomes = scorer.outcomes([example], plans, np.zeros(len(plans), dtype=np.int64))
    _check_finite(example, plans, outcomes.preserve)
    if "reward" in metrics:
        _check_finite(example, plans, outcomes.reward)
    found = {
        "reward": outcomes.reward,
        "preserve": outcomes.preserve,
        "agreement": outcomes.agrees.astype(np.int64),
        "accuracy": outcomes.correct.astype(np.int64),
    }
    return {metric: found[metric].tolist() for metric in metrics}


def _check_finite(item: Example, plans: Plans, rewards: npt.NDArray[np.float64]) -> None:
    broken = np.flatnonzero(~np.isfinite(rewards))
    if broken.size:
        raise SearchError(
            f"prompt {item.prompt[:40]!r} has reward {rewards[broken[0]]} under plan "
            f"{plan_text(plans[broken[0]])}; expected a finite number: load the model in another dtype"
        )

"""Several configurations write from the same prompts: how far their answers are the base model's, and at what cost."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynadepth.checkpoints.save_load import base_model_name
from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.checkpoints.trained_policy import TrainedPolicy
from dynadepth.errors import ConfigError
from dynadepth.evaluation.intervals import mean_interval
from dynadepth.exits.exit_forward import Exits
from dynadepth.plans import Plans, plan_depth
from dynadepth.proving.prove import proved_stack
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth.wrapping.skipping import skips_of
from dynadepth_search.comparing.configurations import Configuration
from dynadepth_search.data.splits import prompt_hashes
from dynadepth_search.data.tasks import Task
from dynadepth_search.evaluation.notes import who_took_part
from dynadepth_search.exits.judging.timing import Way, exits_way, times_over_base, wrapped_way
from dynadepth_search.exits.judging.written import (
    Written,
    base_texts,
    begins_alike,
    write_with_exits,
    write_with_plans,
)
from dynadepth_search.files.sealed import read_result, write_sealed
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.own_text import Text, score_texts
from dynadepth_search.scoring.runtime_checks import planned, wrapped
from dynadepth_search.scoring.scorer import Scorer

__all__ = ["COMPARISON_NAME", "compare", "read_comparison"]

COMPARISON_NAME = "comparison.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class _Contender:
    """A configuration whose policy is loaded.

    Attributes:
        name: Of the configuration.
        arguments: Of `wrap_model`.
        trained: The policy that it has, if it was trained.
        plans: The plan of each prompt; None with exits. Shape (prompts, num_layers), uint8.
        shortcuts: What is left in place of skipped layers.
    """

    name: str
    arguments: dict[str, Any]
    trained: TrainedPolicy | None
    plans: Plans | None
    shortcuts: Shortcuts | None

    def exits(self) -> Exits | None:
        """Return its exits at the beginning of their traffic; None if it plans prompts."""
        if not isinstance(self.trained, TrainedExits):
            return None
        dials = ("fidelity", "budget")
        return self.trained.exits(
            **{name: value for name, value in self.arguments.items() if name in dials}
        )


def compare(
    model: Any,
    tokenizer: Any,
    *,
    task: Task,
    configurations: Sequence[Configuration],
    folder: str | os.PathLike[str],
    new_tokens: int = 64,
    progress: Progress,
) -> dict[str, Any]:
    """Let a model write in several configurations, compare with its own text, and write `comparison.json`.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        tokenizer: Its tokenizer.
        task: The prompts; answers are not looked at.
        configurations: How it is wrapped, one or more, of different names.
        folder: Where the file goes.
        new_tokens: The most tokens of an answer.
        progress: Called with the stage, the number of finished steps and of all.

    Returns:
        The content of the file.

    Raises:
        ConfigError: There are no configurations, or two are the same.
        BudgetError, CheckpointError, PlanError, ShortcutError, UnsupportedModelError: As `wrap_model`, before anything
            is written.
        TaskError: A prompt cannot be encoded.
    """
    names = [each.name for each in configurations]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"configurations to compare are {names}; expected one or more, each given once"
        )
    scorer = Scorer(model, tokenizer, scoring=task.scoring, chat=task.chat)
    contenders = [_contender(model, scorer, task, each) for each in configurations]
    policies = {each.name: each.trained for each in contenders if each.trained is not None}
    took_part = who_took_part(policies, {})
    hashes = set(prompt_hashes(task.examples))
    prompts = [scorer.encode(example).prompt_ids for example in task.examples]
    own = base_texts(model, prompts, new_tokens=new_tokens, progress=progress)
    rows, written = [], []
    for contender in contenders:
        found = _written(model, contender, prompts, own, new_tokens, progress)
        written.append(found)
        rows.append(
            {
                "name": contender.name,
                "kind": "exits" if contender.plans is None else "plans",
                "passes": _passes(contender, found),
                "kept": mean_interval(found.kept).to_dict() if len(found.prompts) else None,
                "audited": found.audited,
                **_likeness(found, own),
                "by_place": _by_place(model, contender, own, progress),
            }
        )
    ways = {each.name: _way(model, each, new_tokens) for each in contenders}
    times = times_over_base(model, prompts, own, ways, new_tokens=new_tokens, progress=progress)
    for row in rows:
        time = times.get(row["name"])
        row["time"] = None if time is None else time.to_dict()
    content = {
        "schema_version": SCHEMA_VERSION,
        "model": base_model_name(model),
        "task": {"name": task.name, "prompts": len(prompts)},
        "new_tokens": new_tokens,
        # How many of the prompts took part in what is compared, by name.
        "took_part": {
            name: len(hashes.intersection(known or ())) for name, known in took_part.items()
        },
        "rows": rows,
        "answers": [_answer(tokenizer, own, written, row) for row in range(len(prompts))],
    }
    write_sealed(Path(folder) / COMPARISON_NAME, content)
    return content


def read_comparison(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `compare` wrote.

    Args:
        folder: Where it was written.

    Returns:
        The content.

    Raises:
        ConfigError: The file is damaged or of another version.
        FileNotFoundError: There is none.
    """
    return read_result(
        Path(folder) / COMPARISON_NAME,
        SCHEMA_VERSION,
        make_again="compare again",
        missing="make it with `dynadepth compare`",
    )


def _contender(model: Any, scorer: Scorer, task: Task, configuration: Configuration) -> _Contender:
    """Wrap the model once, so that whatever is refused is refused before anything takes time."""
    arguments = dict(configuration.arguments)
    with wrapped(model, **arguments) as inner:
        controller = inner.dynadepth
        trained = controller.trained
        leaves = isinstance(trained, TrainedExits)
        plans = None if leaves else planned(inner, scorer, task.examples)
        return _Contender(configuration.name, arguments, trained, plans, controller.shortcuts)


def _written(
    model: Any,
    contender: _Contender,
    prompts: Sequence[npt.NDArray[np.int64]],
    own: Sequence[Text],
    new_tokens: int,
    progress: Progress,
) -> Written:
    num_layers = proved_stack(model).num_layers
    if (exits := contender.exits()) is not None:
        return write_with_exits(
            model,
            prompts,
            own,
            exits,
            num_layers=num_layers,
            new_tokens=new_tokens,
            progress=progress,
        )
    return write_with_plans(
        model,
        prompts,
        own,
        num_layers=num_layers,
        new_tokens=new_tokens,
        progress=progress,
        **contender.arguments,
    )


def _passes(contender: _Contender, found: Written) -> float:
    """Return the mean depth of plans; with exits the mean passes, and 1 if no answer has a token to leave early."""
    if contender.plans is not None:
        return float(plan_depth(contender.plans).mean())
    return float(found.passes.mean()) if len(found.prompts) else 1.0


def _way(model: Any, contender: _Contender, new_tokens: int) -> Way:
    if (exits := contender.exits()) is not None:
        return exits_way(model, exits, new_tokens=new_tokens)
    return wrapped_way(model, new_tokens=new_tokens, **contender.arguments)


def _likeness(found: Written, own: Sequence[Text]) -> dict[str, Any]:
    """Return how far all answers are the base model's own, those of one token too."""
    begins = [begins_alike(each.text, base) for each, base in zip(found.produced, own, strict=True)]
    whole = [
        np.array_equal(each.text.ids, base.ids)
        for each, base in zip(found.produced, own, strict=True)
    ]
    return {
        "identical": mean_interval(np.array(whole, dtype=np.float64)).to_dict(),
        "common": {"median": float(np.median(begins)), "mean": float(np.mean(begins))},
    }


def _by_place(
    model: Any, contender: _Contender, own: Sequence[Text], progress: Progress
) -> dict[str, list[Any]] | None:
    """Return agreement and divergence at each new token of the base model's own text; None with exits.

    With exits the keys and values are the base model's own, so that they differ where a token leaves alone.
    """
    if contender.plans is None:
        return None
    stack = proved_stack(model)
    longest = max(len(text.places) for text in own)
    sums = np.zeros((3, longest))
    different, of = np.unique(contender.plans, axis=0, return_inverse=True)
    for number, plan in enumerate(different):
        progress(f"reading the base's text, {contender.name}", number, len(different))
        texts = [own[row] for row in np.flatnonzero(of == number).tolist()]
        skips = skips_of(contender.shortcuts, stack.num_layers)
        outcomes = score_texts(model, stack, texts, plan[None], skips=skips)
        agreement, divergence = outcomes.agreement[0], outcomes.divergence[0]
        there = ~np.isnan(agreement)
        width = agreement.shape[1]
        sums[0, :width] += np.nansum(agreement, axis=0)
        sums[1, :width] += np.nansum(divergence, axis=0)
        sums[2, :width] += there.sum(axis=0)
    return {
        "agreement": (sums[0] / sums[2]).tolist(),
        # None where logits overflow.
        "divergence": [
            each if math.isfinite(each) else None for each in (sums[1] / sums[2]).tolist()
        ],
        "answers": sums[2].astype(int).tolist(),
    }


def _answer(
    tokenizer: Any, own: Sequence[Text], written: Sequence[Written], row: int
) -> dict[str, Any]:
    """Return what was answered to one prompt; each answer in two parts: as the base model began, and then."""
    base = own[row]

    def said(ids: npt.NDArray[np.int64]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    answers = []
    for found in written:
        text = found.produced[row].text
        new = text.ids[text.prompt :]
        alike = begins_alike(text, base)
        beginning, whole = said(new[:alike]), said(new)
        # A character may be of several tokens.
        while not whole.startswith(beginning):
            alike -= 1
            beginning = said(new[:alike])
        answers.append([beginning, whole[len(beginning) :]])
    return {
        "prompt": said(base.ids[: base.prompt]),
        "base": said(base.ids[base.prompt :]),
        "answers": answers,
    }

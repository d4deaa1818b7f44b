"""The evaluation of late exits: what they keep and cost on held-out prompts, beside static plans of equal passes."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynadepth.checkpoints.trained_exits import TrainedExits
from dynadepth.checkpoints.trained_policy import TrainedPolicy
from dynadepth.errors import BudgetError, TaskError
from dynadepth.evaluation.intervals import mean_interval
from dynadepth.exits.exit_forward import Exits
from dynadepth.models.token_pieces import token_pieces
from dynadepth.shortcuts.maps import Shortcuts
from dynadepth_search.data.splits import check_held_out
from dynadepth_search.data.tasks import Task
from dynadepth_search.evaluation.notes import unrecorded_notes, who_took_part
from dynadepth_search.exits.judging.answered import judge_answers
from dynadepth_search.exits.judging.opponents import Opponent, Part, Pool, opponents_at
from dynadepth_search.exits.judging.timing import exits_way, times_over_base, wrapped_way
from dynadepth_search.exits.judging.written import (
    Written,
    base_texts,
    write_with_exits,
    write_with_plans,
)
from dynadepth_search.files.sealed import read_result, write_sealed
from dynadepth_search.progress import Progress
from dynadepth_search.scoring.own_text import Text
from dynadepth_search.scoring.scorer import Scorer

__all__ = ["EXIT_EVALUATION_NAME", "Promise", "evaluate_exits", "read_exit_evaluation"]

EXIT_EVALUATION_NAME = "exit_evaluation.json"
SCHEMA_VERSION = 2
# Answers that are shown.
_SHOWN = 3


class Promise(NamedTuple):
    """What is asked of exits.

    Attributes:
        dial: `fidelity` or `budget`, as `wrap_model` takes them.
        value: The share of kept tokens, below 1, or the mean passes.
    """

    dial: str
    value: float

    def of(self, exits: TrainedExits) -> Exits:
        """Return the exits at this promise, at the beginning of their traffic."""
        given: dict[str, Any] = {self.dial: self.value}
        return exits.exits(**given)

    def __str__(self) -> str:
        return f"{self.dial} {self.value:g}"


def evaluate_exits(
    model: Any,
    tokenizer: Any,
    *,
    heldout: Task,
    exits: TrainedExits,
    promises: Sequence[Promise],
    folder: str | os.PathLike[str],
    pool: Pool | None = None,
    shortcuts: Shortcuts | None = None,
    against: Mapping[str, TrainedPolicy] | None = None,
    seen: Mapping[str, Iterable[str] | None] | None = None,
    new_tokens: int = 64,
    progress: Progress,
) -> dict[str, Any]:
    """Let a model write with exits on, read the text again, and write `exit_evaluation.json`.

    The opponents of each promise have as many passes: the best mixture of static plans, chosen on other prompts, and
    other policies; they write and are read in the same way.

    Args:
        model: The unwrapped base model; it is unwrapped again afterwards.
        tokenizer: Its tokenizer.
        heldout: Prompts that trained and calibrated nothing; answers are not looked at.
        exits: The trained exits of this model.
        promises: What is asked of them.
        folder: Where the file goes.
        pool: Static plans and what they are worth on other prompts. Shapes (plans, num_layers) and (plans,). None: no
            opponent but the base model.
        shortcuts: What rows take in place of layers that static plans skip; None: nothing.
        against: Other policies, which plan prompts, by name; they are left out where they cannot have as many passes.
        seen: Hashes of prompts that took part in anything else, such as those that chose the static plans, by the
            user's name of it; None for what does not record them.
        new_tokens: The most tokens of an answer.
        progress: Called with the stage, the number of finished steps and of all.

    Returns:
        The content of the file.

    Raises:
        BudgetError: None of the promises is supported by the exits' held-out prompts.
        CheckpointError: A policy's memory of the prompts that trained it is damaged.
        TaskError: A held-out prompt took part in training or in choosing plans, or cannot be encoded; or no answer has
            more than one token.
        UnsupportedModelError: The model does not run late exits exactly.
    """
    # Before anything takes time.
    made, refused = _supported(exits, promises)
    took_part = who_took_part({"the exits": exits, **(against or {})}, seen or {})
    known = {name: hashes for name, hashes in took_part.items() if hashes is not None}
    check_held_out(heldout.examples, known)
    scorer = Scorer(
        model, tokenizer, scoring=heldout.scoring, chat=heldout.chat, shortcuts=shortcuts
    )
    prompts = [scorer.encode(example).prompt_ids for example in heldout.examples]
    own = base_texts(model, prompts, new_tokens=new_tokens, progress=progress)
    rows, written = [], []
    for promise in made:
        found = write_with_exits(
            model,
            prompts,
            own,
            promise.of(exits),
            num_layers=exits.num_layers,
            new_tokens=new_tokens,
            progress=progress,
        )
        if not len(found.prompts):
            raise TaskError(
                f"none of the {len(prompts)} answers has a token beside the first, so there is nothing to leave early; "
                "give prompts that are answered at length"
            )
        rows.append({**promise._asdict(), **_figures(found)})
        written.append(found)
    opponents = [
        opponents_at(row["passes"]["mean"], pool=pool, shortcuts=shortcuts, against=against or {})
        for row in rows
    ]
    parts = _parts(opponents)
    texts = {
        name: write_with_plans(
            model,
            prompts,
            own,
            num_layers=exits.num_layers,
            new_tokens=new_tokens,
            progress=progress,
            **part.arguments,
        )
        for name, part in parts.items()
    }
    ways = {
        str(promise): exits_way(model, promise.of(exits), new_tokens=new_tokens) for promise in made
    } | {
        name: wrapped_way(model, new_tokens=new_tokens, **part.arguments)
        for name, part in parts.items()
    }
    times = times_over_base(model, prompts, own, ways, new_tokens=new_tokens, progress=progress)
    for row, promise, (static, others) in zip(rows, made, opponents, strict=True):
        time = times.get(str(promise))
        row["time"] = None if time is None else time.to_dict()
        row["static"] = None if static is None else static.figures(texts, times)
        row["against"] = {
            name: None if each is None else each.figures(texts, times)
            for name, each in others.items()
        }
    answers = judge_answers(
        model,
        scorer,
        heldout.examples,
        exits,
        {str(promise): {promise.dial: promise.value} for promise in made},
        pool=pool,
        against=against or {},
        progress=progress,
    )
    for row, promise in zip(rows, made, strict=True):
        row["answers"] = answers.get(str(promise))
    content = {
        "schema_version": SCHEMA_VERSION,
        "model": exits.base_model,
        "task": {"name": heldout.name, "prompts": len(prompts)},
        "new_tokens": new_tokens,
        "num_layers": exits.num_layers,
        "exit_layers": [head.layer_idx for head in exits.heads],
        "window": exits.window,
        "answers": rows[0]["kept"]["n"],
        "rows": rows,
        "refused": refused,
        "notes": unrecorded_notes([name for name, hashes in took_part.items() if hashes is None]),
        "examples": _examples(tokenizer, own, written),
    }
    write_sealed(Path(folder) / EXIT_EVALUATION_NAME, content)
    return content


def read_exit_evaluation(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `evaluate_exits` wrote.

    Args:
        folder: Where it was written.

    Returns:
        The content.

    Raises:
        ConfigError: The file is damaged or of another version.
        FileNotFoundError: There is none.
    """
    return read_result(
        Path(folder) / EXIT_EVALUATION_NAME,
        SCHEMA_VERSION,
        make_again="evaluate again",
        missing="make it with `dynadepth eval`",
    )


def _parts(
    opponents: Sequence[tuple[Opponent | None, Mapping[str, Opponent | None]]],
) -> dict[str, Part]:
    """Return each way to write once, by its name."""
    return {
        part.name: part
        for static, others in opponents
        for opponent in (static, *others.values())
        if opponent is not None
        for part in opponent.parts
    }


def _supported(exits: TrainedExits, promises: Sequence[Promise]) -> tuple[list[Promise], list[str]]:
    """Return the promises that can be made, and why others cannot."""
    refusals = {promise: _refusal(exits, promise) for promise in promises}
    made = [promise for promise, error in refusals.items() if error is None]
    refused = [f"{promise}: {error}" for promise, error in refusals.items() if error is not None]
    if not made:
        raise BudgetError("; ".join(refused) or "no fidelity and no budget was given")
    return made, refused


def _refusal(exits: TrainedExits, promise: Promise) -> str | None:
    if promise.dial == "fidelity" and promise.value == 1:
        return "every token is verified, so that the text is the base model's own; give a share below 1"
    try:
        promise.of(exits)
    except BudgetError as error:
        return str(error)
    return None


def _figures(found: Written) -> dict[str, Any]:
    return {
        "passes": mean_interval(found.passes).to_dict(),
        "kept": mean_interval(found.kept).to_dict(),
        "identical": mean_interval(found.identical).to_dict(),
        "common": float(np.median(found.common)),
        "audited": found.audited,
    }


def _examples(
    tokenizer: Any, own: Sequence[Text], written: Sequence[Written]
) -> list[dict[str, Any]]:
    """Return some answers: the prompt, the base model's, and in pieces those with exits, one for each promise."""
    prompts = written[0].prompts
    examples = []
    for row in prompts[:: max(1, len(prompts) // _SHOWN)][:_SHOWN].tolist():
        text = own[row]
        examples.append(
            {
                "prompt": tokenizer.decode(text.ids[: text.prompt], skip_special_tokens=True),
                "base": tokenizer.decode(text.ids[text.prompt :], skip_special_tokens=True),
                "answers": [_pieces(tokenizer, found, row) for found in written],
            }
        )
    return examples


def _pieces(tokenizer: Any, found: Written, row: int) -> list[tuple[str, int]]:
    produced = found.produced[row]
    ids = produced.text.ids[produced.text.prompt :].tolist()
    return token_pieces(tokenizer, ids, produced.layers_run.tolist())

"""Which kind a folder is of, as the files in it say."""

import os
from pathlib import Path

from dynadepth.checkpoints.paths import CONFIG_NAME as ROUTERS
from dynadepth.checkpoints.paths import FOLDER_NAME
from dynadepth.errors import ConfigError
from dynadepth.shortcuts.save_load import CONFIG_NAME as SHORTCUTS
from dynadepth_search.comparing.comparing import COMPARISON_NAME
from dynadepth_search.evaluation.evaluating import EVALUATION_NAME
from dynadepth_search.exits.judging.evaluating import EXIT_EVALUATION_NAME
from dynadepth_search.search.static_files import MENU
from dynadepth_search.storage.label_manifest import MANIFEST as LABELS
from dynadepth_search.storage.score_store import MANIFEST as SCORES
from dynadepth_search.tuning.study_files import STUDY_NAME

__all__ = ["check_free", "kind_of"]

# The file that tells each kind, and the verb that writes it.
_KINDS = {
    "labels": (LABELS, "search prompts"),
    "scores": (SCORES, "score"),
    "routers": (ROUTERS, "train"),
    "evaluation": (EVALUATION_NAME, "eval"),
    "exit evaluation": (EXIT_EVALUATION_NAME, "eval"),
    "comparison": (COMPARISON_NAME, "compare"),
}
# Where a folder that stands for one holds it, and the file that tells it: a base model, the run of a demo.
_INSIDE = {"routers": (FOLDER_NAME, "config.json"), "evaluation": ("evaluation", "report.json")}
# What else this application writes, and who shows it.
_OTHERS = {
    MENU: "static plans: `dynadepth search static` prints what it found when it is run again, and `dynadepth inspect` "
    "shows the score table of its pool, in the folder `pool`",
    SHORTCUTS: "shortcuts: the README.md beside them says what each is worth",
    STUDY_NAME: "a study: `dynadepth tune` writes its report.html",
    "config.json": "a model without routers: `dynadepth check` shows whether it can be wrapped",
}


def check_free(folder: str | os.PathLike[str], kind: str) -> None:
    """Refuse to write one kind of result where another is, before it is worked for.

    Args:
        folder: Where it is to be written; it need not be there.
        kind: A kind that `kind_of` knows.

    Raises:
        ConfigError: It is a file, or holds another kind.
    """
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{place} is a file; give a folder for results and page")
    others = [each for each in _kinds_in(place) if each != kind]
    if others:
        raise ConfigError(
            f"{place} holds {_KINDS[others[0]][0]} already, which is of another kind; give each result a folder of its "
            "own"
        )


def kind_of(folder: str | os.PathLike[str]) -> tuple[str, Path]:
    """Find out what a folder holds.

    Args:
        folder: The folder; a base model stands for its `routers`, the run of a demo for its `evaluation`.

    Returns:
        `labels`, `scores`, `routers`, `evaluation`, `exit evaluation` or `comparison`, and the folder where they are.

    Raises:
        ConfigError: It is no folder, or holds none of these, or several.
        FileNotFoundError: There is no such folder.
    """
    place = Path(folder)
    if not place.exists():
        raise FileNotFoundError(f"there is no folder {place}; give one that {_writers()} wrote")
    if not place.is_dir():
        raise ConfigError(f"{place} is a file; give the folder that {_writers()} wrote")
    kinds = _kinds_in(place)
    if len(kinds) == 1:
        return kinds[0], place
    if kinds:
        named = " and ".join(_KINDS[kind][0] for kind in kinds)
        raise ConfigError(
            f"{place} holds {named}, so it is not clear what it is; keep each in a folder of its own"
        )
    for kind, (inner, beside) in _INSIDE.items():
        if (place / beside).is_file() and (place / inner / _KINDS[kind][0]).is_file():
            return kind, place / inner
    raise ConfigError(_nothing(place))


def _kinds_in(place: Path) -> list[str]:
    return [kind for kind, (name, _) in _KINDS.items() if (place / name).is_file()]


def _nothing(place: Path) -> str:
    looked = ", ".join(f"{name} ({kind})" for kind, (name, _) in _KINDS.items())
    said = f"{place} holds nothing that can be inspected; looked for {looked}"
    other = next((text for name, text in _OTHERS.items() if (place / name).is_file()), None)
    if other is not None:
        return f"{said}. It holds {other}"
    inside = sorted(each.name for each in place.iterdir() if each.is_dir() and _kinds_in(each))
    if inside:
        return f"{said}. Folders in it do: inspect {', '.join(inside[:5])}"
    return f"{said}; give a folder that {_writers()} wrote"


def _writers() -> str:
    *first, last = (f"`dynadepth {verb}`" for verb in dict.fromkeys(v for _, v in _KINDS.values()))
    return f"{', '.join(first)} or {last}"

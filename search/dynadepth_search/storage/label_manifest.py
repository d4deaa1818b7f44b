"""What a folder of labels was made with: its manifest, read and checked value by value."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dynadepth.errors import ConfigError, LabelError
from dynadepth.files import read_versioned_json
from dynadepth.tree_search.forest import EditPrior, SearchConfig
from dynadepth_search.files.stored import Stored
from dynadepth_search.storage.compatibility import (
    check_stored_fingerprint,
    check_stored_task,
    stored_config,
)

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "Manifest",
    "Shard",
    "answers_are_generated",
    "read_manifest",
    "shard_name",
]

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished file of labels.

    Args:
        name: Its name within the folder.
        sha256: SHA-256 of its bytes, in hexadecimal.
        prompts: Number of rows.
    """

    name: str
    sha256: str
    prompts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder of labels was made with; only the list of shards changes after it is written.

    Args:
        base_model: Fingerprint of the base model.
        num_layers: Its number of decoder layers.
        dtype: The dtype that it ran in.
        task: `name`, `kind`, `scoring`, `sha256` and `prompts`.
        search: The settings of the search, see `dynadepth_search.search.per_prompt_spec.PromptSearchSpec`.
        depth_penalty: Lambda of the labels' value, as given or as chosen by the probe.
        prior: What the probe measured.
        versions: Versions of the libraries that were used.
        shards: The finished shards, in order.
        shortcuts: The digest of the shortcuts that were in place of skipped layers; None: nothing was.
    """

    base_model: dict[str, Any]
    num_layers: int
    dtype: str
    task: dict[str, Any]
    search: dict[str, Any]
    depth_penalty: float
    prior: EditPrior
    versions: dict[str, str]
    shards: tuple[Shard, ...] = ()
    shortcuts: str | None = None

    @property
    def objective(self) -> str:
        """What the search maximised."""
        return str(self.search["objective"])

    @property
    def confirm(self) -> int:
        """Number of plans that were scored on variants, besides the identity; 0: none."""
        return int(self.search.get("confirm", 0))

    @property
    def generates(self) -> bool:
        """Whether answers were generated to confirm labels."""
        return answers_are_generated(self.task["kind"], self.objective, self.confirm)

    @property
    def margin(self) -> float:
        """Margin over the identity plan that a label needs."""
        return float(self.search.get("margin", 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as values that JSON can hold."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        shards = [
            {item.name: getattr(shard, item.name) for item in fields(Shard)}
            for shard in self.shards
        ]
        if self.shortcuts is None:
            del content["shortcuts"]
        return {
            "schema_version": SCHEMA_VERSION,
            **content,
            "prior": self.prior.to_dict(),
            "shards": shards,
        }


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"part-{number:05d}.parquet"


def answers_are_generated(kind: str, objective: str, confirm: int) -> bool:
    """Say whether a search confirms labels by generated answers.

    Args:
        kind: The kind of the task, see `Task`.
        objective: What is maximised.
        confirm: Number of plans that are confirmed, besides the identity; 0: none.
    """
    return kind == "solution" and objective == "reward" and confirm > 0


def read_manifest(folder: Path) -> Manifest:
    """Read what a folder of labels was made with.

    Raises:
        FileNotFoundError: There is no manifest.
        LabelError: It is damaged, or of another schema version.
    """
    path = folder / MANIFEST
    content = read_versioned_json(
        path, SCHEMA_VERSION, error=LabelError, make_again="run the search again in a new folder"
    )
    del content["schema_version"]
    stored = Stored(content, str(path), "run the search in a new folder")
    names = [item.name for item in fields(Manifest) if item.name != "shortcuts"]
    found = stored.fields(names, ["shortcuts"])
    check_stored_fingerprint(found["base_model"])
    check_stored_task(found["task"], named=True)
    _check_search(found["search"])
    for version in found["versions"].mapping().values():
        version.text()
    num_layers = found["num_layers"].whole(1)
    return Manifest(
        base_model=content["base_model"],
        num_layers=num_layers,
        dtype=found["dtype"].text(),
        task=content["task"],
        search=content["search"],
        depth_penalty=found["depth_penalty"].number(0),
        prior=_read_prior(found["prior"], num_layers),
        versions=content["versions"],
        shards=_read_shards(found["shards"], content["task"]["prompts"]),
        shortcuts=found["shortcuts"].hexadecimal(16) if "shortcuts" in found else None,
    )


def _check_search(stored: Stored) -> None:
    """Check the settings of a search; those that are newer than the folder are missing."""
    positive = (
        *("block_size", "blocks_per_shard", "max_logit_bytes"),
        *("variants", "own_tokens", "new_tokens"),
    )
    numbers = ("seed", "confirm", *positive)
    found = stored.fields(["objective", "config"], ["depth_penalty", "margin", "wording", *numbers])
    found["objective"].one_of(["preserve", "reward"])
    stored_config(found["config"], SearchConfig)
    for name in numbers:
        if name in found:
            found[name].whole(int(name in positive))
    if "margin" in found:
        found["margin"].number(0)
    if "wording" in found:
        found["wording"].text()
    if "depth_penalty" in found:
        found["depth_penalty"].optional(lambda item: item.number(0))


def _read_prior(stored: Stored, num_layers: int) -> EditPrior:
    found = stored.fields(["mean", "variance", "count"])
    for name, lowest in (("mean", None), ("variance", 0.0)):
        for item in found[name].entries(2 * num_layers):
            if item.value is not None:
                item.number(lowest)
    found["count"].whole(1)
    try:
        return EditPrior.from_dict(stored.value)
    except ConfigError as error:
        stored.damaged(str(error))


def _read_shards(stored: Stored, prompts: int) -> tuple[Shard, ...]:
    """Return the shards that a manifest names: files of its own folder, each once, with prompts of its task."""
    shards: list[Shard] = []
    for item in stored.entries():
        found = item.fields(["name", "sha256", "prompts"])
        name = found["name"].text()
        if not _is_shard_name(name, prompts):
            found["name"].wrong(f"a file of the folder, such as {shard_name(0)}")
        if name in {shard.name for shard in shards}:
            item.damaged(f"{name} is named twice; expected each shard once")
        shards.append(
            Shard(name, found["sha256"].hexadecimal(64), found["prompts"].whole(1, prompts))
        )
    if sum(shard.prompts for shard in shards) > prompts:
        stored.damaged(f"its shards hold more prompts than the {prompts} of its task")
    return tuple(shards)


def _is_shard_name(name: str, count: int) -> bool:
    """Say whether a name is one of the first shards'; the count is read from disk, so nothing is made of its size."""
    digits = name.removeprefix("part-").removesuffix(".parquet")
    # Python refuses to convert very long ones.
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 20:
        return False
    number = int(digits)
    return number < count and name == shard_name(number)

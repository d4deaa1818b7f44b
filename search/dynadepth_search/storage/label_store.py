"""Writing labels so that a kill at any moment loses no finished prompt.

A finished prompt is written to the journal at once. When all prompts of a shard are there, the shard is
written, then named in the manifest, then its prompts are removed from the journal: wherever this is
interrupted, every finished prompt is in the journal or in a shard that the manifest names. A shard holds a
fixed range of the task's prompts in their order, so that labels are equal byte for byte however often the
search was killed.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynadepth.errors import LabelError
from dynadepth.files import sha256_file, write_bytes_atomic, write_json_atomic
from dynadepth_search.files.journal import Journal
from dynadepth_search.storage.label_manifest import (
    MANIFEST,
    Manifest,
    Shard,
    read_manifest,
    shard_name,
)
from dynadepth_search.storage.labels import JOURNAL, check_shard, read_unfinished, shard_bytes

__all__ = ["LabelStore"]


class LabelStore:
    """A folder of labels that is being written; the caller holds its lock (`locked`) meanwhile.

    Args:
        folder: The folder of the labels.
        prompt_ids: The ids of all prompts of the task, in order.
        shard_size: Number of prompts of a shard.

    Raises:
        LabelError: The content of the folder is damaged.
    """

    def __init__(
        self, folder: str | os.PathLike[str], prompt_ids: Sequence[str], shard_size: int
    ) -> None:
        self.folder = Path(folder)
        self._shards = [
            tuple(prompt_ids[i : i + shard_size]) for i in range(0, len(prompt_ids), shard_size)
        ]
        self._finished: dict[str, Shard] = {}
        self._journal = Journal(self.folder / JOURNAL)
        self._rows: dict[str, dict[str, Any]] = {}
        self.manifest: Manifest | None = None
        if (self.folder / MANIFEST).exists():
            self.manifest = read_manifest(self.folder)
        elif (self.folder / JOURNAL).exists() or any(self.folder.glob("part-*.parquet")):
            raise LabelError(
                f"{self.folder} holds labels but no {MANIFEST}, so nothing says what they were made with: "
                "put it back, or search into another folder"
            )
        self._place = {prompt: index for index, prompt in enumerate(prompt_ids)}

    def create(self, manifest: Manifest) -> None:
        """Start a new folder."""
        self._write_manifest(manifest)

    def open(self) -> None:
        """Continue a folder whose manifest has been checked.

        A shard that was deleted counts as never written.

        Raises:
            LabelError: A shard or the journal is damaged, or a row belongs to no prompt of the task.
        """
        manifest = self._known()
        rows, length = read_unfinished(self.folder, manifest)
        self._journal = Journal(self.folder / JOURNAL, length)
        for litter in self.folder.glob(".*.tmp"):
            # Remains of a file that was being written under a temporary name when the writer was killed.
            litter.unlink(missing_ok=True)
        sizes = {shard_name(number): len(prompts) for number, prompts in enumerate(self._shards)}
        for shard in manifest.shards:
            if sizes.get(shard.name) != shard.prompts:
                raise LabelError(
                    f"{self.folder / MANIFEST} is damaged ({shard.name} has {shard.prompts} prompts; expected "
                    f"{sizes.get(shard.name, 'no such shard')}): run the search in a new folder"
                )
            if (self.folder / shard.name).exists():
                check_shard(self.folder, shard)
                self._finished[shard.name] = shard
        for row in rows:
            prompt = row["prompt_id"]
            if prompt not in self._place:
                raise LabelError(
                    f"{self.folder / JOURNAL} holds prompt {prompt}, which the task has not; it was altered: "
                    "remove that line"
                )
            if row["index"] != self._place[prompt]:
                raise LabelError(
                    f"{self.folder / JOURNAL} holds prompt {prompt} with index {row['index']}; expected "
                    f"{self._place[prompt]}, its place in the task: remove that line"
                )
            self._rows[prompt] = row

    @property
    def done(self) -> frozenset[str]:
        """The ids of all prompts that have a label on disk."""
        return self._stored().union(self._rows)

    def append(self, row: dict[str, Any]) -> None:
        """Store a finished prompt; it is on disk when this returns."""
        self._journal.append(row)
        self._rows[row["prompt_id"]] = row

    def compact(self) -> None:
        """Write every shard whose prompts are all in the journal, and remove these from the journal."""
        for number, prompts in enumerate(self._shards):
            name = shard_name(number)
            if name in self._finished or any(prompt not in self._rows for prompt in prompts):
                continue
            path = self.folder / name
            write_bytes_atomic(path, shard_bytes([self._rows[prompt] for prompt in prompts]))
            self._finished[name] = Shard(name, sha256_file(path), len(prompts))
        manifest = self._known()
        shards = tuple(self._finished[name] for name in sorted(self._finished))
        if shards != manifest.shards:
            self._write_manifest(replace(manifest, shards=shards))
        stored = self._stored()
        if not stored.isdisjoint(self._rows):
            self._rows = {prompt: row for prompt, row in self._rows.items() if prompt not in stored}
            self._journal.replace(self._rows.values())

    def _stored(self) -> frozenset[str]:
        """The ids of the prompts in the shards that the manifest names."""
        return frozenset(
            prompt
            for number, prompts in enumerate(self._shards)
            if shard_name(number) in self._finished
            for prompt in prompts
        )

    def _known(self) -> Manifest:
        if self.manifest is None:
            raise LabelError(f"{self.folder} has no {MANIFEST} yet")
        return self.manifest

    def _write_manifest(self, manifest: Manifest) -> None:
        write_json_atomic(self.folder / MANIFEST, manifest.to_dict())
        self.manifest = manifest

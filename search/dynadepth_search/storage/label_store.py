"""Writing labels so that a kill at any moment loses no finished prompt.

A finished prompt is written to the journal at once. When all prompts of a shard are there, the shard is
written, then named in the manifest, then its prompts are removed from the journal: wherever this is
interrupted, every finished prompt is in the journal or in a shard that the manifest names. A shard holds a
fixed range of the task's prompts in their order, so that labels are equal byte for byte however often the
search was killed.
"""

import os
from collections import Counter
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
        self._shard_size = shard_size
        self._finished: dict[str, Shard] = {}
        self._journal = Journal(self.folder / JOURNAL)
        # What the journal holds, and how many prompts of each shard are there.
        self._rows: dict[str, dict[str, Any]] = {}
        self._counts: Counter[int] = Counter()
        self._done: set[str] = set()
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
        known = {shard_name(number): prompts for number, prompts in enumerate(self._shards)}
        for shard in manifest.shards:
            expected = len(known[shard.name]) if shard.name in known else "no such shard"
            if expected != shard.prompts:
                raise LabelError(
                    f"{self.folder / MANIFEST} is damaged ({shard.name} has {shard.prompts} prompts; expected "
                    f"{expected}): run the search in a new folder"
                )
            if (self.folder / shard.name).exists():
                check_shard(self.folder, shard)
                self._finished[shard.name] = shard
                self._done.update(known[shard.name])
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
            self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        """Remember a row of the journal."""
        prompt = row["prompt_id"]
        self._rows[prompt] = row
        self._counts[self._place[prompt] // self._shard_size] += 1
        self._done.add(prompt)

    @property
    def done(self) -> frozenset[str]:
        """The ids of all prompts that have a label on disk."""
        return frozenset(self._done)

    @property
    def num_done(self) -> int:
        """Number of prompts that have a label on disk."""
        return len(self._done)

    def holds(self, prompt_id: str) -> bool:
        """Say whether a prompt has a label on disk."""
        return prompt_id in self._done

    def append(self, *rows: dict[str, Any]) -> None:
        """Store finished prompts, none of which has a label yet; they are on disk when this returns."""
        if rows:
            self._journal.append(*rows)
        for row in rows:
            self._take(row)

    def compact(self) -> None:
        """Write every shard whose prompts are all in the journal, and remove these from the journal.

        What it costs depends on what is new, not on how many shards there are, but for the manifest.
        """
        full = sorted(
            number
            for number, count in self._counts.items()
            if count == len(self._shards[number]) and shard_name(number) not in self._finished
        )
        for number in full:
            path = self.folder / shard_name(number)
            rows = [self._rows[prompt] for prompt in self._shards[number]]
            write_bytes_atomic(path, shard_bytes(rows))
            self._finished[path.name] = Shard(path.name, sha256_file(path), len(rows))
        manifest = self._known()
        if full or len(self._finished) != len(manifest.shards):
            shards = tuple(self._finished[name] for name in sorted(self._finished))
            self._write_manifest(replace(manifest, shards=shards))
        # Those too that an earlier run did not come to remove.
        stored = [number for number in self._counts if shard_name(number) in self._finished]
        for number in stored:
            del self._counts[number]
            for prompt in self._shards[number]:
                self._rows.pop(prompt, None)
        if stored:
            self._journal.replace(self._rows.values())

    def _known(self) -> Manifest:
        if self.manifest is None:
            raise LabelError(f"{self.folder} has no {MANIFEST} yet")
        return self.manifest

    def _write_manifest(self, manifest: Manifest) -> None:
        write_json_atomic(self.folder / MANIFEST, manifest.to_dict())
        self.manifest = manifest

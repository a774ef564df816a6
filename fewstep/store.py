"""Rows of tensors in a folder of safetensors shards, made shard by shard: a killed command goes on where it was.

FOLDER/shard-00000.safetensors, .. and index.json: the recipe, the number of rows, and the SHA-256 of every finished
shard. A shard is made whole from its own rows and never from what was made before it, and no file holds a date: however
often the work was interrupted, the bytes are those of work that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import reading
from fewstep.core.errors import UserError
from fewstep.train import processes
from fewstep.train.checkpoint import sha256, write_state, write_text

INDEX = "index.json"

Make = Callable[[Tensor, Callable[[int], object]], dict[str, Tensor]]


class Sharded:
    """A tensor (N, *S) in several files; rows are read from disk when they are picked."""

    def __init__(self, parts: Sequence[Tensor]):
        self.parts, self.shape = parts, torch.Size((sum(map(len, parts)), *parts[0].shape[1:]))
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """The rows (B, *S) of `rows` (B,); every shard but the last has as many as the first."""
        each = len(self.parts[0])
        return torch.stack([self.parts[row // each][row % each] for row in rows.tolist()])


@dataclass(frozen=True)
class Store:
    """`count` rows in `folder`, `rows` of them a shard, by `recipe`: JSON of everything that decides what they are."""

    folder: Path
    recipe: str
    count: int
    rows: int

    def names(self) -> list[str]:
        return [f"shard-{number:05d}.safetensors" for number in range(-(-self.count // self.rows))]

    def index(self) -> dict[str, Any] | None:
        """What is known of the folder, None where nothing can be."""
        try:
            index = reading.fields(self.folder / INDEX)
        except UserError:
            return None
        known = {"recipe", "count"} <= index.keys()
        return index if known and isinstance(index.get("shards"), dict) else None

    def ours(self) -> bool:
        """Whether what lies in the folder, finished or not, was made by this recipe."""
        index = self.index()
        return index is not None and index["recipe"] == json.loads(self.recipe) and index["count"] == self.count

    def finished(self) -> bool:
        """Whether all shards are there; that their bytes are those that were written is looked at by `fill`."""
        if not self.ours() or sorted(self.index()["shards"]) != self.names():  # type: ignore[index]
            return False
        try:
            self.shards()
        except UserError:
            return False
        return True

    def fill(self, make: Make, progress: Callable[[int], object]) -> None:
        """Makes what is missing; `make(rows, progress)` gives the tensors of consecutive rows and tells its progress.

        All processes make them together, for each may hold only a part of a teacher; the leader writes them.
        Finished shards whose bytes are not what was written are made again, and all where the recipe was another.
        Raises UserError where the folder cannot be written.
        """
        whole = processes.from_leader(self._whole)
        try:
            if processes.leads():
                self.folder.mkdir(exist_ok=True)  # never again, nor the one above: whatever is removed stays so
            self._write_index(whole)
            for name, rows in zip(self.names(), torch.arange(self.count).split(self.rows), strict=True):
                if name in whole:
                    progress(len(rows))
                    continue
                whole[name] = self._write(name, make(rows, progress))
                self._write_index(whole)
            processes.wait()
        except OSError as error:
            raise UserError(
                f"{self.folder} could not be written ({error.strerror or error}): make room and start the same "
                f"command again, {len(whole)} of {len(self.names())} shards are finished and stay"
            ) from None

    def _whole(self) -> dict[str, str]:
        """Name -> SHA-256 of the finished shards that hold what was written."""
        known = self.index()["shards"] if self.ours() else {}  # type: ignore[index]
        files = {name: self.folder / name for name in self.names() if name in known}
        return {name: known[name] for name, file in files.items() if file.is_file() and sha256(file) == known[name]}

    def _write(self, name: str, tensors: dict[str, Tensor]) -> str:
        if not processes.leads():
            return ""
        aside = self.folder / f"{name}.partial"
        aside.unlink(missing_ok=True)  # it may be a link
        try:
            write_state(aside, tensors)
            digest = sha256(aside)
            os.replace(aside, self.folder / name)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        return digest

    def _write_index(self, shards: dict[str, str]) -> None:
        if not processes.leads():
            return
        index = {"recipe": json.loads(self.recipe), "count": self.count, "shards": shards}
        if index == self.index():
            return
        write_text(self.folder / INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")

    def shards(self) -> list[dict[str, Tensor]]:
        """The tensors of each shard, mapped: they are read from disk where they are looked at.

        Raises UserError for a shard that is not there, or that does not fit the others.
        """
        shards = [reading.tensors(self.folder / name) for name in self.names()]
        first = {name: (value.shape[1:], value.dtype) for name, value in shards[0].items()}
        for file, shard, rows in zip(self.names(), shards, torch.arange(self.count).split(self.rows), strict=True):
            held = {name: (value.shape[1:], value.dtype) for name, value in shard.items()}
            if held != first or any(value.ndim < 1 or len(value) != len(rows) for value in shard.values()):
                raise UserError(f"{self.folder / file} does not hold {len(rows)} rows of what the others hold")
        return shards

    def tensors(self) -> dict[str, Sharded]:
        shards = self.shards()
        return {name: Sharded([shard[name] for shard in shards]) for name in shards[0]}

    def read(self) -> dict[str, Tensor]:
        """All rows in memory."""
        shards = self.shards()
        return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}

"""Where samples come from, by the name that a config gives: worlds, prompts, noise alone, or pictures on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fewstep import reading
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.data.base import Source, checksum, shuffled
from fewstep.data.captioned import CaptionedScenes
from fewstep.data.folder import FolderSource
from fewstep.data.scenes import LABELS, Scenes, caption
from fewstep.data.shards import ShardSource, holds_shards
from fewstep.data.table import TableSource, holds_table

_LONGEST = 4096
HELD_OUT = 40_000
"""seed of the scenes that no training sees"""


class SceneSource(Source):
    """The endless procedural world; see `fewstep.data.scenes`."""

    labels, world = LABELS, "scenes"

    def __init__(self, resolution: int, seed: int):
        self.resolution, self.scenes = resolution, Scenes(resolution, seed)

    def label_of(self, ids: Tensor) -> Tensor:
        return Draw(self.scenes.seed, 0, ids).integers("scenes.label", len(LABELS))

    def images(self, ids: Tensor) -> Tensor:
        return self.scenes.sample(ids).images

    def captions(self, ids: Tensor) -> list[str]:
        return [caption(row) for row in self.scenes.sample(ids).attributes]

    def held_out(self) -> SceneSource:
        return SceneSource(self.resolution, HELD_OUT)


class CaptionedSource(Source):
    """One or two objects and a sentence about them; see `fewstep.data.captioned`."""

    labels, world = (), "captioned"

    def __init__(self, resolution: int, seed: int):
        self.resolution, self.scenes = resolution, CaptionedScenes(resolution, seed)

    def label_of(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids)

    def images(self, ids: Tensor) -> Tensor:
        return self.scenes.images(ids)

    def captions(self, ids: Tensor) -> list[str]:
        return self.scenes.captions(ids)

    def held_out(self) -> CaptionedSource:
        return CaptionedSource(self.resolution, HELD_OUT)


class NoiseSource(Source):
    """Nothing but samples without end, for methods without data. Raises UserError where images are asked for."""

    has_images = False
    labels = ()

    def __init__(self, resolution: int, seed: int):
        self.resolution = resolution

    def label_of(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids)

    def images(self, ids: Tensor) -> Tensor:
        raise UserError("data.source=noise has no images, but this run reads some: name a folder of them")


class PromptSource(Source):
    """A text file with a prompt a line, for methods without data; each epoch has an order of its own.

    Raises UserError for a file without prompts or that is no UTF-8 text, and when images are asked for.
    """

    has_images = False
    labels = ()

    def __init__(self, file: str | Path, resolution: int, seed: int):
        self.file, self.resolution, self.seed = Path(file), resolution, seed
        lines = reading.text(self.file, reading.LINES).splitlines()
        self.prompts = [line.strip() for line in lines if line.strip()]
        if not self.prompts:
            raise UserError(f"data.source={file} has no prompt: write one a line")

    @property
    def epoch(self) -> int:
        return len(self.prompts)

    def checksum(self) -> str:
        return checksum("\n".join(self.prompts).encode())

    def label_of(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids)

    def images(self, ids: Tensor) -> Tensor:
        raise UserError(f"data.source={self.file} holds prompts alone, but this objective learns from images")

    def captions(self, ids: Tensor) -> list[str]:
        return [self.prompts[row] for row in shuffled(ids, len(self.prompts), self.seed, "prompts.order").tolist()]


WORLDS: dict[str, type[SceneSource] | type[CaptionedSource] | type[NoiseSource]] = {
    "scenes": SceneSource,
    "captioned": CaptionedSource,
    "noise": NoiseSource,
}


def open_source(source: str, resolution: int, seed: int) -> Source:
    """One of `WORLDS`, a text file of prompts, WebDataset shards, a folder of `datasets`, or a folder of images.

    Raises UserError where there is nothing of the kind, or nothing in it that can be read.
    """
    if not reading.there(Path(source)) and (len(source) > _LONGEST or "\0" in source):
        raise UserError(f"data.source={reading.shown(source, 80)} is no path: it is too long or holds a NUL")
    if source in WORLDS:
        return WORLDS[source](resolution, seed)
    if source.endswith(".txt"):
        return PromptSource(source, resolution, seed)
    if holds_shards(source):
        return ShardSource(source, resolution, seed)
    if holds_table(source):
        return TableSource(source, resolution, seed)
    if not Path(source).is_dir():
        raise UserError(
            f"data.source is {', '.join(WORLDS)}, a .txt file of prompts, .tar shards or a folder of images, and there "
            f"is no folder {source}"
        )
    return FolderSource(source, resolution, seed)

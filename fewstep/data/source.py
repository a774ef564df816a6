"""Where images and labels come from: sample `id` of a run is always the same image."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.data.captioned import CaptionedScenes
from fewstep.data.scenes import LABELS, Scenes, caption

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HELD_OUT = 40_000
"""seed of the scenes that no training sees"""
UNREADABLE = "left out because they could not be read"
UNLABELLED = "left out because they lie beside the class folders and so have no label"
NO_CAPTION = "not used as captions because they are no UTF-8 text that could be read"


class Source(ABC):
    """Images (B, 3, H, W) float32 in [-1, 1] with labels (B,) int64 and captions; `labels` are names, () for none."""

    resolution: int
    labels: tuple[str, ...]
    size: int | None = None
    """how many images there are, None for a world without end"""

    @abstractmethod
    def label_of(self, ids: Tensor) -> Tensor:
        """Labels (B,) of the samples `ids` (B,), without making the images."""

    @abstractmethod
    def images(self, ids: Tensor) -> Tensor:
        """The images (B, 3, H, W) of the samples `ids` (B,)."""

    def captions(self, ids: Tensor) -> list[str]:
        """What a network that reads prompts is told of the samples `ids` (B,): the name of the label, or nothing."""
        return [self.labels[label] if self.labels else "" for label in self.label_of(ids).tolist()]

    def checksum(self) -> str:
        """Of what may change while its name stays: the files of a folder, the lines of a text. "" for a world."""
        return ""

    def held_out(self) -> Source:
        """The same world without what the training sees; a finite source has nothing else than itself."""
        return self


class SceneSource(Source):
    """The endless procedural world; see `fewstep.data.scenes`."""

    labels = LABELS

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

    labels = ()

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


class FolderSource(Source):
    """A folder of images, centre-cropped and resized; class sub-folders, in sorted order, give the labels.

    A text file beside an image, of the same name, is its caption; an image without one has the name of its label.
    Every epoch visits each image once in an order of its own. Files of no use are left out: `skipped` names them, by
    the reason. Raises UserError when no image is left.
    """

    def __init__(self, folder: str | Path, resolution: int, seed: int):
        root = Path(folder)
        if not root.is_dir():
            raise UserError(
                f"data.source is {', '.join(WORLDS)}, a .txt file of prompts or a folder of images, and there is no "
                f"folder {folder}"
            )
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
        self.resolution, self.seed, self.labels = resolution, seed, tuple(classes)
        self.skipped: dict[str, list[Path]] = {}
        kept: list[Tensor] = []
        labels: list[int] = []
        self._captions: list[str] = []
        for file in files:
            if classes and file.parent == root:
                self._skip(UNLABELLED, file)
                continue
            image = self._read(file)
            if image is None:
                self._skip(UNREADABLE, file)
                continue
            kept.append(image)
            labels.append(classes.index(file.relative_to(root).parts[0]) if classes else 0)
            self._captions.append(self._caption(file) or (classes[labels[-1]] if classes else ""))
        if not kept:
            found = ", ".join(f"files {why} ({len(skipped)})" for why, skipped in self.skipped.items())
            nothing = f"no {', '.join(SUFFIXES)} file there"
            raise UserError(f"the image folder {folder} is of no use: {found or nothing}")
        self._images, self._labels = torch.stack(kept), torch.tensor(labels)
        self.size = len(kept)

    def _skip(self, why: str, file: Path) -> None:
        self.skipped.setdefault(why, []).append(file)

    def _caption(self, file: Path) -> str:
        """The text beside an image, "" where there is none or it is no UTF-8."""
        text = file.with_suffix(".txt")
        try:
            return " ".join(text.read_text(encoding="utf-8-sig").split()) if text.is_file() else ""
        except (OSError, UnicodeDecodeError):
            self._skip(NO_CAPTION, text)
            return ""

    def _read(self, file: Path) -> Tensor | None:
        """(3, H, W) uint8, or None for a file that is no whole image."""
        try:
            with Image.open(file) as opened:
                image = transforms.pil_to_tensor(opened.convert("RGB"))
        except (OSError, SyntaxError, ValueError):
            return None
        side = min(image.shape[1:])
        image = transforms.center_crop(image, [side, side])
        return transforms.resize(image, [self.resolution, self.resolution], antialias=True)

    def checksum(self) -> str:
        told = "\n".join([*self._captions, *map(str, self._labels.tolist())])
        return _checksum(told.encode(), self._images.numpy())

    def _rows(self, ids: Tensor) -> Tensor:
        return shuffled(ids, len(self._images), self.seed, "folder.order")

    def label_of(self, ids: Tensor) -> Tensor:
        return self._labels[self._rows(ids)]

    def images(self, ids: Tensor) -> Tensor:
        return self._images[self._rows(ids)].float() / 127.5 - 1

    def captions(self, ids: Tensor) -> list[str]:
        return [self._captions[row] for row in self._rows(ids).tolist()]


class PromptSource(Source):
    """A text file with a prompt a line, for methods without data; each epoch has an order of its own.

    Raises UserError for a file without prompts or that is no UTF-8 text, and when images are asked for.
    """

    labels = ()

    def __init__(self, file: str | Path, resolution: int, seed: int):
        self.file, self.resolution, self.seed = Path(file), resolution, seed
        try:
            lines = self.file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise UserError(f"the prompts of data.source={file} cannot be read: {reason}") from None
        self.prompts = [line.strip() for line in lines if line.strip()]
        if not self.prompts:
            raise UserError(f"data.source={file} has no prompt: write one a line")

    def checksum(self) -> str:
        return _checksum("\n".join(self.prompts).encode())

    def label_of(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids)

    def images(self, ids: Tensor) -> Tensor:
        raise UserError(f"data.source={self.file} holds prompts alone, but this objective learns from images")

    def captions(self, ids: Tensor) -> list[str]:
        return [self.prompts[row] for row in shuffled(ids, len(self.prompts), self.seed, "prompts.order").tolist()]


def _checksum(*parts: Any) -> str:
    """Of bytes, one buffer after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def shuffled(ids: Tensor, count: int, seed: int, purpose: str) -> Tensor:
    """Rows (B,) below `count` for the samples `ids` (B,): every epoch visits each row once, in its own order."""
    epochs, places = ids // count, ids % count
    rows = torch.empty_like(ids)
    for epoch in epochs.unique():
        order = Draw(seed, int(epoch), torch.arange(count)).uniform(purpose).argsort()
        mine = epochs == epoch
        rows[mine] = order[places[mine]]
    return rows


WORLDS: dict[str, type[SceneSource] | type[CaptionedSource]] = {"scenes": SceneSource, "captioned": CaptionedSource}


def open_source(source: str, resolution: int, seed: int) -> Source:
    """One of `WORLDS`, a text file of prompts, or a folder of images."""
    if source in WORLDS:
        return WORLDS[source](resolution, seed)
    return (PromptSource if source.endswith(".txt") else FolderSource)(source, resolution, seed)

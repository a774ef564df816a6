"""Where images and labels come from: sample `id` of a run is always the same image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.data.scenes import LABELS, Scenes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Source(ABC):
    """Images (B, 3, H, W) float32 in [-1, 1] with labels (B,) int64; `labels` are their names, () for none."""

    resolution: int
    labels: tuple[str, ...]

    @abstractmethod
    def label_of(self, ids: Tensor) -> Tensor:
        """Labels (B,) of the samples `ids` (B,), without making the images."""

    @abstractmethod
    def images(self, ids: Tensor) -> Tensor:
        """The images (B, 3, H, W) of the samples `ids` (B,)."""


class SceneSource(Source):
    """The endless procedural world; see `fewstep.data.scenes`."""

    labels = LABELS

    def __init__(self, resolution: int, seed: int):
        self.resolution, self.scenes = resolution, Scenes(resolution, seed)

    def label_of(self, ids: Tensor) -> Tensor:
        return Draw(self.scenes.seed, 0, ids).integers("scenes.label", len(LABELS))

    def images(self, ids: Tensor) -> Tensor:
        return self.scenes.sample(ids).images


class FolderSource(Source):
    """A folder of images, centre-cropped and resized; class sub-folders, in sorted order, give the labels.

    Every epoch visits each image once in an order of its own. Files that cannot be read are left out and named in
    `skipped`. Raises UserError when no image is left.
    """

    def __init__(self, folder: str | Path, resolution: int, seed: int):
        root = Path(folder)
        if not root.is_dir():
            raise UserError(f"data.source is 'scenes' or a folder of images, and there is no folder {folder}")
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
        self.resolution, self.seed, self.labels = resolution, seed, tuple(classes)
        self.skipped: list[Path] = []
        kept: list[Tensor] = []
        labels: list[int] = []
        for file in files:
            image = self._read(file)
            if image is None or (classes and file.parent == root):
                self.skipped.append(file)
                continue
            kept.append(image)
            labels.append(classes.index(file.relative_to(root).parts[0]) if classes else 0)
        if not kept:
            found = (
                f"{len(files)} files there, none of them readable" if files else f"no {', '.join(SUFFIXES)} file there"
            )
            raise UserError(f"the image folder {folder} is of no use: {found}")
        self._images, self._labels = torch.stack(kept), torch.tensor(labels)

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

    def _rows(self, ids: Tensor) -> Tensor:
        count = len(self._images)
        epochs, places = ids // count, ids % count
        rows = torch.empty_like(ids)
        for epoch in epochs.unique():
            order = Draw(self.seed, int(epoch), torch.arange(count)).uniform("folder.order").argsort()
            mine = epochs == epoch
            rows[mine] = order[places[mine]]
        return rows

    def label_of(self, ids: Tensor) -> Tensor:
        return self._labels[self._rows(ids)]

    def images(self, ids: Tensor) -> Tensor:
        return self._images[self._rows(ids)].float() / 127.5 - 1


def open_source(source: str, resolution: int, seed: int) -> Source:
    """`scenes`, or a folder of images."""
    return SceneSource(resolution, seed) if source == "scenes" else FolderSource(source, resolution, seed)

"""What every source of samples is, and the order in which one that ends is visited."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from fewstep.core.draw import Draw


class Source(ABC):
    """Images (B, 3, H, W) float32 in [-1, 1] with labels (B,) int64 and captions; `labels` are names, () for none.

    Sample `id` of a run is always the same one, whatever the batch, the process or the thread that asks for it.
    """

    resolution: int
    labels: tuple[str, ...]
    has_images: bool = True
    """whether `images` gives any, or the source only says what to make"""
    world: str | None = None
    """scenes | captioned: a world whose law is known; None where it is not"""
    size: int | None = None
    """how many images there are, None for a world without end"""

    @property
    def epoch(self) -> int | None:
        """After how many samples all have been seen, None for a world without end."""
        return self.size

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


def checksum(*parts: Any) -> str:
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
        mine = epochs == epoch
        rows[mine] = _order(seed, int(epoch), count, purpose)[places[mine]]
    return rows


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int, purpose: str) -> Tensor:
    """All rows (count,) in the order of one epoch; every batch of the epoch asks for it."""
    return Draw(seed, epoch, torch.arange(count)).uniform(purpose).argsort()

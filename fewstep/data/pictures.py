"""Pictures on disk, decoded when they are asked for: what a folder, shards and a table of them have in common."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from fewstep import reading
from fewstep.core.errors import UserError
from fewstep.data.base import Source, checksum, shuffled

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MEMORY = 2**30
"""bytes of decoded pictures that are kept; where all of them would be more, each is decoded whenever it is asked for"""
LARGE = 2**24
"""pixels from which on pictures are decoded one at a time, for each takes up to 0.8 GB meanwhile"""
_ALONE = threading.Lock()
MANY = 2000
"""pictures whose check is worth a progress bar"""

UNREADABLE = "left out because they could not be read"
NO_LABEL = "left out because they have no label, unlike the others"
NO_CAPTION = "not used as captions because they are no UTF-8 text that could be read"

Skipped = dict[str, list[Path]]
"""reason -> what was left out for it"""


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture that may be damaged: `read` gives the bytes of its file."""

    name: Path
    read: Callable[[], bytes]
    label: int = 0
    caption: str = ""


def pixels_of(content: bytes, resolution: int) -> Tensor:
    """(3, R, R) uint8 of the bytes of a file: the square in the middle of the picture, upright as its EXIF says.

    It is resized by bilinear interpolation with antialiasing; a JPEG of more than four times the resolution is decoded
    at a half, a quarter or an eighth of its size before that, and stays at twice the resolution or more.
    Raises OSError for bytes that are no picture, or only a part of one.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            size = opened.size
        reading.sized(size, len(content))
        with _ALONE if size[0] * size[1] > LARGE else nullcontext():
            square = _square(content, resolution)
            image = square if square.mode == "RGB" else square.convert("RGB")
            return transforms.resize(transforms.pil_to_tensor(image), [resolution, resolution], antialias=True)
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise OSError(str(error)) from None


def _square(content: bytes, resolution: int) -> Image.Image:
    """The square in the middle, in the colours of the file: of large pictures only so much is converted."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        opened.draft(None, (2 * resolution, 2 * resolution))  # type: ignore[arg-type]
        opened.load()
        ImageOps.exif_transpose(opened, in_place=True)
        side = min(opened.size)
        left, top = (round((length - side) / 2) for length in opened.size)
        return opened.crop((left, top, left + side, top + side))


def scaled(pixels: Tensor) -> Tensor:
    """Levels 0 .. 255 as float32 in [-1, 1]."""
    return (pixels / 127.5).sub_(1)


class Pictures(Source):
    """Pictures of any size as squares, see `pixels_of`. Every epoch visits each once in its own order.

    Each is read and decoded once at the start, so that a damaged one is known before the first step: `skipped` names
    what is left out, by the reason. Raises UserError, beginning with `what`, when nothing is left.
    """

    def __init__(
        self,
        what: str,
        found: Sequence[Picture],
        resolution: int,
        seed: int,
        labels: Sequence[str] = (),
        skipped: Mapping[str, list[Path]] | None = None,
        nothing: str = "it holds no pictures",
    ):
        self.resolution, self.seed, self.labels = resolution, seed, tuple(labels)
        kept = len(found) * 3 * resolution**2 <= MEMORY
        checks = list(_checked(found, resolution, kept))
        whole = [(picture, check) for picture, check in zip(found, checks, strict=True) if check is not None]
        broken = [picture.name for picture, check in zip(found, checks, strict=True) if check is None]
        self.skipped: Skipped = {**({UNREADABLE: broken} if broken else {}), **(skipped or {})}
        if not whole:
            left_out = ", ".join(f"files {why} ({len(files)})" for why, files in self.skipped.items())
            raise UserError(f"{what} is of no use: {left_out or nothing}")
        self._pictures = [picture for picture, _ in whole]
        self._labels = torch.tensor([picture.label for picture in self._pictures])
        self._kept = torch.stack([check.pixels for _, check in whole]) if kept else None  # type: ignore[misc]
        told = (f"{check.digest} {picture.label} {picture.caption}\n" for picture, check in whole)
        self._checksum = checksum(*(line.encode() for line in told))
        self.size = len(whole)

    def checksum(self) -> str:
        return self._checksum

    def _rows(self, ids: Tensor) -> Tensor:
        return shuffled(ids, len(self._pictures), self.seed, "folder.order")

    def label_of(self, ids: Tensor) -> Tensor:
        return self._labels[self._rows(ids)]

    def images(self, ids: Tensor) -> Tensor:
        rows = self._rows(ids)
        pixels = torch.stack([self._pixels(row) for row in rows.tolist()]) if self._kept is None else self._kept[rows]
        return scaled(pixels)

    def _pixels(self, row: int) -> Tensor:
        picture = self._pictures[row]
        try:
            return pixels_of(picture.read(), self.resolution)
        except (OSError, UserError) as error:
            raise UserError(
                f"{picture.name} was whole when the run started and cannot be read any more ({error}): put it back and "
                "continue with --resume"
            ) from None

    def captions(self, ids: Tensor) -> list[str]:
        pictures = [self._pictures[row] for row in self._rows(ids).tolist()]
        return [picture.caption or (self.labels[picture.label] if self.labels else "") for picture in pictures]


@dataclass(frozen=True, slots=True)
class Check:
    """What is remembered of a whole picture: the digest of its file, and itself where all are kept."""

    digest: str
    pixels: Tensor | None


def _checked(pictures: Sequence[Picture], resolution: int, kept: bool) -> Iterator[Check | None]:
    """What decoding each picture came to, in their order; None for a damaged one."""

    def check(picture: Picture) -> Check | None:
        try:
            content = picture.read()
            pixels = pixels_of(content, resolution)
        except (OSError, UserError):
            return None
        return Check(checksum(content), pixels if kept else None)

    quiet = len(pictures) < MANY
    with (
        ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool,
        tqdm(total=len(pictures), unit="picture", desc="checking pictures", dynamic_ncols=True, disable=quiet) as bar,
    ):
        for start in range(0, len(pictures), MANY):
            for result in pool.map(check, pictures[start : start + MANY]):
                bar.update()
                yield result


def one_line(content: bytes) -> str:
    """A caption as it is told: one line of words. Raises UnicodeDecodeError."""
    return " ".join(content.decode("utf-8-sig").split())

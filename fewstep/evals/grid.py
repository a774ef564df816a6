"""Images as pictures, and grids of them as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

_GAP = 2
_LARGEST = 320
_LETTER = 7
_MARGIN = 6


def save_grid(
    images: Tensor, path: Path | str, columns: int, scale: int = 4, row_labels: Sequence[str] | None = None
) -> None:
    """Writes `grid` to a PNG, which appears whole or not at all."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    try:
        grid(images, columns, scale, row_labels).save(aside, format="PNG")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def grid(images: Tensor, columns: int, scale: int = 4, row_labels: Sequence[str] | None = None) -> Image.Image:
    """Images (N,3,H,W) in [-1,1] with `columns` a row, each pixel `scale` wide; none is shown larger than 320 pixels.

    Of videos (N,3,T,H,W) the middle frames are shown.
    `row_labels`, one for each row, are written to the left. ValueError when their number is wrong.
    """
    images = images if images.ndim == 4 else images[:, :, images.shape[2] // 2]
    rows = -(-len(images) // columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"{rows} rows need {rows} labels, not {len(row_labels)}.")
    enlarged = min(scale, _LARGEST / max(images.shape[-2:]))
    how = Image.Resampling.NEAREST if enlarged == scale else Image.Resampling.LANCZOS
    height, width = (round(side * enlarged) + _GAP for side in images.shape[-2:])
    left = max(map(len, row_labels)) * _LETTER + _MARGIN if row_labels else 0
    canvas = Image.new("RGB", (left + columns * width + _GAP, rows * height + _GAP), "white")
    for index, image in enumerate(_bytes(images)):
        tile = Image.fromarray(image.permute(1, 2, 0).numpy())
        tile = tile.resize((width - _GAP, height - _GAP), how)
        canvas.paste(tile, (left + index % columns * width + _GAP, index // columns * height + _GAP))
    pen = ImageDraw.Draw(canvas)
    for row, text in enumerate(row_labels or ()):
        pen.text((_MARGIN // 2, (row + 0.5) * height), text, fill="black", anchor="lm")
    return canvas


def picture(image: Tensor) -> Image.Image:
    """One image (C, H, W) in [-1, 1], C = 1 or 3; of a video (C, T, H, W) its middle frame."""
    image = image if image.ndim == 3 else image[:, image.shape[1] // 2]
    return Image.fromarray(_bytes(image).permute(1, 2, 0).squeeze(-1).numpy())


def _bytes(images: Tensor) -> Tensor:
    """Values as uint8 on the CPU; -1 is 0 and 1 is 255."""
    return ((images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

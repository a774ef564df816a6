"""`fewstep compare`: what several models make of the same noise and the same labels or prompts, a row for each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.sampling import Asked, Sampler, chosen, open_folder, picture, wrapped, writable

_TILE, _GAP, _MARGIN = 128, 4, 150


def samples(samplers: Sequence[Sampler], args: argparse.Namespace) -> tuple[list[Tensor], list[str]]:
    """The images (N, 3, H, W) of each sampler, and what was asked for in each column.

    Raises UserError where one cannot be asked for what another one can, or sees other noise for its other size.
    """
    first = samplers[0]
    asked: list[Asked] = chosen(args, first)
    for target, sampler in zip(args.targets, samplers, strict=True):
        if _taken(sampler) != _taken(first):
            raise UserError(
                f"{target} and {args.targets[0]} are not told the same things or start from noise of other sizes "
                f"({_taken(sampler)}; {_taken(first)}): measure them by fewstep eval instead"
            )
    count = args.count or max(8, len(asked))
    columns = [first.name(asked[i % len(asked)]) if asked else "" for i in range(count)]
    return [sampler.draw(asked, count, args.seed) for sampler in samplers], columns


def _taken(sampler: Sampler) -> str:
    what = "prompts" if sampler.encode is not None else f"{sampler.classes} labels" if sampler.classes else "nothing"
    return f"{what}, {'x'.join(map(str, sampler.shape))}"


def board(images: Sequence[Tensor], names: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """A row of tiles for each of `images`, its name at the left, and what was asked for above."""
    font = ImageFont.load_default(12)
    heads = [wrapped(text, _TILE - 2, font) for text in columns]
    top = 15 * max(len(lines) for lines in heads) + _GAP
    size = (_MARGIN + len(columns) * (_TILE + _GAP), top + len(images) * (_TILE + _GAP))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for column, lines in enumerate(heads):
        place = (_MARGIN + column * (_TILE + _GAP) + _TILE / 2, top - 3)
        pen.multiline_text(place, "\n".join(lines), fill="black", font=font, anchor="md", align="center", spacing=1)
    for row, (made, name) in enumerate(zip(images, names, strict=True)):
        y = top + row * (_TILE + _GAP)
        text = "\n".join(wrapped(name, _MARGIN - 10, font))
        pen.multiline_text((_GAP, y + _TILE / 2), text, fill="black", font=font, anchor="lm", spacing=1)
        for column, image in enumerate(made):
            small = max(image.shape[-2:]) <= _TILE
            how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            canvas.paste(picture(image).resize((_TILE, _TILE), how), (_MARGIN + column * (_TILE + _GAP), y))
    return canvas


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """Draws what `args` names and saves the picture."""
    out = Path(args.out)
    writable(out)
    samplers = [open_folder(Path(target)) for target in args.targets]
    images, columns = samples(samplers, args)
    passes = [len(sampler.rollout) for sampler in samplers]
    said = [f"{count} step{'s' if count > 1 else ''}" for count in passes]
    names = [f"{Path(target).name} {steps}" for target, steps in zip(args.targets, said, strict=True)]
    board(images, names, columns).save(out)
    print(f"{len(args.targets)} models from the same noise: {out}")

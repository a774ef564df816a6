"""Whether generated images show what their captions say, as the reader of captioned scenes sees them.

Rows (N,A) of attributes are compared as one can see them, see `fewstep.data.captioned.canonical`; a negative value is
unsaid and asks for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.evals.reader import Reader


@dataclass(frozen=True)
class CaptionAccuracy:
    """Shares of images: all that is said is right, the same of one and of two objects, and each attribute if said.

    A share of no images is NaN.
    """

    all: float
    one: float
    two: float
    attributes: dict[str, float]


def caption_accuracy(reader: Reader, images: Tensor, said: Tensor) -> CaptionAccuracy:
    """How right images (N,3,H,W) are about the rows `said` (N,A), whose columns are those of the reader.

    Raises ValueError when there is not one row for each image.
    """
    if said.shape != (len(images), len(reader.attributes)):
        raise ValueError(f"{len(images)} images need {len(images)} rows of {len(reader.attributes)}, not {said.shape}.")
    read = reader.read(images)[0]
    right = (read == said) | (said < 0)
    whole, count = right.all(1), said[:, list(reader.attributes).index("count")]
    return CaptionAccuracy(
        all=_share(whole),
        one=_share(whole[count == 0]),
        two=_share(whole[count == 1]),
        attributes={name: _share(right[said[:, i] >= 0, i]) for i, name in enumerate(reader.attributes)},
    )


def _share(flags: Tensor) -> float:
    return flags.double().mean().item() if len(flags) else torch.nan

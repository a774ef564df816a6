"""What samples look like to a frozen network, for objectives that compare them by more than their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.source import CaptionedSource, Source
from fewstep.evals.reader import load_reader
from fewstep.models.loading import locate
from fewstep.models.lpips import load_lpips
from fewstep.objectives.base import Features


def reader_folder(source: Source) -> Path:
    """Where the reader lies that knows the images of `source`, or the one of the scenes for images of any kind."""
    return locate("assets/caption_reader" if isinstance(source, CaptionedSource) else "assets/reader")


def features(
    name: str, weights: str | None, source: Source, decode: Callable[[Tensor], Tensor], device: torch.device
) -> Features:
    """Samples (B, *S) -> feature maps, differentiable in the samples. `decode` makes images of samples.

    `reader` is the built-in one, `lpips` is read from the file `weights`. Raises UserError where that is none.
    """
    if name == "reader":
        reader = load_reader(reader_folder(source)).to(device)
        return lambda samples: [reader(decode(samples))[1]]
    lpips = load_lpips(Path(str(weights))).to(device)
    return lambda samples: lpips(decode(samples))

"""What samples look like to a frozen network, for objectives that compare them by more than their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.data.source import Source
from fewstep.evals.reader import Reader, load_reader
from fewstep.models.loading import locate
from fewstep.models.lpips import load_lpips


def reader_folder(source: Source) -> Path:
    """Where the reader lies that knows the images of `source`, or the one of the scenes for images of any kind."""
    return locate("assets/caption_reader" if source.world == "captioned" else "assets/reader")


class Perceived:
    """Samples (B, *S) -> the feature maps of `net`, differentiable in the samples. `decode` makes images of samples.

    No module, for an objective that holds one would save what it never learns.
    """

    def __init__(self, net: nn.Module, decode: Callable[[Tensor], Tensor]):
        self.net, self.decode = net, decode

    def __call__(self, samples: Tensor) -> Sequence[Tensor]:
        seen = self.net(self.decode(samples))
        return [seen[1]] if isinstance(self.net, Reader) else seen


def features(
    name: str, weights: str | None, source: Source, decode: Callable[[Tensor], Tensor], device: torch.device
) -> Perceived:
    """What the frozen network `name` sees: `reader` is the built-in one, `lpips` is read from the file `weights`.

    Raises UserError where that is none.
    """
    net = load_reader(reader_folder(source)) if name == "reader" else load_lpips(Path(str(weights)))
    return Perceived(net.to(device), decode)

"""The reader: a small network that reads the attributes of a scene and gives features to compare images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep import reading
from fewstep.core.errors import UserError

RESOLUTION = 16
LAYERS = ((32, 1), (48, 2), (64, 1), (96, 2))
FEATURES = 64
_BATCH = 500


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()]


class Reader(nn.Module):
    """Images (N,3,H,W) in [-1,1] to logits for each attribute and features (N,64).

    `attributes` maps each attribute's name to the names of its values, in the order of the columns read. `resolution`
    is the side at which images are looked at, and `layers` gives the channels and the stride of each convolution.
    """

    def __init__(
        self,
        attributes: dict[str, tuple[str, ...]],
        resolution: int = RESOLUTION,
        layers: Sequence[tuple[int, int]] = LAYERS,
    ) -> None:
        super().__init__()
        self.attributes, self.resolution = attributes, resolution
        channels, blocks, side = 3, [], resolution
        for outputs, stride in layers:
            blocks += _block(channels, outputs, stride)
            channels, side = outputs, side // stride
        self.body = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(channels * side * side, FEATURES), nn.SiLU())
        self.heads = nn.Linear(FEATURES, sum(len(values) for values in attributes.values()))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """One tensor of logits (N, values) for each attribute, and features (N,64)."""
        size = (self.resolution, self.resolution)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        features = self.body(images)
        widths = [len(values) for values in self.attributes.values()]
        return list(self.heads(features).split(widths, 1)), features

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely attributes (N,A) int64 and the features (N,64) float32 of images (N,3,H,W)."""
        read, features = [], []
        for chunk in images.split(_BATCH):
            logits, feature = self(chunk.to(self.heads.weight))
            read.append(torch.stack([one.argmax(1) for one in logits], 1))
            features.append(feature)
        return torch.cat(read), torch.cat(features)


def load_reader(folder: Path | str) -> Reader:
    """The reader in `folder` (reader.safetensors and reader.json) in eval mode, float32.

    Raises FileNotFoundError when either file is absent, and UserError where they describe no reader.
    """
    weights, protocol = Path(folder) / "reader.safetensors", Path(folder) / "reader.json"
    for path in (weights, protocol):
        if not (path.exists() or path.is_symlink()):
            maker = "train_caption_reader" if "caption" in Path(folder).name else "train_reader"
            raise FileNotFoundError(f"No reader at {path}: make one with tools/{maker}.py.")
    described = reading.described(protocol)
    if not isinstance(described.get("attributes"), dict):
        raise UserError(f"{protocol} cannot be read: it names no attributes")
    state = {name: value.float() for name, value in reading.tensors(weights).items()}
    try:
        attributes = {name: tuple(values) for name, values in described["attributes"].items()}
        with torch.device("meta"):  # what is described may be of any size
            reader = Reader(attributes, described.get("resolution", RESOLUTION), described.get("layers", LAYERS))
        reader.load_state_dict(state, assign=True)
    except Exception as error:  # a description that is none leads torch to errors of many kinds
        reason = " ".join(str(error).split())
        raise UserError(
            f"{protocol} and {weights.name} cannot be read as a reader: {reading.shown(reason, 300)}"
        ) from None
    return reader.eval().requires_grad_(False)

"""The reader: a small network that reads the attributes of a scene and gives features to compare images."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

RESOLUTION = 16
FEATURES = 64
_BATCH = 500


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()]


class Reader(nn.Module):
    """Images (N,3,H,W) in [-1,1] to logits for each attribute and features (N,64).

    `attributes` maps each attribute's name to the names of its values, in the order of the columns read.
    """

    def __init__(self, attributes: dict[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.attributes = attributes
        self.body = nn.Sequential(
            *_block(3, 32, 1),
            *_block(32, 48, 2),
            *_block(48, 64, 1),
            *_block(64, 96, 2),
            nn.Flatten(),
            nn.Linear(96 * (RESOLUTION // 4) ** 2, FEATURES),
            nn.SiLU(),
        )
        self.heads = nn.Linear(FEATURES, sum(len(values) for values in attributes.values()))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """One tensor of logits (N, values) for each attribute, and features (N,64)."""
        if images.shape[-2:] != (RESOLUTION, RESOLUTION):
            size = (RESOLUTION, RESOLUTION)
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

    Raises FileNotFoundError when either file is absent and RuntimeError when the weights do not fit.
    """
    weights, protocol = Path(folder) / "reader.safetensors", Path(folder) / "reader.json"
    for path in (weights, protocol):
        if not path.is_file():
            raise FileNotFoundError(f"No reader at {path}: make one with tools/train_reader.py.")
    attributes = json.loads(protocol.read_text())["attributes"]
    reader = Reader({name: tuple(values) for name, values in attributes.items()})
    reader.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    return reader.eval().requires_grad_(False)

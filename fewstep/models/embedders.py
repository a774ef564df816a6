"""Embedders of further per-sample scalars, silent at the start."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimeEmbedder(nn.Module):
    """A scalar (B,) -> (B, width): sinusoids of 1000 times the value, then two layers, the last one zero."""

    def __init__(self, width: int, frequencies: int = 64):
        super().__init__()
        scale = torch.exp(-math.log(10000.0) * torch.arange(frequencies) / frequencies)
        self.register_buffer("scale", 1000.0 * scale, persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, value: Tensor) -> Tensor:
        angle = value.float()[:, None] * self.scale
        return self.layers(torch.cat([angle.cos(), angle.sin()], 1))

"""Discriminator heads over tapped features: a feature map or a token sequence to one logit a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MapHead(nn.Module):
    """(B, C, H, W) -> logits (B,), as in DMD2: halve to 4x4, then to 1x1, group norm and SiLU between.

    Raises ValueError for maps smaller than 4x4.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        if size < 4:
            raise ValueError(f"a discriminator head needs features of at least 4x4, but the tap gives {size}x{size}")
        # Two channels a group on a 1x1 map would normalise everything but a sign away: sixteen or more.
        groups = math.gcd(channels, max(1, min(32, channels // 16)))
        layers: list[nn.Module] = []
        while size > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(groups, channels), nn.SiLU()]
            size //= 2
        layers += [nn.Conv2d(channels, channels, 4, 4), nn.GroupNorm(groups, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.float()).flatten(1).mean(1)


class TokenHead(nn.Module):
    """(B, L, D) -> logits (B,): a two-layer perceptron a token, then the mean."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.float()).flatten(1).mean(1)


def head_for(features: Tensor) -> nn.Module:
    """A head that fits features of this shape."""
    if features.ndim == 4:
        return MapHead(features.shape[1], features.shape[2])
    return TokenHead(features.shape[-1])


class Heads(nn.Module):
    """One head for each tapped block; the logit is their mean, and `each` gives theirs."""

    def __init__(self, features: dict[str, Tensor]):
        super().__init__()
        self.names = tuple(features)
        self.heads = nn.ModuleList(head_for(value) for value in features.values())

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """(B,)"""
        return self.each(features).mean(1)

    def each(self, features: Mapping[str, Tensor]) -> Tensor:
        """(B, heads)"""
        return torch.stack([head(features[name]) for name, head in zip(self.names, self.heads, strict=True)], 1)

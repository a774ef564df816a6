"""Random numbers as a pure function of (seed, step, purpose, sample id).

A draw does not depend on the batch it is part of, on the order of the draws or on the number of processes, so
micro-batches add up to the batch, two processes equal one, and a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # multipliers of the splitmix64 finaliser (Steele, Lea & Flood 2014)
_MIX_2 = -0x6B2FB644ECCEEE15


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 tensors; overflow wraps, as it must."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


@dataclass(frozen=True)
class Draw:
    """Random tensors for the samples `ids` (B,) int64 at one step of one run."""

    seed: int
    step: int
    ids: Tensor

    def _words(self, purpose: str, count: int, ids: Tensor) -> Tensor:
        """(N, count) int64 hash words, one stream for each id."""
        start = torch.tensor([_signed(self.seed * 0x9E3779B1 + 1), self.step, zlib.crc32(purpose.encode())])
        key = torch.zeros((), dtype=torch.int64)
        for part in start:
            key = _mix((key ^ part) + _GOLDEN)
        keys = _mix((ids ^ key.to(ids.device)) + _GOLDEN)
        counter = torch.arange(1, count + 1, device=ids.device) * _GOLDEN
        return _mix(keys[:, None] + counter)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) float32 in (0, 1), never 0 and never 1."""
        words = self._words(purpose, math.prod(shape), self.ids)
        return ((_shift_right(words, 41).float() + 0.5) * 2.0**-23).reshape(-1, *shape)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(B, *shape) float32 standard normal (Box and Muller)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        words = self._words(purpose, 2 * half, self.ids)
        uniform = (_shift_right(words, 40).float() + 0.5) * 2.0**-24
        radius = torch.sqrt(-2.0 * torch.log(uniform[:, :half].clamp(max=1 - 2.0**-24)))
        angle = (2 * math.pi) * uniform[:, half:]
        return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count].reshape(-1, *shape)

    def integers(self, purpose: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) int64, uniform on 0 .. high-1."""
        return (self.uniform(purpose, shape) * high).long()

    def shared_integer(self, purpose: str, high: int) -> int:
        """One integer on 0 .. high-1, the same for every sample, micro-batch and process of this step."""
        words = self._words(purpose, 1, torch.zeros(1, dtype=torch.int64))
        return int(_shift_right(words, 33).item() % high)

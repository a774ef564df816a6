"""Images encoded once: made before training, stored, and visited in a new order every epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.data.base import shuffled
from fewstep.store import Sharded

BATCH = 64
SHARD = 16 * BATCH


@dataclass(frozen=True)
class Latents:
    """`x0` (N, *S) float16 are the latents of the samples 0 .. N-1 of a source."""

    x0: Tensor | Sharded
    seed: int

    def visited(self, ids: Tensor) -> Tensor:
        """Which sample of the source (B,), below N, stands for each training sample of `ids` (B,)."""
        return shuffled(ids.cpu(), len(self.x0), self.seed, "latents.order").to(ids.device)

    def of(self, rows: Tensor) -> Tensor:
        """The latents (B, *S) float32, on the device of `rows` (B,)."""
        return self.x0[rows.cpu()].to(rows.device, torch.float32)


@torch.no_grad()
def make(
    encode: Callable[[Tensor], Tensor],
    images: Callable[[Tensor], Tensor],
    rows: Tensor,
    batch: int,
    progress: Callable[[int], object],
) -> dict[str, Tensor]:
    """Encodes `images(rows)`, `batch` at once: the latents `x0` (N, *S) float16 of the samples `rows` (N,)."""
    parts = []
    for some in rows.split(batch):
        parts.append(encode(images(some)).half().cpu())
        progress(len(some))
    return {"x0": torch.cat(parts).contiguous()}  # a VAE may answer with channels last

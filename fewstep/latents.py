"""Images encoded once: made before training, stored, and visited in a new order every epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data.source import shuffled


@dataclass(frozen=True)
class Latents:
    """`x0` (N, *S) float16 are the latents of the samples 0 .. N-1 of a source."""

    x0: Tensor
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
    count: int,
    seed: int,
    batch: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> Latents:
    """Encodes `images(rows)` for the first `count` rows of a source."""
    parts = []
    for rows in torch.arange(count).split(batch):
        parts.append(encode(images(rows)).half().cpu())
        progress(len(rows))
    return Latents(torch.cat(parts).contiguous(), seed)  # a VAE may answer with channels last


def save(file: Path, latents: Latents, recipe: str) -> None:
    """Writes the latents and the `recipe` they were made by, which `fewstep.pairs.recipe_of` reads."""
    aside = file.with_suffix(".partial")
    save_file({"x0": latents.x0}, aside, {"recipe": recipe})
    aside.rename(file)


def load(file: Path, seed: int) -> Latents:
    return Latents(load_file(file)["x0"], seed)

"""Texts of several lengths in one tensor, with a mask of what is text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fewstep.models.shaped import is_unknown


def padded(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Rows (L_i, D) -> (B, length, D) with zeros behind them, and the mask (B, length) of what they fill."""
    filled = [torch.arange(length, device=row.device) < len(row) for row in rows]
    return torch.stack([pad(row, (0, 0, 0, length - len(row))) for row in rows]), torch.stack(filled).float()


def lengths(mask: Tensor) -> list[int]:
    """How much of each row is text; all of it where tensors are only shaped."""
    return [mask.shape[1]] * len(mask) if is_unknown(mask) else mask.sum(1).long().tolist()


def full(encoder: nn.Module, rows: int, length: int, layer: int) -> Tensor | None:
    """The states (rows, length, D) of an encoder that is only shaped, since lengths are not known; None of another."""
    weight = next(encoder.parameters())
    if not is_unknown(weight):
        return None
    ids = torch.zeros(rows, length, dtype=torch.long, device=weight.device)
    return encoder(ids, output_hidden_states=True).hidden_states[layer]


def shortened(texts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the padding that all rows have."""
    longest = max(lengths(mask))
    return texts[:, :longest], mask[:, :longest]

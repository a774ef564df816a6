"""Latents as the tokens that some transformers read: squares of two by two, row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W / 4, 4 C)."""
    rows, channels, height, width = x.shape
    squares = x.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(rows, height * width // 4, 4 * channels)


def unpacked(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, H W / 4, 4 C) -> (B, C, H, W), for the shape (C, H, W)."""
    channels, height, width = shape
    squares = tokens.reshape(-1, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(-1, channels, height, width)


def places(height: int, width: int, like: Tensor, axes: int = 3) -> Tensor:
    """(height width, axes): the row and the column of each token in the second and third of several axes."""
    rows = torch.arange(height, device=like.device, dtype=like.dtype)
    columns = torch.arange(width, device=like.device, dtype=like.dtype)
    grid = like.new_zeros(height, width, axes)
    grid[..., 1], grid[..., 2] = rows[:, None], columns[None, :]
    return grid.reshape(height * width, axes)

"""A gradient that was taken before backward, carried by a loss."""

from __future__ import annotations

import torch
from torch import Tensor


def carried(loss: Tensor, leaf: Tensor, x: Tensor) -> Tensor:
    """A loss formed on `leaf`, which holds the values of x (B, *S): the same value and gradient, through x alone.

    Its graph ends here, so it can be formed while weights are frozen and forgotten before the backward pass: gradient
    checkpointing would recompute the blocks there, unfrozen, and fail.
    """
    (slope,) = torch.autograd.grad(loss, leaf)
    return loss.detach() + (slope * (x - x.detach())).sum()

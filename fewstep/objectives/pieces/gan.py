"""The diffusion GAN on features of a score network (DMD2, section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """softplus(l_fake) + softplus(-l_real), mean over samples."""
    return softplus(fake_logits).mean() + softplus(-real_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The non-saturating softplus(-l_fake), mean over samples."""
    return softplus(-fake_logits).mean()


@torch.no_grad()
def accuracy(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Share of samples told apart: 0.5 is a discriminator that knows nothing."""
    return 0.5 * ((fake_logits < 0).float().mean() + (real_logits > 0).float().mean())

"""Re-DMD (Reward Forcing, Lu et al. 2025, arXiv:2512.04678): the score gap weighted by how good each sample is.

Generator: exp(beta r(x)) (F - R) / mean |x - R|. The reward is a number, not a path for gradients, and the critic
learns from all samples alike. A positive weight does not move the place where F = R: it decides what is learned first
and where a small student is allowed to be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import expand
from fewstep.objectives import dmd2
from fewstep.objectives.dmd2 import Look
from fewstep.rollout import Sample


@dataclass
class Config(dmd2.Config):
    name: str = "re_dmd"
    gan_weight: float = 0.0
    """of softplus(-D) in the generator's loss; 0 = no GAN and no data, as in the paper"""
    reward: str = ""
    """label_log_probability (scenes alone), or module:function of your own: images (B, 3, H, W) in [-1, 1] and their
    condition -> rewards (B,), of about unit size"""
    beta: float = 2.0
    """how strongly: a sample counts exp(beta r)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward:
            raise UserError("re_dmd needs objective.reward: label_log_probability, or module:function of your own")


class Objective(dmd2.Objective):
    reward: Callable[[Tensor, Condition], Tensor]
    """samples (B, *S) and their condition -> (B,); whoever builds the run opens it"""

    def attach(self, x: Tensor, cond: Condition) -> None:
        super().attach(x, cond)
        if not x.is_meta:
            self.worth(x, cond)  # one that does not fit says so before anything is trained

    @torch.no_grad()
    def worth(self, x: Tensor, cond: Condition) -> Tensor:
        """exp(beta r) (B,)."""
        return (self.config.beta * self.reward(x, cond)).exp()

    def gradient(self, batch: Batch, sample: Sample, look: Look) -> Tensor:
        return expand(self.worth(look.x, batch.cond), look.x) * super().gradient(batch, sample, look)

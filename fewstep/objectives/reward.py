"""Minus the mean reward of the samples, through a differentiable reward: L = -E r(x).

Beside a score gap, with `scale` beta in a `sum`, the student approaches the teacher's law tilted by exp(beta r) instead
of the teacher's own. Alone it finds whatever the reward overrates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.objectives import base
from fewstep.objectives.base import Logs
from fewstep.rollout import Sample


@dataclass
class Config:
    name: str = "reward"
    reward: str = ""
    """label_log_probability (scenes alone), or module:function of your own: images (B, 3, H, W) in [-1, 1] and their
    condition -> rewards (B,), differentiable in the images"""

    def __post_init__(self) -> None:
        if not self.reward:
            raise UserError("reward needs objective.reward: label_log_probability, or module:function of your own")


class Objective(base.Objective):
    reward: Callable[[Tensor, Condition], Tensor]
    """samples (B, *S) and their condition -> (B,); whoever builds the run opens it"""

    def attach(self, x: Tensor, cond: Condition) -> None:
        """Raises UserError for a reward that cannot be differentiated, before anything is trained."""
        if x.is_meta:
            return
        with torch.enable_grad():
            if not self.reward(x.clone().requires_grad_(), cond).requires_grad:
                raise UserError(
                    f"objective.reward={self.config.reward} gives no gradient: write it in torch without no_grad, or "
                    "use the objective re_dmd, which needs numbers alone"
                )

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        reward = self.reward(sample.x0, batch.cond).mean()
        return -reward, {"reward": reward.detach()}

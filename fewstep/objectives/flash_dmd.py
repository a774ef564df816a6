"""Flash-DMD, stage 1 (Chen et al. 2025, arXiv:2511.20549): distributions at high noise, the discriminator at low noise.

A student step from a noisy input decides what is in the image and gets (F - R) / mean |x - R| alone; a step from a
cleaner one decides how it looks and gets the GAN's loss alone. The discriminator reads the frozen teacher, so the
critic only denoises, and after each move of the generator it is drawn toward it: psi <- d psi + (1 - d) theta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.objectives import dmd2
from fewstep.objectives.base import Logs
from fewstep.objectives.pieces.matching import matching_loss
from fewstep.objectives.pieces.score_gap import noised
from fewstep.rollout import Sample


@dataclass
class Config(dmd2.Config):
    name: str = "flash_dmd"
    ratio: int = 2
    """steps for each generator move; the critic moves at every step"""
    gan_features: Literal["fake", "teacher"] = "teacher"
    """whose features the discriminator reads; with fake it trains the critic's trunk, which the method avoids"""
    split: float = 0.5
    """student inputs above this level get the score gap, the others the GAN: 0 = all the gap, 1 = all the GAN"""
    critic_average: float = 0.97
    """how much of the critic stays its own after each generator move; 1 = all of it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.split <= 1 and 0 <= self.critic_average <= 1):
            raise UserError(
                "objective.split and objective.critic_average are from 0 to 1, but "
                f"{self.split} and {self.critic_average} were given"
            )
        if self.split and not self.gan_weight:
            raise UserError(
                f"objective.split={self.split} leaves cleaner steps to the GAN, but objective.gan_weight is 0: set it "
                "above 0, or split=0"
            )
        if self.regression:
            raise UserError(
                "flash_dmd has no regression beside its two losses: set objective.regression=0, or use dmd2"
            )


class Objective(dmd2.Objective):
    def drawn(self) -> dict[str, float]:
        return {"fake_score": self.config.critic_average} if self.config.critic_average < 1 else {}

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.draw_time(batch, "flash.t", self.config.times)
        if self.rollout.steps[sample.index].level > self.config.split or step < self.config.gan_start:
            return matching_loss(self.triad, batch, sample.clean(), t, self.config.weight)
        eps = batch.draw.normal("flash.eps", sample.x0.shape[1:])
        x_t = noised(self.triad.generator.schedule, sample.x0, torch.zeros_like(t), t, eps)
        _, _, adversarial = self.hear(x_t, t, batch.cond, stop=True)
        return self.config.gan_weight * adversarial, {"gan/generator": adversarial}

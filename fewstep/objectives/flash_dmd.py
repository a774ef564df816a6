"""Flash-DMD, stage 1 (Chen et al. 2025, arXiv:2511.20549): distributions at high noise, the discriminator at low noise.

A student step from a noisy input decides what is in the image and gets (F - R) / mean |x - R| alone; a step from a
cleaner one decides how it looks and gets the GAN's loss alone. The discriminator reads the frozen teacher, so the
critic only denoises, and after each move of the generator it is drawn toward it: psi <- d psi + (1 - d) theta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.schedule import add_noise
from fewstep.objectives import dmd2
from fewstep.objectives.base import Logs
from fewstep.objectives.pieces.matching import critic_loss, matching_loss
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

    def noisy(self, sample: Sample) -> bool:
        """Whether the sample was made from an input above the split."""
        return self.rollout.steps[sample.index].level > self.config.split

    def matched(self, sample: Sample, step: int) -> bool:
        """Whether its distribution is what counts: all samples', as long as the discriminator only learns."""
        return self.noisy(sample) or step < self.config.gan_start

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.draw_time(batch, "flash.t", self.config.times)
        if self.matched(sample, step):
            return matching_loss(self.triad, batch, sample.clean(), t, self.config.weight)
        x_t = self.noised(batch, sample, t, "flash.eps")
        _, _, adversarial = self.hear(x_t, t, batch.cond, stop=True)
        return self.config.gan_weight * adversarial, {"gan/generator": adversarial}

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        """Critic and discriminator learn from the samples that they judge: of all, the critic would know a mixture."""
        t = self.draw_time(batch, "flash.critic_t", self.config.critic_times)
        loss, logs = sample.x0.new_zeros(()), Logs()
        if self.matched(sample, step):
            loss = critic_loss(self.triad, batch, sample.clean(), t)
        if not self.noisy(sample):
            fake = self.features(self.noised(batch, sample, t, "flash.critic_eps"), t, batch.cond)
            adversarial, logs = self.discriminate(batch, fake)
            loss = loss + self.config.gan_critic_weight * adversarial
        return loss, logs

    def noised(self, batch: Batch, sample: Sample, t: Tensor, purpose: str) -> Tensor:
        eps = batch.draw.normal(purpose, sample.x0.shape[1:])
        return add_noise(self.triad.generator.schedule, sample.x0, eps, t)

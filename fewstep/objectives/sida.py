"""Adversarial score identity distillation, SiDA (Zhou et al. 2024, arXiv:2410.14919).

SiD, whose critic is a discriminator too: the channel mean of its encoder's last block is a map of logits l, without a
weight of its own. Generator: SiD's loss and softplus(-l) / mean |x - R|. Critic: denoising and
(softplus(l_fake) + softplus(-l_real)) / 2, where samples and real images share their noise and its level.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import add_noise
from fewstep.objectives import sid
from fewstep.objectives.base import Logs
from fewstep.objectives.pieces import gan
from fewstep.objectives.pieces.score_gap import abs_mean, denoising_loss, signals
from fewstep.rollout import Sample


@dataclass
class Config(sid.Config):
    name: str = "sida"
    alpha: float = 1.0
    """how much of the divergence as it stands is taken off: 1 (the paper's) | 1.2 | 0.5 (the exact gradient)"""
    gan_weight: float = 1e-4
    """of softplus(-l) / mean |x - R| in the generator's loss"""
    gan_critic_weight: float = 1.0
    """of the discriminator in the critic's loss"""
    gan_start: int = 0
    """step from which the discriminator reaches the generator; until then it only learns (paper: 200,000 images)"""
    generator_start: int = 0
    """step of the generator's first move; until then critic and discriminator learn alone (paper: 100,000 images)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.gan_start, self.generator_start) < 0:
            raise UserError(
                f"objective.gan_start and objective.generator_start are steps from 0, but {self.gan_start} and "
                f"{self.generator_start} were given"
            )
        if self.critic_guidance != 1:
            raise UserError("sida reads features of its critic unguided: set objective.critic_guidance=1, or use sid")
        if self.gan_weight < 0 or self.gan_critic_weight < 0:
            raise UserError(
                f"objective.gan_weight and objective.gan_critic_weight are at least 0, but {self.gan_weight} and "
                f"{self.gan_critic_weight} were given"
            )


class Objective(sid.Objective):
    reads = ("x0",)

    def generates(self, step: int) -> bool:
        start = self.config.generator_start
        return step >= start and super().generates(step - start)

    def divergence(self, x: Tensor, x_t: Tensor, t: Tensor, batch: Batch, step: int) -> tuple[Tensor, Logs]:
        if step < self.config.gan_start:
            return super().divergence(x, x_t, t, batch, step)
        real, fake = self.triad.real_score(x_t, t, batch.cond), self.judged(x_t, t, batch)
        adversarial = (softplus(-logits(fake)).mean(1) / abs_mean(x, real.x0).flatten()).mean()
        loss = self.identity(x, real, fake) + self.config.gan_weight * adversarial
        return loss, {**signals(x, real.x0, fake.x0), "gan/generator": adversarial.detach()}

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        assert batch.x0 is not None
        schedule = self.triad.generator.schedule
        t = self.draw_time(batch, "sid.critic_t", self.config.critic_times)
        eps = batch.draw.normal("sid.critic_eps", sample.x0.shape[1:])
        fake = self.judged(add_noise(schedule, sample.x0, eps, t), t, batch)
        real = self.judged(add_noise(schedule, batch.x0, eps, t), t, batch, stop=True)
        adversarial = 0.5 * gan.discriminator_loss(logits(fake), logits(real))
        loss = denoising_loss(fake, sample.x0, 0 * t, eps) + self.config.gan_critic_weight * adversarial
        return loss, {"gan/critic": adversarial, "gan/accuracy": gan.accuracy(logits(fake), logits(real))}

    def judged(self, x_t: Tensor, t: Tensor, batch: Batch, stop: bool = False) -> Prediction:
        """The critic's answer with the features of its encoder's last block."""
        critic = self.triad.fake_score
        return critic(x_t, t, batch.cond, taps=(critic.tap,), stop=stop)


def logits(judged: Prediction, clamp: float = 10.0) -> Tensor:
    """(B, L) channel means of the features, clamped; maps (B, C, H, W) have their channels first, tokens last."""
    (features,) = judged.features.values()
    channels = 1 if features.ndim == 4 else -1
    return features.float().mean(channels).clamp(-clamp, clamp).flatten(1)

"""What a method with a diffusion GAN beside its score gap shares: whose features are read, and by which losses.

The discriminator reads the critic's own features, or the frozen teacher's (DMD2, arXiv:2405.14867, section 4.3).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import add_noise
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone, unguided
from fewstep.models.head import Heads
from fewstep.objectives import base
from fewstep.objectives.base import Logs
from fewstep.objectives.pieces import gan
from fewstep.objectives.pieces.gan import GanLoss


@dataclass
class GanConfig:
    name: str = ""
    critic_times: Times = field(default_factory=Times)
    """times at which critic and discriminator are trained"""
    gan_weight: float = 3e-3
    """of softplus(-D) in the generator's loss; 0 = no GAN and no data"""
    gan_critic_weight: float = 1e-2
    """of the discriminator in the critic's loss"""
    gan_features: Literal["fake", "teacher"] = "fake"
    """whose features the discriminator reads"""
    gan_taps: list[str] = field(default_factory=list)
    """blocks that are read, each by a head of its own; default: the family's middle block"""
    gan_loss: GanLoss = "softplus"
    """softplus (non-saturating) | hinge"""
    gan_start: int = 0
    """step from which the discriminator reaches the generator; until then it only learns"""
    gan_r1: float = 0.0
    """weight of the discriminator's approximate R1 penalty beside its loss; costs another pass of the real images"""
    gan_r1_noise: float = 0.1
    """deviation of the noise on real images between which that penalty compares"""

    def __post_init__(self) -> None:
        if min(self.gan_weight, self.gan_critic_weight, self.gan_start, self.gan_r1) < 0:
            raise UserError("objective.gan_weight, gan_critic_weight, gan_start and gan_r1 are at least 0")
        if not self.gan_r1_noise > 0:
            raise UserError(f"objective.gan_r1_noise is a deviation above 0, but {self.gan_r1_noise} was given")


class Adversarial(base.Objective):
    """An objective whose Config is a GanConfig. Without gan_weight there are no heads, and nothing is read."""

    stream: ClassVar[str] = "gan"
    """what its draws are called"""

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.heads: Heads | None = None
        if config.gan_weight:
            self.taps = tuple(config.gan_taps) or (self.watched.tap,)

    @property
    def watched(self) -> Backbone:
        """The network whose features the discriminator reads."""
        return self.triad.fake_score if self.config.gan_features == "fake" else unguided(self.triad.real_score)

    def attach(self, x: Tensor, cond: Condition) -> None:
        """Makes the heads that fit the features of inputs such as x (B, *S)."""
        if self.config.gan_weight:
            self.heads = gan.heads_for(self.watched, self.taps, x, cond)

    def learns(self):
        return {"fake_score": [self.heads]} if self.heads is not None else {}

    def judge(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The critic's x0 and the logits (B,), both detached, and the GAN's loss, differentiable in x_t alone."""
        fake_score, logits, adversarial = self.triad.fake_score, None, None
        if self.heads is not None:
            prediction, logits, adversarial = self.hear(x_t, t, cond, stop=self.watched is not fake_score)
            if self.watched is fake_score:
                return prediction.x0.detach(), logits, adversarial
        with torch.no_grad():
            return fake_score(x_t, t, cond).x0, logits, adversarial

    def hear(self, x_t: Tensor, t: Tensor, cond: Condition, stop: bool) -> tuple[Prediction, Tensor, Tensor]:
        """A pass of the watched network, the logits (B,) and the GAN's loss, differentiable in x_t alone."""
        assert self.heads is not None
        return gan.heard(self.watched, self.heads, x_t, t, cond, self.config.gan_loss, stop)

    def features(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """A stopped forward; the teacher's features carry no graph."""
        with nullcontext() if self.watched is self.triad.fake_score else torch.no_grad():
            return self.watched(x_t, t, cond, taps=self.taps, stop=True)

    def discriminate(self, batch: Batch, fake: Prediction) -> tuple[Tensor, Logs]:
        """softplus(l_fake) + softplus(-l_real), the real images noised on their own, and the penalty around these."""
        assert self.heads is not None and batch.x0 is not None
        t = self.draw_time(batch, f"{self.stream}.real_t", self.config.critic_times)
        eps = batch.draw.normal(f"{self.stream}.real_eps", batch.x0.shape[1:])
        fake_logits, real_logits = self.heads.each(fake.features), self.opinion(batch.x0, t, eps, batch.cond)
        loss = gan.discriminator_loss(fake_logits, real_logits, self.config.gan_loss)
        logs = {"gan/critic": loss, "gan/accuracy": gan.accuracy(fake_logits, real_logits)}
        if self.config.gan_r1:
            beside = batch.x0 + self.config.gan_r1_noise * batch.draw.normal(
                f"{self.stream}.beside", batch.x0.shape[1:]
            )
            logs["gan/r1"] = gan.roughness(real_logits, self.opinion(beside, t, eps, batch.cond))
            loss = loss + self.config.gan_r1 * logs["gan/r1"]
        return loss, logs

    def opinion(self, x0: Tensor, t: Tensor, eps: Tensor, cond: Condition) -> Tensor:
        """The logits (B, heads) of images x0 (B, *S), noised."""
        assert self.heads is not None
        x_t = add_noise(self.triad.generator.schedule, x0, eps, t)
        return self.heads.each(self.features(x_t, t, cond).features)

"""DMD2 (Yin et al. 2024, arXiv:2405.14867): two time scales, a GAN, and simulated inputs for several steps.

Generator: (F - R) / mean |x - R| and softplus(-D). Critic: denoising on the generator's samples and the
discriminator, which reads the critic's own features.

One critic pass serves two purposes wherever it can: on the generator's turn the score and the features come from
the same noised sample, on the critic's turn the denoising loss and the fake logits do; the real images and the
teacher's features need a stopped forward only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone
from fewstep.objectives.base import Logs
from fewstep.objectives.pieces.adversarial import Adversarial, GanConfig
from fewstep.objectives.pieces.distances import Distance
from fewstep.objectives.pieces.exits import Exits
from fewstep.objectives.pieces.paired import paired_loss, refuse_fresh_noise
from fewstep.objectives.pieces.score_gap import (
    Weight,
    denoising_loss,
    direction,
    noised,
    signals,
    surrogate,
)
from fewstep.rollout import Sample


@dataclass
class Config(GanConfig):
    name: str = "dmd2"
    weight: Weight = "abs_mean"
    """of the score gap: abs_mean | snr | none"""
    times: Times = field(default_factory=lambda: Times(low=0.02, high=0.98))
    """times at which the scores are compared"""
    ratio: int = 5
    """steps for each generator move; the critic moves at every step"""
    critic_on_generator_step: bool = True
    """False: the critic rests when the generator moves, so it moves ratio - 1 times (FastGen)"""
    exits: Exits = field(default_factory=Exits)
    """of several steps: the one that is trained"""
    backward_simulation: bool = True
    """start later steps from the student's own samples; False: from noised real images"""
    regression: float = 0.0
    """weight of DMD's regression to teacher pairs, which holds on to what is rare; 0 = none, as in the paper"""
    distance: Distance = "l2"
    """of the regression: l2 | l1 | huber"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio < 1:
            raise UserError(f"objective.ratio is at least 1, but {self.ratio} was given")
        if self.ratio == 1 and not self.critic_on_generator_step:
            raise UserError("objective.critic_on_generator_step=false needs a ratio above 1: the critic never moved")
        if not self.backward_simulation and self.exits != Exits():
            raise UserError("objective.exits is for simulated inputs: set backward_simulation=true, or leave exits out")
        if self.regression < 0:
            raise UserError(f"objective.regression is at least 0, but {self.regression} was given")


@dataclass(frozen=True)
class Look:
    """One comparison of the generator's samples `x` (B, *S): at x_t the teacher's x0 `real`, the critic's x0 `fake`.

    `logits` (B,) are the discriminator's; all of these are detached. `adversarial` is its loss for the generator.
    """

    x: Tensor
    x_t: Tensor
    t: Tensor
    real: Tensor
    fake: Tensor
    logits: Tensor | None
    adversarial: Tensor | None


class Objective(Adversarial):
    roles: ClassVar[tuple[str, ...]] = ("generator", "real_score", "fake_score")
    stream = "dmd2"

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.reads = ("x0",) if config.gan_weight or not config.backward_simulation else ()
        if config.regression:
            refuse_fresh_noise(rollout)
            self.reads += ("pair",)

    @property
    def real(self) -> Backbone:
        """The network that gives the real score."""
        return self.triad.real_score

    def generates(self, step: int) -> bool:
        return step % self.config.ratio == 0

    def criticises(self, step: int) -> bool:
        return self.config.critic_on_generator_step or not self.generates(step)

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        exits, net = self.config.exits, self.triad.generator
        exit = exits.at(self.rollout, batch.draw, "dmd2.exit")
        if self.config.backward_simulation or exit == 0:
            return self.rollout(net, batch.noise, batch.cond, batch.draw, exit=exit, grad=exits.window * grad)
        assert batch.x0 is not None
        return self.rollout.alone(net, batch.x0, batch.noise, batch.cond, batch.draw, exit, grad)

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        look = self.heard(self.look(batch, sample), step)
        return self.loss_along(batch, sample, look, self.gradient(batch, sample, look))

    def look(self, batch: Batch, sample: Sample) -> Look:
        """What the teacher, the critic and the discriminator say of the sample, noised to a random time."""
        x = sample.x0.detach()
        t = self.draw_time(batch, "dmd2.t", self.config.times)
        eps = batch.draw.normal("dmd2.eps", x.shape[1:])
        x_t = noised(self.triad.generator.schedule, sample.x0, torch.zeros_like(t), t, eps)
        with torch.no_grad():
            real = self.real(x_t.detach(), t, batch.cond).x0
        fake, logits, adversarial = self.judge(x_t, t, batch.cond)
        return Look(x, x_t.detach(), t, real, fake, logits, adversarial)

    def heard(self, look: Look, step: int) -> Look:
        """Without the discriminator's loss, as long as it only learns."""
        return replace(look, adversarial=None) if step < self.config.gan_start else look

    def gradient(self, batch: Batch, sample: Sample, look: Look) -> Tensor:
        """Along which the generator's sample moves, (B, *S): the weighted F - R."""
        clean, schedule = torch.zeros_like(look.t), self.triad.generator.schedule
        return direction(look.real, look.fake, look.x, self.config.weight, schedule, clean, look.t)

    def loss_along(self, batch: Batch, sample: Sample, look: Look, gradient: Tensor) -> tuple[Tensor, Logs]:
        """The score gap's loss with that gradient, the GAN's and the regression's."""
        loss, logs = surrogate(sample.x0, gradient), signals(look.x, look.real, look.fake)
        if look.adversarial is not None:
            logs["gan/generator"] = look.adversarial
            loss = loss + self.config.gan_weight * look.adversarial
        if self.config.regression:
            window, args = self.config.exits.window, (self.triad.generator, self.rollout, batch)
            logs["regression"] = paired_loss(*args, sample.index, window, self.config.distance)
            loss = loss + self.config.regression * logs["regression"]
        return loss, logs

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.draw_time(batch, "dmd2.critic_t", self.config.critic_times)
        eps = batch.draw.normal("dmd2.critic_eps", sample.x0.shape[1:])
        clean = torch.zeros_like(sample.s)
        x_t = noised(self.triad.generator.schedule, sample.x0, clean, t, eps)
        own = self.heads is not None and self.watched is self.triad.fake_score
        prediction = self.triad.fake_score(x_t, t, batch.cond, taps=self.taps if own else ())
        loss = denoising_loss(prediction, sample.x0, clean, eps)
        if self.heads is None:
            return loss, {}
        fake = prediction if own else self.features(x_t, t, batch.cond)
        adversarial, logs = self.discriminate(batch, fake)
        return loss + self.config.gan_critic_weight * adversarial, logs

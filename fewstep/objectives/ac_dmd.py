"""AC-DMD (the first stage of RTDMD, github.com/Harahan/RTDMD): every step on its own sub-interval, a consistent critic.

A step that ends at level s hands on x_s. The scores are compared at t in (s, 1): teacher and critic each take one step
of the sampler back to s with the same noise, and the gradient is (x_s^F - x_s^R) / mean |x_s - x_s^R|. The critic
learns the unbiased bridge target, and that what it says at t is the mean of what it will say at t' < t: two
independent steps h_1, h_2 from t to t' give mean (h_1 - h) (h_2 - h), an unbiased estimate of the squared bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.times import Times
from fewstep.objectives import base
from fewstep.objectives.base import Logs
from fewstep.objectives.pieces.score_gap import abs_mean, denoising_loss, noised, signals, surrogate
from fewstep.rollout import Sample, ode


@dataclass
class Config:
    name: str = "ac_dmd"
    times: Times = field(default_factory=lambda: Times(low=0.01, high=0.98))
    """where in (s, 1) scores are compared and the critic is trained, as a share of that interval"""
    ratio: int = 10
    """steps for each generator move; the critic moves at every step"""
    consistency: float = 0.01
    """weight of the critic's consistency; costs two more critic passes, 0 = none"""
    reach: float = 0.2
    """how far below t the critic is asked again, at most"""

    def __post_init__(self) -> None:
        if self.ratio < 1 or self.consistency < 0:
            raise UserError("objective.ratio is at least 1 and objective.consistency at least 0")
        if not 0 < self.reach <= 1:
            raise UserError(f"objective.reach is a time in (0, 1], but {self.reach} was given")
        if self.times.low == 0:
            raise UserError("objective.times needs low > 0: the bridge from s to t is singular as t reaches s")


class Objective(base.Objective):
    roles = ("generator", "real_score", "fake_score")

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.partial = len(rollout) > 1
        if config.consistency and rollout.step is ode:
            raise UserError(
                "objective.consistency compares two noisy steps of the sampler, but model.transition=ode has no noise: "
                "set model.transition=cps (with eta=0.9) or renoise, or objective.consistency=0"
            )

    def generates(self, step: int) -> bool:
        return step % self.config.ratio == 0

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        """Exits at a random step and hands its state on at the level where that step ends."""
        exit = batch.draw.shared_integer("ac.exit", len(self.rollout))
        stop = self.rollout.level_after(exit)
        return self.rollout(
            self.triad.generator, batch.noise, batch.cond, batch.draw, exit=exit, stop=stop, grad=int(grad)
        )

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t, x, z = self.time(batch, sample, "ac.t"), sample.x.detach(), batch.draw.normal("ac.z", sample.x.shape[1:])
        x_t = noised(self.triad.generator.schedule, x, sample.s, t, batch.draw.normal("ac.eps", x.shape[1:]))
        with torch.no_grad():
            real, fake = self.triad.real_score(x_t, t, batch.cond), self.triad.fake_score(x_t, t, batch.cond)
            to_real, to_fake = self.stepped(real, sample.s, z), self.stepped(fake, sample.s, z)
            gradient = (to_fake - to_real) / abs_mean(x, to_real)
        return surrogate(sample.x, gradient), signals(sample.x0.detach(), real.x0, fake.x0)

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t, eps = self.time(batch, sample, "ac.critic_t"), batch.draw.normal("ac.critic_eps", sample.x.shape[1:])
        x_t = noised(self.triad.generator.schedule, sample.x, sample.s, t, eps)
        prediction = self.triad.fake_score(x_t, t, batch.cond)
        loss = denoising_loss(prediction, sample.x, sample.s, eps)
        if not self.config.consistency:
            return loss, {}
        bias = self.bias(batch, prediction)
        return loss + self.config.consistency * bias, {"bias": bias}

    def bias(self, batch: Batch, here: Prediction) -> Tensor:
        """mean (h_1 - h) (h_2 - h) over two independent steps of the sampler to one cleaner time; may be negative."""
        down = self.config.reach * batch.draw.uniform("ac.down")
        later = here.schedule.snap((here.t - down).clamp(min=self.config.times.low))
        z = [batch.draw.normal(f"ac.later_{i}", here.x_t.shape[1:]) for i in (1, 2)]
        x = torch.cat([self.stepped(here, later, noise).detach() for noise in z])
        again = self.triad.fake_score(x, torch.cat([later, later]), Condition.cat(batch.cond, batch.cond))
        first, second = again.x0.chunk(2)
        return ((first - here.x0) * (second - here.x0)).mean()

    def stepped(self, prediction: Prediction, s: Tensor, z: Tensor) -> Tensor:
        """One step of the student's sampler to s (B,), with the noise z."""
        mean, std = self.rollout.step(prediction, s)
        return mean if std is None else mean + std * z

    def time(self, batch: Batch, sample: Sample, purpose: str) -> Tensor:
        """t (B,) between the level of the sample and pure noise."""
        return self.draw_time(batch, purpose, self.config.times, above=sample.s)

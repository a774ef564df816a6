"""LADD (Sauer et al. 2024, arXiv:2403.12015): a GAN in the latents of the teacher, and nothing else.

Real are the guided teacher's own samples. The student denoises them from one of its times; both its answer and the
sample are noised to a logit-normal time, alike, and read by heads on several blocks of the frozen teacher.
Discriminator: max(0, 1 + l_fake) + max(0, 1 - l_real), and an approximate R1. Generator: -l_fake.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import add_noise
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone, unguided
from fewstep.models.head import Heads
from fewstep.objectives import base
from fewstep.objectives.base import Logs, Turn, Turns, sample_logs
from fewstep.objectives.pieces import gan
from fewstep.objectives.pieces.gan import GanLoss
from fewstep.rollout import Sample

FINE = 1 << 20


@dataclass
class Config:
    name: str = "ladd"
    times: Times = field(default_factory=lambda: Times(law="logit_normal", mean=1.0))
    """times at which samples are compared; a larger mean looks at the layout, a smaller one at details"""
    input_weights: list[float] = field(default_factory=list)
    """how often the student starts from each of its times, noisiest first; default: from all alike"""
    ratio: int = 1
    """steps for each generator move; the discriminator moves at every step"""
    gan_loss: GanLoss = "hinge"
    """hinge | softplus (non-saturating)"""
    gan_taps: list[str] = field(default_factory=list)
    """blocks of the teacher that are read, each by a head of its own; default: the family's middle block"""
    gan_r1: float = 0.1
    """weight of the discriminator's approximate R1 penalty; 0 = none, which saves a pass of the real samples"""
    gan_r1_noise: float = 0.1
    """deviation of the noise on real samples between which that penalty compares"""

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise UserError(f"objective.ratio is at least 1, but {self.ratio} was given")
        if self.input_weights and (min(self.input_weights) < 0 or sum(self.input_weights) <= 0):
            raise UserError(
                "objective.input_weights are numbers from 0, not all of them 0, but "
                f"{self.input_weights} were given: leave it out for equal ones"
            )
        if self.gan_r1 < 0 or not self.gan_r1_noise > 0:
            raise UserError(
                "objective.gan_r1 is at least 0 and objective.gan_r1_noise above 0, but "
                f"{self.gan_r1} and {self.gan_r1_noise} were given"
            )


class Objective(base.Objective):
    roles = ("generator", "real_score")
    reads = ("pair",)

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        weights = config.input_weights or [1.0] * len(rollout)
        if len(weights) != len(rollout):
            raise UserError(
                f"objective.input_weights has a number for each of the student's {len(rollout)} steps, but "
                f"{len(weights)} were given"
            )
        self.shares = [part / sum(weights) for part in accumulate(weights)]
        self.heads: Heads | None = None

    @property
    def teacher(self) -> Backbone:
        """Without its guidance: whose features the discriminator reads."""
        return unguided(self.triad.real_score)

    def attach(self, x: Tensor, cond: Condition) -> None:
        self.heads = gan.heads_for(self.teacher, tuple(self.config.gan_taps) or (self.teacher.tap,), x, cond)

    def learns(self):
        return {"discriminator": [self.heads]}

    def generates(self, step: int) -> bool:
        return step % self.config.ratio == 0

    def turns(self, batch: Batch, step: int) -> Turns:
        sample = self.sample(batch, step, grad=self.generates(step))
        if self.generates(step):
            loss, logs = self.generator_loss(batch, sample, step)
            yield Turn("generator", loss, {**logs, **sample_logs(sample.x0, batch.pair)})  # type: ignore[arg-type]
        loss, logs = self.discriminator_loss(batch, sample.detach())
        yield Turn("discriminator", loss, logs)

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        """One step of the student, from a sample of the teacher that is noised to where the step begins."""
        assert batch.pair is not None
        exit = bisect_right(self.shares, batch.draw.shared_integer("ladd.exit", FINE) / FINE)
        net, pair = self.triad.generator, batch.pair
        return self.rollout.alone(net, pair.x0, batch.noise, pair.cond, batch.draw, exit, grad)

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        assert batch.pair is not None and self.heads is not None
        t = self.draw_time(batch, "ladd.t", self.config.times)
        x_t = add_noise(self.teacher.schedule, sample.x0, batch.draw.normal("ladd.eps", sample.x0.shape[1:]), t)
        _, _, loss = gan.heard(self.teacher, self.heads, x_t, t, batch.pair.cond, self.config.gan_loss)
        return loss, {}

    def discriminator_loss(self, batch: Batch, sample: Sample) -> tuple[Tensor, Logs]:
        assert batch.pair is not None
        real, t = batch.pair.x0, self.draw_time(batch, "ladd.critic_t", self.config.times)
        eps = batch.draw.normal("ladd.critic_eps", real.shape[1:])
        fake_logits, real_logits = (self.opinion(x, t, eps, batch.pair.cond) for x in (sample.x0, real))
        loss = gan.discriminator_loss(fake_logits, real_logits, self.config.gan_loss)
        logs = {"gan/accuracy": gan.accuracy(fake_logits, real_logits)}
        if self.config.gan_r1:
            beside = real + self.config.gan_r1_noise * batch.draw.normal("ladd.beside", real.shape[1:])
            logs["gan/r1"] = gan.roughness(real_logits, self.opinion(beside, t, eps, batch.pair.cond))
            loss = loss + self.config.gan_r1 * logs["gan/r1"]
        return loss, logs

    def opinion(self, x0: Tensor, t: Tensor, eps: Tensor, cond: Condition) -> Tensor:
        """The logits (B, heads) of x0 (B, *S), noised; the teacher's features carry no graph."""
        assert self.heads is not None
        with torch.no_grad():
            x_t = add_noise(self.teacher.schedule, x0, eps, t)
            features = self.teacher(x_t, t, cond, taps=self.heads.names, stop=True).features
        return self.heads.each(features)

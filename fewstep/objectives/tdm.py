"""Trajectory distribution matching (Luo et al. 2025, arXiv:2503.06674): every point of a student's path is matched.

The K steps are deterministic. Step i leads from its input's level to x_s, s its clean end, and the scores are compared
on that interval alone: x_t = a x_s + b eps with t between the two levels, so one critic serves K laws that do not meet.
Generator: pseudo-Huber of F - R, over mean |x - R| with x the step's prediction of the clean sample. Critic: by default
the regression of that x with weight min(SNR, 5) and importance weights, for x is no draw of the clean sample that
belongs to x_s; the bridge target has that bias neither with the weights nor without. One step is DMD.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.schedule import NoiseSchedule, expand
from fewstep.core.times import Times
from fewstep.objectives import base
from fewstep.objectives.base import Logs, Triad
from fewstep.objectives.pieces.counted import Counted
from fewstep.objectives.pieces.matching import critic_loss, matching_loss
from fewstep.objectives.pieces.score_gap import Weight, noised
from fewstep.rollout import Rollout, Sample, ode


@dataclass
class Config:
    name: str = "tdm"
    weight: Weight = "abs_mean"
    """of the score gap: abs_mean (the paper's) | snr | none"""
    huber: float = 1e-3
    """c of the pseudo-Huber sqrt(gap^2 + c^2) - c that the generator descends; 0 = plain squares, as in DMD"""
    times: Times = field(default_factory=lambda: Times(low=0.02, high=0.98))
    """where in the step's interval the scores are compared, as a share of it"""
    critic_times: Times = field(default_factory=lambda: Times(low=0.02))
    """where in the step's interval the critic is trained, as a share of it"""
    own_interval: bool = True
    """times end at the level of the step's input; False: at 1"""
    critic_target: Literal["clean", "pred_x0", "bridge"] = "pred_x0"
    """pred_x0: x from the noised x_s (the paper's) | bridge: unbiased, from x_s | clean: x from the noised x"""
    counts: list[int] = field(default_factory=list)
    """numbers of steps to learn at once, divisors of model.steps, of which both networks are told (TDM-unify)"""
    importance: bool = True
    """weigh pred_x0 by how likely x makes the noised x_s"""
    ratio: int = 1
    """critic moves for each generator move"""

    def __post_init__(self) -> None:
        if self.ratio < 1 or self.huber < 0:
            raise UserError(
                f"objective.ratio is at least 1 and objective.huber at least 0, but {self.ratio} and {self.huber} "
                "were given"
            )


class Objective(base.Objective):
    roles = ("generator", "real_score", "fake_score")

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.partial = len(rollout) > 1
        if wrong := [count for count in config.counts if count < 1 or len(rollout) % count]:
            raise UserError(f"objective.counts are divisors of model.steps, {len(rollout)}, but {wrong[0]} was given")
        self.walks = [rollout.every(len(rollout) // count) for count in config.counts] or [rollout]
        if self.partial and 0 in (config.times.low, config.critic_times.low):
            raise UserError(
                "objective.times.low and objective.critic_times.low are above 0 with several steps, because the bridge "
                "from s to t is singular as t reaches s: use 0.02"
            )

    def refuse(self, rollout: Rollout) -> None:
        if len(rollout) > 1 and rollout.step is not ode:
            raise UserError("tdm matches the points of a deterministic path: set model.transition=ode")

    @classmethod
    def counts(cls, config: Any) -> bool:
        return bool(config.counts)

    def walk(self, batch: Batch) -> Rollout:
        """The one of this step, alike for the whole batch."""
        return self.walks[batch.draw.shared_integer("tdm.count", len(self.walks))]

    def judges(self, batch: Batch) -> Triad:
        """The networks, of which the critic is told how many steps the sample was given."""
        count = self.walk(batch).count
        return self.triad if count is None else replace(self.triad, fake_score=Counted(self.triad.fake_score, count))

    def generates(self, step: int) -> bool:
        return step % self.config.ratio == 0

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        """Exits at a random step, at the level where that step ends."""
        walk = self.walk(batch)
        exit = batch.draw.shared_integer("tdm.exit", len(walk))
        stop, net = walk.level_after(exit), self.triad.generator
        return walk(net, batch.noise, batch.cond, batch.draw, exit=exit, stop=stop, grad=int(grad))

    def time(self, batch: Batch, sample: Sample, purpose: str, times: Times) -> Tensor:
        """t (B,) in the interval of the sample's step."""
        below = sample.t if self.config.own_interval else None
        return self.draw_time(batch, purpose, times, above=sample.s, below=below)

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.time(batch, sample, "tdm.t", self.config.times)
        return matching_loss(self.judges(batch), batch, sample, t, self.config.weight, self.config.huber)

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.time(batch, sample, "tdm.critic_t", self.config.critic_times)
        if self.config.critic_target == "pred_x0":
            return self.regression(batch, sample, t), {}
        of = sample.clean() if self.config.critic_target == "clean" else sample
        return critic_loss(self.judges(batch), batch, of, t), {}

    def regression(self, batch: Batch, sample: Sample, t: Tensor) -> Tensor:
        """min(SNR, 5) w |F(x_t) - x|^2 for the step's prediction x."""
        schedule, x = self.triad.generator.schedule, sample.x0
        eps = batch.draw.normal("tdm.critic_eps", x.shape[1:])
        x_t = noised(schedule, sample.x, sample.s, t, eps)
        c = schedule.at(t, x)
        weight = (c.alpha / c.sigma).square().clamp(max=5.0)
        if self.config.importance:
            weight = weight * importance(schedule, x, x_t, t, eps)
        return (weight * (self.judges(batch).fake_score(x_t, t, batch.cond).x0 - x).square()).mean()


def importance(schedule: NoiseSchedule, x: Tensor, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """(B, 1, .., 1): density at x_t of x noised, over that of the eps (B, *S) that was drawn, of a mean coordinate."""
    c = schedule.at(t, x)
    mixed = (x_t - c.alpha * x) / c.sigma
    more = (eps.square() - mixed.square()).flatten(1).mean(1)
    return expand((0.5 * more).exp(), x)

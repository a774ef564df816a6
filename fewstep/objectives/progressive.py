"""Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512): one step for every two of the teacher.

From x_t at one of the student's own times, the teacher takes two DDIM steps, t -> m -> e, to where the student's step
ends. One DDIM step lands there too, if x0 is

    x~ = (x_e - sigma_e / sigma_t x_t) / (alpha_e - sigma_e / sigma_t alpha_t)

L = E w |x~ - x0(x_t, t)|^2 with w = max(SNR, 1) or SNR + 1. Stages halve the steps; from the second one on the teacher
is the last stage's student (`objective.target_teacher: previous.generator`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.schedule import add_noise, expand, shift
from fewstep.models.backbone import Backbone, unguided
from fewstep.objectives import base
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.rollout import Rollout, ode


@dataclass
class Config:
    name: str = "progressive"
    target_teacher: str | None = None
    """previous.generator: the last stage's student, or a run or model folder; default: the teacher itself"""
    weight: Literal["truncated_snr", "snr_plus_one"] = "truncated_snr"
    """max(SNR, 1) | SNR + 1, of x0"""
    largest_weight: float = 1e4
    """keeps the weight finite at low noise"""
    shift: float = 1.0
    """that of model.shift: the middle of a step is even before the shift"""

    def __post_init__(self) -> None:
        if self.largest_weight < 1 or self.shift <= 0:
            raise UserError(
                "objective.largest_weight is at least 1 and objective.shift above 0, but "
                f"{self.largest_weight} and {self.shift} were given"
            )


class Objective(base.Objective):
    reads = ("x0",)

    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        return ("generator", "target_score" if config.target_teacher else "real_score")

    def refuse(self, rollout: Rollout) -> None:
        if len(rollout) > 1 and rollout.step is not ode:
            raise UserError("progressive distillation walks without fresh noise: set model.transition=ode")
        even = [1 - i / len(rollout) for i in range(len(rollout))]
        meant = shift(torch.tensor(even, dtype=torch.float64), self.config.shift)
        if (meant - torch.tensor([step.level for step in rollout.steps], dtype=torch.float64)).abs().max() > 5e-3:
            raise UserError(
                f"the student's steps are not those of objective.shift={self.config.shift}: set it to model.shift, or "
                "to the shift of the teacher's scheduler"
            )

    @property
    def teacher(self) -> Backbone:
        """A student of an earlier stage has its guidance inside."""
        return self.triad.real_score if self.triad.real_score is not None else unguided(self.triad.target_score)

    def turns(self, batch: Batch, step: int) -> Turns:
        assert batch.x0 is not None
        net, (t, m, e) = self.triad.generator, self.interval(batch)
        eps = batch.draw.normal("progressive.eps", batch.x0.shape[1:])
        pure = expand(t == t.new_tensor(self.rollout.steps[0].level), eps)
        x_t = torch.where(pure, eps * net.schedule.prior_std, add_noise(net.schedule, batch.x0, eps, t))
        with torch.no_grad():
            target = self.target(x_t, t, m, e, batch)
        prediction = net(x_t, t, batch.cond)
        weight = self.weight(t, x_t)
        loss = (weight * (prediction.x0 - target).square()).mean()
        yield Turn("generator", loss, sample_logs(prediction.x0, batch))

    def interval(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Beginning, middle and end (B,) of a random step of the student."""
        index = batch.draw.integers("progressive.step", len(self.rollout))
        ends = [*(step.level for step in self.rollout.steps), 0.0]
        levels = torch.tensor(ends, device=index.device)
        t, e = levels[index], levels[index + 1]
        even = [shift(level.double(), 1 / self.config.shift) for level in (t, e)]
        m = shift(0.5 * (even[0] + even[1]), self.config.shift).float()
        return t, self.triad.generator.schedule.snap(m), e

    def target(self, x_t: Tensor, t: Tensor, m: Tensor, e: Tensor, batch: Batch) -> Tensor:
        """x~ (B, *S)."""
        x_m = self.teacher(x_t, t, batch.cond).to(m)
        x_e = self.teacher(x_m, m, batch.cond).to(e)
        at_t, at_e = (self.triad.generator.schedule.at(time, x_t) for time in (t, e))
        ratio = at_e.sigma / at_t.sigma
        return (x_e - ratio * x_t) / (at_e.alpha - ratio * at_t.alpha)

    def weight(self, t: Tensor, like: Tensor) -> Tensor:
        c = self.triad.generator.schedule.at(t, like)
        snr = (c.alpha / c.sigma).square()
        chosen = snr.clamp(min=1.0) if self.config.weight == "truncated_snr" else snr + 1
        return chosen.clamp(max=self.config.largest_weight)

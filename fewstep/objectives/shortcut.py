"""Shortcut models (Frans et al. 2024, arXiv:2410.12557): a step of any dyadic size, learnt from its two halves.

On a ladder of 128 rungs a network is told where its step from x_t ends. Steps over one rung are flow matching: the
teacher's velocity, or eps - x0 of data. A share of the rows, the bootstrap, has steps over 2, 4, .. or 128 rungs from
multiples of these, and learns to land where two half steps of a follower land, x_t -> x_m -> x_s:

    L = |u(x_t, t, s) - sg (u'(x_t, t, m) + u'(x_m, m, s)) / 2|^2

Both the target and x_m are clamped. No derivatives are taken. A network of another process than the flow learns the
same steps in its own output, on the rungs of its own process. Guidance without a teacher is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import add_noise, expand
from fewstep.core.times import Grid
from fewstep.models.backbone import Backbone
from fewstep.objectives import base
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.rollout import Rollout, ode


@dataclass
class Config:
    name: str = "shortcut"
    mode: Literal["distillation", "training"] = "distillation"
    """distillation: the (guided) teacher's velocity; training: that of data, no teacher"""
    grid: Grid = field(default_factory=lambda: Grid(128))
    """the ladder; its count is a power of two"""
    bootstrap: float = 0.125
    """share of rows that learn from two half steps"""
    target_decay: float = 0.999
    """of the follower that takes them, in generator moves"""
    clamp: float = 4.0
    """largest size of a value of their targets and states"""

    def __post_init__(self) -> None:
        count = self.grid.count
        if count < 2 or count & (count - 1):
            raise UserError(f"objective.grid.count is a power of two from 2 on, but {count} was given")
        if not 0 < self.bootstrap <= 1 or not 0 <= self.target_decay < 1 or not self.clamp > 0:
            raise UserError(
                "objective.bootstrap is a share above 0, objective.target_decay a decay in [0, 1) and objective.clamp "
                f"above 0, but {self.bootstrap}, {self.target_decay} and {self.clamp} were given"
            )


class Objective(base.Objective):
    reads = ("x0",)

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.rungs = config.grid.times(triad.generator.schedule)
        for i, step in enumerate(rollout.steps):
            self.on_the_ladder(step.told, rollout.level_after(i))

    @classmethod
    def two_times(cls, config: Any) -> bool:
        return True

    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        return ("generator", "real_score") if config.mode == "distillation" else ("generator",)

    def followers(self) -> dict[str, float]:
        return {"target": self.config.target_decay}

    def refuse(self, rollout: Rollout) -> None:
        if rollout.step is not ode:
            raise UserError("shortcut learns steps from rung to rung without fresh noise: set model.transition=ode")

    def on_the_ladder(self, start: float, end: float) -> None:
        """Raises UserError for a step that is never learnt."""
        count, times = self.config.grid.count, self.rungs
        at = [int((times - time).abs().argmin()) for time in (start, end)]
        size, off = at[0] - at[1], max(abs(float(times[i]) - time) for i, time in zip(at, (start, end), strict=True))
        if size < 1 or size & (size - 1) or at[0] % size or off > 0.25 / count:
            raise UserError(
                f"a step from {start:.3f} to {end:.3f} is none of the ladder of {count} rungs: take 1, 2, 4, .. steps, "
                "and the shift of the model for objective.grid.shift"
            )

    def turns(self, batch: Batch, step: int) -> Turns:
        net, x0 = self.triad.generator, batch.x0
        assert x0 is not None
        halved, start, size = self.steps(batch)
        t, s = self.rungs.to(x0.device)[start], self.rungs.to(x0.device)[start - size]
        eps = batch.draw.normal("shortcut.eps", x0.shape[1:])
        x_t = add_noise(net.schedule, x0, eps, t)
        read = Prediction(x_t, net.kind, x_t, t, net.schedule)
        target = self.matched(read, x0, eps, batch.cond)
        # One row at least: every process of a sharded run asks its networks equally often.
        rows = halved.long().argsort(descending=True)[: max(1, int(halved.sum()))]
        two = self.bootstrapped(read, self.rungs.to(x0.device)[start - size // 2], s, batch.cond, rows)
        target = target.index_copy(0, rows, torch.where(expand(halved[rows], two), two, target[rows]))
        prediction = net(x_t, t, batch.cond, to=s)
        residual = (prediction.value.float() - target).square().flatten(1).mean(1)
        logs = {"residual/matched": residual[~halved].detach().sum() / (~halved).sum().clamp(min=1)}
        logs["residual/bootstrap"] = residual[halved].detach().sum() / halved.sum().clamp(min=1)
        yield Turn("generator", residual.mean(), {**logs, **sample_logs(prediction.x0, batch)})

    def steps(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) each: whether a row is bootstrapped, the rung where its step begins, and over how many rungs it goes."""
        count, draw = self.config.grid.count, batch.draw
        halved = draw.uniform("shortcut.bootstrap") < self.config.bootstrap
        size = count >> draw.integers("shortcut.size", count.bit_length() - 1)
        size = torch.where(halved, size, 1)
        start = size * (1 + (draw.uniform("shortcut.t") * (count // size)).long())
        return halved, start, size

    @torch.no_grad()
    def matched(self, read: Prediction, x0: Tensor, eps: Tensor, cond: Condition) -> Tensor:
        """What the network would say at `read` of the flow at x_t itself."""
        if self.config.mode == "training":
            return read.target(x0, eps)
        said = self.triad.real_score(read.x_t, read.t, cond)
        return read.target(said.x0, said.eps)

    @torch.no_grad()
    def bootstrapped(self, read: Prediction, m: Tensor, s: Tensor, cond: Condition, rows: Tensor) -> Tensor:
        """What it would say of two half steps, in these rows (N,) alone."""
        net: Backbone = self.targets["target"]
        t, m, s, cond, limit = read.t[rows], m[rows], s[rows], cond[rows], self.config.clamp
        first = net(read.x_t[rows], t, cond, to=m)
        x_m = first.to(m)
        second = net(x_m.clamp(-limit, limit), m, cond, to=s)
        # From where the first step led: what was clipped would come back divided by t - s.
        x_s = replace(second, x_t=x_m).to(s)
        return first.jump_target(x_s, s).clamp(-limit, limit)

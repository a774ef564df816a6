"""Consistency distillation and training (Song et al. 2023, arXiv:2303.01469; iCT, arXiv:2310.14189).

L = E w d(f(x_t, t), sg f'(x_m, m)) on neighbouring times t > m of a grid, where x_m is one teacher step from x_t
(distillation) or the same noise on the same image (training), and f' is a follower or the generator itself.

The boundary f(x, 0) = x holds by construction: f is the x0 reading of the prediction, exact at sigma = 0 for
epsilon, v and flow networks, and at m = 0 the target is x_m itself for every kind.

Whoever inherits may choose other times (`neighbours`), another end than 0 to jump to (`ends`), or tell the generator
more than the time (`told`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import add_noise, expand
from fewstep.core.times import Grid, Times
from fewstep.models.backbone import Backbone
from fewstep.objectives import base
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.objectives.pieces.curriculum import Curriculum
from fewstep.objectives.pieces.distances import Robust, each
from fewstep.objectives.pieces.fresh_noise import refuse_old_noise
from fewstep.objectives.pieces.judged import Jump
from fewstep.objectives.pieces.teacher_step import Solver, teacher_step
from fewstep.rollout import Rollout


@dataclass
class Config:
    name: str = "consistency"
    mode: Literal["distillation", "training"] = "distillation"
    """distillation: one step of the (guided) teacher; training: data alone, no teacher"""
    solver: Solver = "euler"
    """teacher step: euler (= DDIM) | heun"""
    grid: Grid = field(default_factory=Grid)
    """neighbouring times"""
    times: Times | None = None
    """law by which the intervals of the grid are chosen; default: all alike"""
    curriculum: Curriculum = field(default_factory=Curriculum)
    """how the grid grows finer during training"""
    target: Literal["follower", "self"] = "follower"
    """whose answer at m is the target"""
    target_decay: float = 0.95
    """of the follower, in generator moves; a curriculum has its own"""
    distance: Robust = "huber"
    """l2 | l1 | huber | sample_huber (of a sample as a whole)"""
    weight: Literal["none", "inverse_step"] = "none"
    """inverse_step: 1 / (t - m), in the process's own time"""

    def __post_init__(self) -> None:
        if not 0 <= self.target_decay < 1:
            raise UserError(f"objective.target_decay is a decay in [0, 1), but {self.target_decay} was given")


class Objective(base.Objective):
    reads = ("x0",)

    def refuse(self, rollout: Rollout) -> None:
        refuse_old_noise(rollout)

    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        return ("generator", "real_score") if config.mode == "distillation" else ("generator",)

    def followers(self) -> Mapping[str, float | Callable[[int], float]]:
        config = self.config
        if config.target == "self":
            return {}
        return {"target": config.target_decay if config.curriculum.law == "constant" else config.curriculum.follower}

    def turns(self, batch: Batch, step: int) -> Turns:
        jump = self.compared(batch, step)
        yield Turn("generator", jump.loss, dict(jump.logs))

    def compared(self, batch: Batch, step: int) -> Jump:
        assert batch.x0 is not None
        t, m = self.neighbours(batch, step)
        s = self.ends(batch, t, m)
        eps = batch.draw.normal("consistency.eps", batch.x0.shape[1:])
        x_t, cond = add_noise(self.triad.generator.schedule, batch.x0, eps, t), self.told(batch)
        with torch.no_grad():
            x_m = self.cleaner(x_t, batch.x0, eps, t, m, batch)
            target = self.target(x_m, m, s, cond)
        prediction = self.jump(self.triad.generator, x_t, t, s, cond)
        x_s = prediction.to(s)
        return Jump(x_s, target, t, s, self.loss(x_s, target, t, m), sample_logs(prediction.x0, batch))

    def neighbours(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """t and the cleaner m < t, each (B,)."""
        schedule, u = self.triad.generator.schedule, batch.draw.uniform("consistency.t")
        grid = replace(self.config.grid, count=self.config.curriculum.count(step, self.config.grid.count))
        if self.config.times is None:
            return grid.pair(u, schedule)
        return grid.around(self.config.times(u, schedule), schedule)

    def ends(self, batch: Batch, t: Tensor, m: Tensor) -> Tensor:
        """Where both jumps lead, s (B,) <= m."""
        return torch.zeros_like(m)

    def told(self, batch: Batch) -> Condition:
        return batch.cond

    def teacher(self, batch: Batch) -> Backbone:
        return self.triad.real_score

    def cleaner(self, x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, m: Tensor, batch: Batch) -> Tensor:
        """x_m (B, *S), the other end of the pair."""
        if self.config.mode == "training":
            return add_noise(self.triad.generator.schedule, x0, eps, m)
        return teacher_step(self.teacher(batch), x_t, t, m, batch.cond, self.config.solver)

    def target(self, x_m: Tensor, m: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """Where the jump from x_m leads: nowhere, if it is there."""
        net: Backbone = self.targets.get("target", self.triad.generator)
        return torch.where(expand(s == m, x_m), x_m, self.jump(net, x_m, m, s, cond).to(s))

    def jump(self, net: Backbone, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Prediction:
        return net(x, t, cond, to=s if self.two_times(self.config) else None)

    def loss(self, f: Tensor, target: Tensor, t: Tensor, m: Tensor) -> Tensor:
        distance = each(f, target, self.config.distance)
        return (distance if self.config.weight == "none" else distance / (t - m)).mean()

"""Piecewise rectified flow (PeRFlow; Yan et al. 2024, arXiv:2405.07510): straight paths inside of windows.

The student's own steps cut time into windows. Data are noised to the upper edge b of one, the (guided) teacher walks
from there to the lower edge a in a few steps, and between the two ends the path is a straight line:

    L = E |v(x_t, t) - (x_b - x_a) / (b - a)|^2,   x_t = x_a + (t - a) / (b - a) (x_b - x_a)

as flows, whatever the network is. One window is reflow with pairs made on the way; as many as the teacher has steps is
the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow, add_noise, expand, remap
from fewstep.models.backbone import Backbone
from fewstep.objectives import base
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.objectives.pieces.flow import as_flow
from fewstep.objectives.pieces.teacher_step import Solver, teacher_step
from fewstep.rollout import Rollout, ode


@dataclass
class Config:
    name: str = "perflow"
    solver: Solver = "euler"
    """teacher steps: euler (= DDIM) | heun"""
    solver_steps: int = 4
    """steps of the teacher in a window"""

    def __post_init__(self) -> None:
        if self.solver_steps < 1:
            raise UserError(f"objective.solver_steps is at least 1, but {self.solver_steps} was given")


class Objective(base.Objective):
    roles = ("generator", "real_score")
    reads = ("x0",)

    def refuse(self, rollout: Rollout) -> None:
        if len(rollout) > 1 and rollout.step is not ode:
            raise UserError("the windows of perflow are walked without fresh noise: set model.transition=ode")

    @property
    def flow(self) -> Backbone:
        return as_flow(self.triad.generator)

    def turns(self, batch: Batch, step: int) -> Turns:
        high, low = self.window(batch)
        x_high, x_low = self.ends(batch, high, low)
        t = low + (high - low) * batch.draw.uniform("perflow.t").to(low)
        v = (x_high - x_low) / expand(high - low, x_low)
        prediction = self.flow(x_low + expand(t - low, v) * v, t, batch.cond)
        loss = (prediction.value.float() - v).square().mean()
        yield Turn("generator", loss, sample_logs(prediction.x0, batch))

    def window(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The upper and the lower edge (B,) of a random window, as times of the flow."""
        index = batch.draw.integers("perflow.window", len(self.rollout))
        levels = torch.tensor([*(step.level for step in self.rollout.steps), 0.0], device=index.device)
        edges, _ = remap(self.triad.generator.schedule, Flow(), levels, levels)
        return edges[index], edges[index + 1]

    @torch.no_grad()
    def ends(self, batch: Batch, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, *S) at both edges: noised data, and where the teacher walks from there."""
        assert batch.x0 is not None
        # The first window begins where samples do: at pure noise, whatever is left of the data at the last level.
        pure = expand(torch.hypot(1 - high, high), batch.x0) * batch.noise
        noised = add_noise(Flow(), batch.x0, batch.noise, high)
        start = torch.where(self.begins(high, batch.x0), pure, noised)
        x, count = start, self.config.solver_steps
        for i in range(count):
            t, s = (high + (low - high) * k / count for k in (i, i + 1))
            x = teacher_step(as_flow(self.triad.real_score), x, t, s, batch.cond, self.config.solver)
        return start, x

    def begins(self, high: Tensor, like: Tensor) -> Tensor:
        """(B, 1, .., 1) whether a window is the first one."""
        top = torch.tensor([self.rollout.steps[0].level], device=high.device)
        return expand(high >= remap(self.triad.generator.schedule, Flow(), top, top)[0] - 1e-6, like)

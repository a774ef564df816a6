"""MeanFlow (Geng et al. 2025, arXiv:2505.13447): the mean velocity between two times, learnt from its own derivative.

u(x_t, t, s) is the way of the flow from x_t to time s over t - s. Along the flow, dx/dt = v, it obeys
u = v - (t - s) du/dt with s held, so the loss is |u - sg(v - (t - s) du/dt)|^2, summed over a sample and divided by its
own value to the power p. v is the (guided) teacher's, or eps - x0 of data without a teacher. Rows with s = t are flow
matching. A step is x_s = x_t - (t - s) u, told both of its times, so a student of any number of steps is deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.times import Times
from fewstep.models.tangent import Tangent
from fewstep.objectives.base import Logs, Turn, Turns, sample_logs
from fewstep.objectives.pieces.flow import as_flow
from fewstep.objectives.pieces.flow_map import FlowMap


@dataclass
class Config:
    name: str = "meanflow"
    mode: Literal["distillation", "training"] = "distillation"
    """distillation: the (guided) teacher's velocity; training: that of data, no teacher"""
    times: Times = field(default_factory=lambda: Times(law="logit_normal", mean=-0.4))
    """of which two are drawn: the later one is t, the other s"""
    equal: float = 0.25
    """share of rows with s = t, which are flow matching"""
    power: float = 1.0
    """p of the weight 1 / (loss + floor)^p of a sample; 0 = plain squares"""
    floor: float = 0.01
    """keeps that weight finite"""
    tangent: Tangent = field(default_factory=Tangent)
    """how du/dt is taken"""

    def __post_init__(self) -> None:
        if not 0 <= self.equal <= 1:
            raise UserError(f"objective.equal is a share from 0 to 1, but {self.equal} was given")
        if self.power < 0 or not self.floor > 0:
            raise UserError(
                "objective.power is at least 0 and objective.floor is above 0, but "
                f"{self.power} and {self.floor} were given"
            )


class Objective(FlowMap):
    reads = ("x0",)
    stream = "meanflow"

    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        return ("generator", "real_score") if config.mode == "distillation" else ("generator",)

    def turns(self, batch: Batch, step: int) -> Turns:
        t, s = self.interval(batch)
        x_t, line = self.noised(batch, t)
        v = self.velocity(x_t, t, batch.cond, line)
        target = v - self.by_start(x_t, t, s, batch.cond, v)
        prediction = self.flow(x_t, t, batch.cond, to=s)
        loss, logs = self.distance(prediction.velocity, target)
        yield Turn("generator", loss, {**logs, **sample_logs(prediction.x0, batch)})

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, cond: Condition, line: Tensor) -> Tensor:
        return line if self.config.mode == "training" else as_flow(self.triad.real_score)(x_t, t, cond).velocity

    def distance(self, u: Tensor, target: Tensor) -> tuple[Tensor, Logs]:
        """The weighted squares; their plain mean is logged."""
        each = (u - target).square().flatten(1).sum(1)
        weight = (each.detach() + self.config.floor) ** -self.config.power
        return (weight * each).mean(), {"residual": each.detach().mean() / u[0].numel()}

"""Align Your Flow (Sabour et al. 2025, arXiv:2506.14603): distillation into a map between any two times.

f(x_t, t, s) = x_t - (t - s) u(x_t, t, s) is learnt from either of two derivatives, whose zero is the map of the flow:

    eulerian    L = 1/2 |u - sg(u - g)|^2    g = u - v(x_t, t) + r (t - s) du/dt, the derivative along the flow
    lagrangian  L = 1/2 |u - sg(u - g)|^2    g = u - v(x_s, s) - (t - s) du/ds, where x_s = f(x_t, t, s)

g, the whole of it, is divided by its rms over the sample + c, which leaves its zero where it is; r rises from 0 to 1.
The strength of the teacher's guidance can be drawn for every sample, and told: then it is chosen when sampling.
Guidance by a weaker checkpoint in the place of an unconditional one, and the adversarial finish, are not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import expand
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone, Guided, unguided
from fewstep.models.tangent import Tangent
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.objectives.pieces.flow import as_flow
from fewstep.objectives.pieces.flow_map import FlowMap
from fewstep.objectives.pieces.score_gap import surrogate

GUIDANCE = "guidance"


@dataclass
class Config:
    name: str = "align_your_flow"
    form: Literal["eulerian", "lagrangian"] = "eulerian"
    """the derivative at the start of the step, or at its end"""
    times: Times = field(default_factory=lambda: Times(law="logit_normal", mean=-0.4))
    """of which two are drawn: the later one is t, the other s"""
    equal: float = 0.25
    """share of rows with s = t, which are flow matching"""
    normalise: bool = True
    """divide g by its rms over a sample + floor"""
    floor: float = 0.1
    """c of that division"""
    warmup: int = 100
    """generator moves until r = 1, of the eulerian form"""
    guidance: list[float] = field(default_factory=list)
    """lowest and highest strength of the teacher's guidance, drawn and told; none: model.guidance, and nothing told"""
    sampled_guidance: float = 2.0
    """strength that the student is told when it is sampled"""
    tangent: Tangent = field(default_factory=Tangent)
    """how the derivative is taken"""

    def __post_init__(self) -> None:
        if not 0 <= self.equal <= 1:
            raise UserError(f"objective.equal is a share from 0 to 1, but {self.equal} was given")
        if not self.floor > 0 or self.warmup < 0:
            raise UserError(
                "objective.floor is above 0 and objective.warmup at least 0, but "
                f"{self.floor} and {self.warmup} were given"
            )
        if self.guidance and (len(self.guidance) != 2 or not 0 <= self.guidance[0] <= self.guidance[1]):
            raise UserError(
                f"objective.guidance is empty, or a lowest and a highest strength, such as [1, 3], but {self.guidance} "
                "was given"
            )
        if self.guidance and not self.guidance[0] <= self.sampled_guidance <= self.guidance[1]:
            raise UserError(
                f"objective.sampled_guidance is what was trained, from {self.guidance[0]} to {self.guidance[1]}, but "
                f"{self.sampled_guidance} was given"
            )


class Objective(FlowMap):
    roles = ("generator", "real_score")
    reads = ("x0",)
    stream = "align_your_flow"

    @classmethod
    def tells(cls, config: Any) -> dict[str, float]:
        return {GUIDANCE: config.sampled_guidance} if config.guidance else {}

    def attach(self, x: Tensor, cond: Condition) -> None:
        if self.config.guidance and not cond.inputs:
            raise UserError("objective.guidance is of labels or prompts, and this run has none: leave it out")
        super().attach(x, self.told(cond, x.new_ones(len(x), dtype=torch.float32)))

    def turns(self, batch: Batch, step: int) -> Turns:
        teacher, cond = self.guided(batch)
        t, s = self.interval(batch)
        x_t, _ = self.noised(batch, t)
        prediction = self.flow(x_t, t, cond, to=s)
        g = self.gap(prediction.velocity.detach(), teacher, x_t, t, s, cond, step)
        logs = {"residual": g.square().mean()}
        if self.config.normalise:
            g = g / (expand(g.flatten(1).square().mean(1).sqrt(), g) + self.config.floor)
        yield Turn("generator", surrogate(prediction.velocity, g), {**logs, **sample_logs(prediction.x0, batch)})

    def guided(self, batch: Batch) -> tuple[Backbone, Condition]:
        """The teacher of this batch, and the condition that tells the student of its guidance."""
        if not self.config.guidance:
            return as_flow(self.triad.real_score), batch.cond
        low, high = self.config.guidance
        strength = low + (high - low) * batch.draw.uniform("align_your_flow.guidance")
        return as_flow(Guided(unguided(self.triad.real_score), strength)), self.told(batch.cond, strength)

    def told(self, cond: Condition, strength: Tensor) -> Condition:
        return Condition(cond.inputs, {**cond.dials, GUIDANCE: strength}) if self.config.guidance else cond

    def gap(
        self, u: Tensor, teacher: Backbone, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, step: int
    ) -> Tensor:
        """g (B, *S)."""
        if self.config.form == "lagrangian":
            return u - self.at_end(teacher, x_t, t, s, cond) - self.by_end(x_t, t, s, cond)
        with torch.no_grad():
            v = teacher(x_t, t, Condition(cond.inputs)).velocity
        rise = min(1.0, step / self.config.warmup) if self.config.warmup else 1.0
        return u - v + rise * self.by_start(x_t, t, s, cond, v)

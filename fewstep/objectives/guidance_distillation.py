"""Guidance distillation (Meng et al. 2022, arXiv:2210.03142, stage one): both passes of a guided teacher in one.

    L = E |F(x_t, t, w) - (u + w (c - u))|^2,   w ~ U(low, high) for every sample

in the network's own output, on noised data; the generator is told w. It halves the passes of a many-step model, and
what it exports is a teacher without guidance of its own for every other objective.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import add_noise
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone, Guided, unguided
from fewstep.objectives import base
from fewstep.objectives.base import Turn, Turns, sample_logs


@dataclass
class Config:
    name: str = "guidance_distillation"
    times: Times = field(default_factory=Times)
    """times at which the two are compared"""
    guidance_low: float = 1.0
    """least guidance of the teacher, as in u + w (c - u)"""
    guidance_high: float = 5.0
    """most guidance of the teacher"""
    guidance: float = 2.0
    """what the generator is told when it is sampled"""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_low <= self.guidance <= self.guidance_high:
            raise UserError(
                "objective.guidance_low, guidance and guidance_high are numbers from 0 in this order, but "
                f"{self.guidance_low}, {self.guidance} and {self.guidance_high} were given"
            )


class Objective(base.Objective):
    roles = ("generator", "real_score")
    reads: tuple[str, ...] = ("x0",)

    @classmethod
    def tells(cls, config: Any) -> dict[str, float]:
        return {"guidance": config.guidance}

    def attach(self, x: Tensor, cond: Condition) -> None:
        if not cond.inputs:
            raise UserError(
                f"objective {self.config.name} learns guidance, but these networks are told nothing: use data with "
                "labels or prompts"
            )

    def turns(self, batch: Batch, step: int) -> Turns:
        x_t, t, w = self.states(batch)
        rows = torch.arange(len(batch.noise), device=t.device).repeat(len(t) // len(batch.noise))
        cond = batch.cond[rows]
        with torch.no_grad():
            target = self.teacher(w)(x_t, t, cond).value
        told = Condition(cond.inputs, {**cond.dials, "guidance": w})
        prediction = self.triad.generator(x_t, t, told)
        loss = (prediction.value.float() - target.float()).square().mean()
        yield Turn("generator", loss, sample_logs(prediction.x0[: len(batch.noise)], batch))

    def states(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """x_t (N, *S), t (N,) and w (N,); N is a multiple of the batch, which is repeated."""
        assert batch.x0 is not None
        t = self.draw_time(batch, "guidance.t", self.config.times)
        eps = batch.draw.normal("guidance.eps", batch.x0.shape[1:])
        return add_noise(self.triad.generator.schedule, batch.x0, eps, t), t, self.scales(batch)

    def scales(self, batch: Batch) -> Tensor:
        low, high = self.config.guidance_low, self.config.guidance_high
        return low + (high - low) * batch.draw.uniform("guidance.w").float()

    def teacher(self, w: Tensor) -> Backbone:
        return Guided(unguided(self.triad.real_score), w)

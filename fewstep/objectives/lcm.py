"""Latent consistency models (LCM; Luo et al. 2023, arXiv:2310.04378) and LCM-LoRA (arXiv:2311.05556).

Consistency distillation of the guided ODE: for every sample a scale w ~ U(low, high) guides the teacher's step, and the
generator is told w, so that one network holds all of them (the augmented ODE):

    L = E d(f(x_t, t, w), sg f'(x_m, m, w)),    x_m = a step of u + w (c - u) from t to m

The grid has few, long intervals of the teacher's many, which is the paper's skipping. With `embed: false`, as LCM-LoRA
trains, nobody is told w and the mean of the range stays in the weights. The paper's skip connection is a step function
of the time, 1 at 0 and below 1e-5 elsewhere; here it is exact at 0 by construction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.times import Grid
from fewstep.models.backbone import Backbone, Guided, unguided
from fewstep.objectives import consistency


@dataclass
class Config(consistency.Config):
    name: str = "lcm"
    grid: Grid = field(default_factory=lambda: Grid(count=50))
    """neighbouring times"""
    guidance_low: float = 1.0
    """least guidance of the teacher, as in u + w (c - u)"""
    guidance_high: float = 3.0
    """most guidance of the teacher"""
    embed: bool = True
    """the generator is told the guidance; false: LCM-LoRA"""
    guidance: float = 1.5
    """what it is told when it is sampled"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.guidance_low <= self.guidance_high:
            raise UserError(
                "objective.guidance_low and objective.guidance_high are numbers from 0 in this order, but "
                f"{self.guidance_low} and {self.guidance_high} were given"
            )
        if self.embed and not self.guidance_low <= self.guidance <= self.guidance_high:
            raise UserError(
                f"objective.guidance is what was trained, from {self.guidance_low} to {self.guidance_high}, but "
                f"{self.guidance} was given"
            )
        if self.mode == "training":
            raise UserError("lcm distils a guided teacher: set objective.mode=distillation, or use consistency")


class Objective(consistency.Objective):
    @classmethod
    def tells(cls, config: Any) -> dict[str, float]:
        return {"guidance": config.guidance} if config.embed else {}

    def attach(self, x: Tensor, cond: Condition) -> None:
        if not cond.inputs:
            raise UserError(
                "objective lcm guides its teacher, but these networks are told nothing: use consistency, or data with "
                "labels or prompts"
            )

    def scales(self, batch: Batch) -> Tensor:
        """w (B,)."""
        low, high = self.config.guidance_low, self.config.guidance_high
        return low + (high - low) * batch.draw.uniform("lcm.guidance").float()

    def told(self, batch: Batch) -> Condition:
        dials = {"guidance": self.scales(batch)} if self.config.embed else {}
        return Condition(batch.cond.inputs, {**batch.cond.dials, **dials})

    def teacher(self, batch: Batch) -> Backbone:
        return Guided(unguided(self.triad.real_score), self.scales(batch))

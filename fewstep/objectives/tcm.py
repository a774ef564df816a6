"""Truncated consistency models (TCM; Lee et al. 2024, arXiv:2410.14895): a second stage for the noisy end alone.

A trained consistency function f- (`start.target_score`, frozen) serves the times below t', and the generator learns
those from t' on. The loss is that of easy consistency tuning, whose target at m is f-'s where m < t'. A share of the
rows is pinned to t' itself, whose target therefore is f-'s: this is the boundary, with a weight of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import expand
from fewstep.models.backbone import unguided
from fewstep.objectives import ect
from fewstep.objectives.pieces.distances import each
from fewstep.rollout import Rollout


@dataclass
class Config(ect.Config):
    name: str = "tcm"
    target_teacher: str = "previous.generator"
    """f-: the earlier stage's student, or a run or model folder"""
    truncation: float = 0.5
    """t', between 0 and 1: where the generator begins to be in charge"""
    boundary_share: float = 0.25
    """share of the rows that are pinned to it"""
    boundary_weight: float = 0.1
    """of these rows"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.truncation < 1 or not 0 <= self.boundary_share < 1 or self.boundary_weight < 0:
            raise UserError(
                "objective.truncation is between 0 and 1, boundary_share from 0 to below 1 and boundary_weight at "
                f"least 0, but {self.truncation}, {self.boundary_share} and {self.boundary_weight} were given"
            )


class Objective(ect.Objective):
    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        return (*super().needs(config), "target_score")

    def refuse(self, rollout: Rollout) -> None:
        super().refuse(rollout)
        if low := [step.level for step in rollout.steps if step.level < self.config.truncation]:
            raise UserError(
                f"the generator of tcm serves times from objective.truncation={self.config.truncation} on, but a step "
                f"of the student begins at {low[0]:.3g}: use fewer steps, a larger model.shift or a lower truncation"
            )

    def start_of(self, like: Tensor) -> Tensor:
        """t' as a time that the networks know, for every row of like (B,)."""
        return self.triad.generator.schedule.snap(torch.full_like(like, self.config.truncation))

    def neighbours(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        u = batch.draw.uniform("tcm.boundary").float()
        start = self.start_of(u)
        above = self.draw_time(batch, "consistency.t", self.config.times, above=start)
        t = torch.where(u < self.config.boundary_share, start, above)
        return t, self.cleaner_time(t, step // self.config.stage_steps)

    def target(self, x_m: Tensor, m: Tensor, s: Tensor, cond: Condition) -> Tensor:
        own = super().target(x_m, m, s, cond)
        first = unguided(self.triad.target_score)(x_m, m, cond).x0
        return torch.where(expand((m < self.start_of(m)) & (m > 0), x_m), first, own)

    def loss(self, f: Tensor, target: Tensor, t: Tensor, m: Tensor) -> Tensor:
        distance = each(f, target, self.config.distance)
        weight = torch.where(t > self.start_of(t), 1.0, self.config.boundary_weight)
        return (weight * (distance if self.config.weight == "none" else distance / (t - m))).mean()

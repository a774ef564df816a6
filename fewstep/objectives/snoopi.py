"""SNOOPI's PG-SB (Nguyen et al. 2024, arXiv:2412.02687): SwiftBrush with a guidance that is drawn at every step.

kappa ~ U(low, high), alike for the batch, guides the teacher and the critic of that step; model.guidance is not asked.
A fixed guidance suits one backbone and ruins another. The paper's NASA is `fewstep sample --negative-attention`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.models.backbone import Guided, unguided
from fewstep.objectives import swiftbrush
from fewstep.objectives.base import Triad

_SHARES = 1 << 20  # a shared draw is an integer: this many values of kappa


@dataclass
class Config(swiftbrush.Config):
    name: str = "snoopi"
    guidance_low: float = 0.5
    """least guidance of both scores"""
    guidance_high: float = 4.0
    """most guidance of both scores"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.guidance_low <= self.guidance_high:
            raise UserError(
                "objective.guidance_low and objective.guidance_high are numbers from 0 in this order, but "
                f"{self.guidance_low} and {self.guidance_high} were given"
            )
        if self.label_dropout == 0:
            raise UserError(
                "objective.label_dropout is above 0, but 0 was given: a guided critic has to learn what it says "
                "without a condition"
            )


class Objective(swiftbrush.Objective):
    def attach(self, x: Tensor, cond: Condition) -> None:
        if not cond.inputs:
            raise UserError(
                "objective snoopi guides both scores, but these networks are told nothing: use swiftbrush with "
                "model.guidance=1, or data with labels or prompts"
            )

    def compared(self, batch: Batch) -> Triad:
        teacher, fake_score = unguided(self.triad.real_score), self.triad.fake_score
        kappa = self.kappa(batch)
        return replace(self.triad, real_score=Guided(teacher, kappa), fake_score=Guided(fake_score, kappa))

    def kappa(self, batch: Batch) -> float:
        """The guidance of this step, alike for all samples, micro-batches and processes."""
        low, high = self.config.guidance_low, self.config.guidance_high
        return low + (high - low) * batch.draw.shared_integer("snoopi.kappa", _SHARES) / (_SHARES - 1)

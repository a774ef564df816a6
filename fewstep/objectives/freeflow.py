"""FreeFlow (Tong et al. 2025, arXiv:2511.19428): a teacher's flow from pure noise, learnt without any data.

f(z, s) = z - (1 - s) u(z, 1, s) is where the flow has brought the noise z at time s. Two terms:

    predict   |u - sg(v(f, s) + (1 - s) du/ds)|^2, the derivative in s alone, along the student's own paths
    correct   the gap between a critic and the teacher at the samples f(z, 0), noised again: it sees what predicting
              has let drift, and is the gradient of the samples

The critic learns by denoising the samples. With s = 1 the first term says that u(z, 1, 1) is the teacher's velocity.
Only steps that begin at pure noise are learnt, so a student has one. Another process than the flow begins at the flow
time of its own last level.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.core.times import Times
from fewstep.models.tangent import Tangent
from fewstep.objectives.base import Logs
from fewstep.objectives.pieces.flow_map import FlowMap
from fewstep.objectives.pieces.matching import critic_loss, matching_loss
from fewstep.objectives.pieces.score_gap import Weight
from fewstep.rollout import Rollout, Sample


@dataclass
class Config:
    name: str = "freeflow"
    ends: Times = field(default_factory=Times)
    """s of the first term, as a part of the way's first time"""
    correct: float = 1.0
    """weight of the second term beside the first; 0 = none, and no critic"""
    weight: Weight = "abs_mean"
    """of the gap: abs_mean | snr | none"""
    times: Times = field(default_factory=lambda: Times(low=0.02, high=0.98))
    """times at which critic and teacher are compared"""
    critic_times: Times = field(default_factory=Times)
    """times at which the critic is trained"""
    ratio: int = 1
    """steps for each generator move; the critic moves at every step"""
    tangent: Tangent = field(default_factory=Tangent)
    """how du/ds is taken"""

    def __post_init__(self) -> None:
        if self.correct < 0 or self.ratio < 1:
            raise UserError(
                "objective.correct is at least 0 and objective.ratio at least 1, but "
                f"{self.correct} and {self.ratio} were given"
            )
        if self.ratio > 1 and not self.correct:
            raise UserError("objective.ratio waits for a critic, which objective.correct=0 does without: leave it at 1")


class Objective(FlowMap):
    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        return ("generator", "real_score", "fake_score") if config.correct else ("generator", "real_score")

    def refuse(self, rollout: Rollout) -> None:
        super().refuse(rollout)
        if len(rollout) > 1:
            raise UserError(
                f"freeflow learns steps that begin at pure noise, which {len(rollout)} steps do not: set model.steps=1"
            )

    def generates(self, step: int) -> bool:
        return step % self.config.ratio == 0

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        return super().sample(batch, step, grad and self.config.correct > 0)

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        predict = self.predicted(batch)
        if not self.config.correct:
            return predict, {"predict": predict}
        t = self.draw_time(batch, "freeflow.t", self.config.times)
        correct, logs = matching_loss(self.triad, batch, sample, t, self.config.weight)
        return predict + self.config.correct * correct, {"predict": predict, "correct": correct, **logs}

    def predicted(self, batch: Batch) -> Tensor:
        """The mean square of the first term."""
        z, t = self.noisiest(batch.noise)
        s = t * self.config.ends(batch.draw.uniform("freeflow.s"), Flow()).to(t.device)
        target = self.at_end(self.triad.real_score, z, t, s, batch.cond) + self.by_end(z, t, s, batch.cond)
        return (self.flow(z, t, batch.cond, to=s).velocity - target).square().mean()

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        return critic_loss(
            self.triad, batch, sample, self.draw_time(batch, "freeflow.tc", self.config.critic_times)
        ), {}

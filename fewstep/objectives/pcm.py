"""Phased consistency models (PCM; Wang et al. 2024, arXiv:2405.18407): a consistency function for each step.

The student's own steps cut time into phases. Both ends of a pair jump to the lower edge of their phase, alike:

    L = E d(j(x_t, t, edge), sg j'(x_m, m, edge)) + weight GAN,   j(x, t, s) = alpha_s x0 + sigma_s eps

so the walk through the phases is deterministic and has no random end to know of. One phase is a consistency model; as
many as the grid has intervals is the teacher. The discriminator, on the frozen teacher's features, tells jumps from
their targets, both noised anew inside the phase.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.objectives import consistency
from fewstep.objectives.pieces.judged import JudgeConfig, Judged
from fewstep.rollout import Rollout, ode

SAME = 1e-3
"""Times no further apart are one, a step of a trained schedule."""


@dataclass
class Config(consistency.Config):
    name: str = "pcm"
    target: Literal["follower", "self"] = "self"
    """whose answer at m is the target"""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """the discriminator between jumps and their targets"""


class Objective(Judged, consistency.Objective):
    def refuse(self, rollout: Rollout) -> None:
        if len(rollout) > 1 and rollout.step is not ode:
            raise UserError("the phases of pcm are walked without fresh noise: set model.transition=ode, or one step")

    def floor(self, t: Tensor) -> Tensor:
        """The lower edge (B,) of the phase of t: the level at which its step hands on.

        A rung hardly above an edge is where the phase below begins: the scheduler's levels are not quite even.
        """
        edges = torch.tensor([self.rollout.level_after(i) for i in reversed(range(len(self.rollout)))]).to(t)
        return edges[(torch.searchsorted(edges + SAME, t.contiguous()) - 1).clamp(min=0)]

    def neighbours(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        t, m = super().neighbours(batch, step)
        return t, m.maximum(self.floor(t))

    def ends(self, batch: Batch, t: Tensor, m: Tensor) -> Tensor:
        return self.floor(t)

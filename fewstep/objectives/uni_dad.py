"""Uni-DAD (Bahram et al. 2025, arXiv:2511.18281): DMD2 toward two teachers, to distil and adapt at once.

Generator: (1 - a) (F - R_src) / mean |x - R_src| + a (F - R_trg) / mean |x - R_trg|, both at the same x_t, and a
discriminator with a head for each block it reads, which sees images of the target. The optimum of the gap is a
compromise between the teachers, not a mixture of what they make.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.objectives import dmd2
from fewstep.objectives.pieces.score_gap import direction
from fewstep.rollout import Sample


@dataclass
class Config(dmd2.Config):
    name: str = "uni_dad"
    target_teacher: str = ""
    """the teacher of the target: a folder with a fine-tuned model, or a run that made one; as model.teacher in shape"""
    target_share: float = 0.25
    """a: how much it counts, 0 = not at all; about .25 for targets near the source, .75 for far ones"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_teacher:
            raise UserError(
                "uni_dad needs objective.target_teacher: a folder with the teacher's model fine-tuned on the target, "
                "or a run that made one"
            )
        if not 0 <= self.target_share <= 1:
            raise UserError(f"objective.target_share is from 0 to 1, but {self.target_share} was given")


class Objective(dmd2.Objective):
    roles = ("generator", "real_score", "target_score", "fake_score")

    def gradient(self, batch: Batch, sample: Sample, look: dmd2.Look) -> Tensor:
        clean, schedule, share = torch.zeros_like(look.t), self.triad.generator.schedule, self.config.target_share
        with torch.no_grad():
            target = self.triad.target_score(look.x_t, look.t, batch.cond).x0
        toward = direction(target, look.fake, look.x, self.config.weight, schedule, clean, look.t)
        return (1 - share) * super().gradient(batch, sample, look) + share * toward

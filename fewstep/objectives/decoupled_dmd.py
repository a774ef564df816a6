"""Decoupled DMD (Liu et al. 2025, arXiv:2511.22677): guidance and distribution matching apart.

With guidance w, F - R_cfg = (F - R_c) - (w - 1) (R_c - R_u). The first difference matches distributions and keeps the
student in bounds; the second, which never asks the critic, is what sharpens it. Each has a time, a noise and a
normaliser of its own: the first anywhere, the second only at levels cleaner than the student's own input.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import shift
from fewstep.core.times import Times
from fewstep.models.backbone import Guided, unguided
from fewstep.objectives import dmd2
from fewstep.objectives.pieces.score_gap import direction, noised
from fewstep.rollout import Sample


@dataclass
class Config(dmd2.Config):
    name: str = "decoupled_dmd"
    gan_weight: float = 0.0
    """of softplus(-D) in the generator's loss; 0 = no GAN and no data, as in the paper"""
    guidance_times: Times = field(default_factory=lambda: Times(low=0.02, high=0.98))
    """where below the student's input the guidance is read, as a share of that time; its shift is the student's own"""


@dataclass(frozen=True)
class Look(dmd2.Look):
    """`real` is the conditional teacher's; at `guided_t` it says `conditional`, and `guided` with its guidance."""

    guided_t: Tensor
    conditional: Tensor
    guided: Tensor


class Objective(dmd2.Objective):
    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        if not isinstance(triad.real_score, Guided) or triad.real_score.scale == 1:
            raise UserError(
                "decoupled_dmd takes the teacher's guidance apart, but there is none: set model.guidance above 1, or "
                "use dmd2"
            )

    def look(self, batch: Batch, sample: Sample) -> Look:
        x, schedule = sample.x0.detach(), self.triad.generator.schedule
        t, guided_t = self.draw_time(batch, "decoupled.t", self.config.times), self.cleaner(batch, sample.t)
        eps, guided_eps = (batch.draw.normal(f"decoupled.{word}", x.shape[1:]) for word in ("eps", "guided_eps"))
        x_t = noised(schedule, sample.x0, torch.zeros_like(t), t, eps)
        x_guided = noised(schedule, x, torch.zeros_like(t), guided_t, guided_eps)
        real, conditional, null = self.teach(x_t.detach(), t, x_guided, guided_t, batch.cond)
        guided = null + self.triad.real_score.scale * (conditional - null)  # type: ignore[operator]
        fake, logits, adversarial = self.judge(x_t, t, batch.cond)
        return Look(x, x_t.detach(), t, real, fake, logits, adversarial, guided_t, conditional, guided)

    def cleaner(self, batch: Batch, below: Tensor) -> Tensor:
        """A time (B,) under `below` (B,): drawn before the shift, on the clean side, and shifted as the student's."""
        times, schedule = self.config.guidance_times, self.triad.generator.schedule
        share = replace(times, shift=1.0)(batch.draw.uniform("decoupled.guided_t"), schedule)
        return schedule.snap(shift(share * shift(below, 1 / times.shift), times.shift))

    @torch.no_grad()
    def teach(self, x_t: Tensor, t: Tensor, x_guided: Tensor, guided_t: Tensor, cond: Condition) -> tuple[Tensor, ...]:
        """The teacher's x0 with the condition at x_t, with it at x_guided and without it there, in one pass."""
        teacher = unguided(self.triad.real_score)
        every = Condition.cat(Condition.cat(cond, cond), teacher.null(cond))
        return teacher(torch.cat([x_t, x_guided, x_guided]), torch.cat([t, guided_t, guided_t]), every).x0.chunk(3)

    def gradient(self, batch: Batch, sample: Sample, look: dmd2.Look) -> Tensor:
        """(F - R_c) / mean |x - R_c| and, at its own time, (R_c - R_cfg) / mean |x - R_cfg|."""
        assert isinstance(look, Look)
        clean, schedule, weight = torch.zeros_like(look.t), self.triad.generator.schedule, self.config.weight
        sharper = direction(look.guided, look.conditional, look.x, weight, schedule, clean, look.guided_t)
        return super().gradient(batch, sample, look) + sharper

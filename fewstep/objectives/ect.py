"""Easy consistency tuning (ECT; Geng et al. 2024, arXiv:2406.14548): from a diffusion model, in stages, without a grid.

t is drawn freely and m follows it, in k = sigma / alpha, by a ratio that rises towards 1 from stage to stage:

    k_m = max(0, k_t (1 - q^-(stage + 1) (1 + steep sigmoid(-b k_t))))

but never nearer to k_t than `most_ratio`. So early stages have m = 0 at low noise, which is plain denoising.
L = E |f(x_t, t) - sg f(x_m, m)| / (t - m), of a sample as a whole; the target is the generator itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.times import Grid, Times
from fewstep.objectives import consistency
from fewstep.objectives.pieces.distances import Robust

NOISIEST = 80.0
"""sigma / alpha that stands for all above it: at pure noise a flow has no finite one"""


@dataclass
class Config(consistency.Config):
    name: str = "ect"
    mode: Literal["distillation", "training"] = "training"
    """training: data alone, no teacher; distillation: one step of the (guided) teacher"""
    times: Times | None = field(default_factory=lambda: Times(law="log_normal", mean=-1.1, std=2.0))
    """law of t"""
    target: Literal["follower", "self"] = "self"
    """whose answer at m is the target"""
    distance: Robust = "sample_huber"
    """l2 | l1 | huber | sample_huber (of a sample as a whole)"""
    weight: Literal["none", "inverse_step"] = "inverse_step"
    """inverse_step: 1 / (t - m), in the process's own time"""
    ratio: float = 2.0
    """q: the gap between t and m falls by it from stage to stage"""
    most_ratio: float = 0.9961
    """of k_m to k_t, however late the stage: nearer times are one in float32"""
    stage_steps: int = 100
    """steps of a stage"""
    steep: float = 8.0
    """by how much more the gap is at low noise"""
    slope: float = 1.0
    """b: how soon, in sigma / alpha, noise is no longer low"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.times is None or self.curriculum.law != "constant":
            raise UserError("ect draws its times and has no grid: give objective.times, and no objective.curriculum")
        if self.grid != Grid():
            raise UserError("ect draws its times and has no grid: leave objective.grid out")
        if not 0 < self.most_ratio < 1:
            raise UserError(f"objective.most_ratio is between 0 and 1, but {self.most_ratio} was given")
        if not self.ratio > 1 or self.stage_steps < 1 or self.steep < 0:
            raise UserError(
                "objective.ratio is above 1, objective.stage_steps at least 1 and objective.steep at least 0, but "
                f"{self.ratio}, {self.stage_steps} and {self.steep} were given"
            )


class Objective(consistency.Objective):
    def neighbours(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        t = self.draw_time(batch, "consistency.t", self.config.times)
        return t, self.cleaner_time(t, step // self.config.stage_steps)

    def cleaner_time(self, t: Tensor, stage: int) -> Tensor:
        """m (B,) < t at a stage, from 0."""
        config, schedule = self.config, self.triad.generator.schedule
        alpha, sigma, _, _ = schedule.coefficients(t.double())
        noise = (sigma / alpha).clamp(max=NOISIEST)
        gap = config.ratio ** -(stage + 1) * (1 + config.steep * torch.sigmoid(-config.slope * noise))
        return schedule.time_of((noise * (1 - gap.clamp(min=1 - config.most_ratio))).clamp(min=0)).to(t)

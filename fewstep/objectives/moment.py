"""Mean and variance of each sample held to those of data: the moment regulariser of Decoupled DMD (arXiv:2511.22677).

With m and v over all values of one sample, L = KL(N(m, v) || N(mean, variance)), the mean over samples:
1/2 ((v + (m - mean)^2) / variance - 1 - log(v / variance)). It holds back what guidance alone would drive too far.
A term of `sum`; by itself it makes noise of these moments.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.objectives import base
from fewstep.objectives.base import Logs
from fewstep.rollout import Sample


@dataclass
class Config:
    name: str = "moment"
    mean: float = 0.0
    """that samples shall have; latents of SDXL: 0.075"""
    variance: float = 1.0
    """that samples shall have; latents of SDXL: 0.81"""

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise UserError(f"objective.variance is above 0, but {self.variance} was given")


class Objective(base.Objective):
    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        x, target = sample.x0.float().flatten(1), self.config
        ratio = x.var(1, correction=0).clamp(min=1e-12) / target.variance
        apart = (x.mean(1) - target.mean).square() / target.variance
        loss = 0.5 * (ratio + apart - 1 - ratio.log()).mean()
        return loss, {"moment": loss.detach()}

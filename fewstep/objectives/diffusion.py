"""Denoising and flow-matching training: makes teachers, and fine-tunes them on new data.

L = E || net(x_t, t) - target(x0, eps) ||^2 (Ho et al. 2020, eq. 14; Lipman et al. 2023, eq. 9).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.schedule import add_noise
from fewstep.core.times import Times
from fewstep.objectives import base
from fewstep.objectives.base import Turn, Turns
from fewstep.objectives.pieces.conditions import drop_labels


@dataclass
class Config:
    name: str = "diffusion"
    label_dropout: float = 0.1
    """share of samples trained without their label, for guidance later"""
    times: Times = field(default_factory=Times)
    """training times"""

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"objective.label_dropout is a share in [0, 1), but {self.label_dropout} was given")


class Objective(base.Objective):
    reads = ("x0",)

    def turns(self, batch: Batch, step: int) -> Turns:
        generator, x0 = self.triad.generator, batch.x0
        assert x0 is not None
        t = self.draw_time(batch, "diffusion.t", self.config.times)
        eps = batch.draw.normal("diffusion.eps", x0.shape[1:])
        cond = drop_labels(generator, batch, self.config.label_dropout)
        prediction = generator(add_noise(generator.schedule, x0, eps, t), t, cond)
        loss = (prediction.value.float() - prediction.target(x0, eps)).square().mean()
        yield Turn("generator", loss)

"""Teacher score matching (MSD, Song et al. 2024, arXiv:2410.23274): gives a new, smaller network the teacher's score.

L = E || net(x_t, t) - R(x_t, t) ||^2 in what the network predicts, on noised data; the teacher's guidance goes over.
Distillation into few steps needs a start that is a diffusion model already: `start.generator: previous.generator`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fewstep.core.batch import Batch
from fewstep.core.schedule import add_noise
from fewstep.core.times import Times
from fewstep.objectives import base
from fewstep.objectives.base import Turn, Turns


@dataclass
class Config:
    name: str = "score_match"
    times: Times = field(default_factory=Times)
    """training times"""


class Objective(base.Objective):
    roles = ("generator", "real_score")
    reads = ("x0",)

    def turns(self, batch: Batch, step: int) -> Turns:
        generator, x0 = self.triad.generator, batch.x0
        assert x0 is not None
        t = self.draw_time(batch, "score_match.t", self.config.times)
        x_t = add_noise(generator.schedule, x0, batch.draw.normal("score_match.eps", x0.shape[1:]), t)
        with torch.no_grad():
            real = self.triad.real_score(x_t, t, batch.cond)
        prediction = generator(x_t, t, batch.cond)
        loss = (prediction.value.float() - prediction.target(real.x0, real.eps)).square().mean()
        yield Turn("generator", loss)

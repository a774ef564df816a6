"""Adapter guidance distillation (AGD; Jensen & Sadat 2025, arXiv:2503.07274): adapters that absorb guidance.

The network stays as it is; an adapter (`players.generator.lora`) and the embedder of w learn the guided answer, at the
states that the guided teacher itself passes on its way from noise. No image is read. At w = 1 the guided answer is the
network's own, so the adapter begins without a loss there. The exported result is a teacher of one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.objectives import guidance_distillation


@dataclass
class Config(guidance_distillation.Config):
    name: str = "agd"
    route: int = 8
    """steps of the guided teacher's way from noise, all of whose states are learnt from"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.route < 1:
            raise UserError(f"objective.route is at least 1 step, but {self.route} was given")


class Objective(guidance_distillation.Objective):
    reads = ()

    def states(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        net, w, count = self.triad.generator, self.scales(batch), self.config.route
        x, seen = batch.noise * net.schedule.prior_std, []
        for i in range(count):
            t, s = (net.schedule.snap(torch.full_like(w, 1 - k / count)) for k in (i, i + 1))
            seen.append((x, t, w))
            if i + 1 < count:
                with torch.no_grad():
                    x = self.teacher(w)(x, t, batch.cond).to(s)
        states, times, scales = (torch.cat(part) for part in zip(*seen, strict=True))
        return states, times, scales

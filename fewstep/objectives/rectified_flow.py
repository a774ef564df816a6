"""Rectified flow (Liu et al. 2022, arXiv:2209.03003): reflow on a teacher's pairs, then few-step distillation.

Reflow: L = E || v(x_t, t) - (z - x) ||^2 on the straight line x_t = (1 - t) x + t z of each stored pair (z, x).
Distillation: the same pairs at the student's own times alone, compared as clean samples; with one step its input is
exactly z. A network of another process is trained through `Remapped`, as the flow it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Pair
from fewstep.core.schedule import Flow, add_noise
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone, Remapped
from fewstep.objectives import base
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.objectives.pieces.distances import Distance, distance


@dataclass
class Config:
    name: str = "rectified_flow"
    phase: Literal["reflow", "distill"] = "reflow"
    """reflow: straighten at all times; distill: regress the pairs at the student's own steps"""
    times: Times = field(default_factory=Times)
    """flow times of the reflow"""
    distance: Distance = "l2"
    """of the distillation: l2 | l1 | huber"""


class Objective(base.Objective):
    reads = ("pair",)

    @property
    def flow(self) -> Backbone:
        """The generator as a flow network."""
        generator = self.triad.generator
        return generator if isinstance(generator.schedule, Flow) else Remapped(generator, Flow(), "flow_prediction")

    def turns(self, batch: Batch, step: int) -> Turns:
        pair = batch.pair
        assert pair is not None
        loss, x0 = self.reflow(batch, pair) if self.config.phase == "reflow" else self.distill(batch, pair)
        yield Turn("generator", loss, sample_logs(x0))

    def reflow(self, batch: Batch, pair: Pair) -> tuple[Tensor, Tensor]:
        flow = self.flow
        t = self.config.times(batch.draw.uniform("reflow.t"), flow.schedule)
        prediction = flow(add_noise(flow.schedule, pair.x0, pair.noise, t), t, pair.cond)
        loss = (prediction.value.float() - prediction.target(pair.x0, pair.noise)).square().mean()
        return loss, prediction.x0

    def distill(self, batch: Batch, pair: Pair) -> tuple[Tensor, Tensor]:
        generator = self.triad.generator
        index = batch.draw.integers("distill.step", len(self.rollout))
        told = torch.tensor([s.told for s in self.rollout.steps], device=index.device)[index]
        level = torch.tensor([s.level for s in self.rollout.steps], device=index.device)[index]
        on_line = add_noise(generator.schedule, pair.x0, pair.noise, level)
        start = (index == 0).reshape(-1, *[1] * (on_line.ndim - 1))
        x_t = torch.where(start, pair.noise * generator.schedule.prior_std, on_line)
        x0 = generator(x_t, told, pair.cond).at(level).x0
        return distance(x0, pair.x0, self.config.distance), x0

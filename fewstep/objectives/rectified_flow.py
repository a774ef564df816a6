"""Rectified flow (Liu et al. 2022, arXiv:2209.03003): reflow on a teacher's pairs, then few-step distillation.

Reflow: L = E || v(x_t, t) - (z - x) ||^2 on the straight line x_t = (1 - t) x + t z of each stored pair (z, x).
Distillation: the same pairs at the student's own times alone, compared as clean samples; with one step its input is
exactly z. Its inputs are points on the lines; or those that the teacher passed on its way from z to x, as CausVid (Yin
et al. 2024, arXiv:2412.07772) starts its student; or the states that the student itself walks to from z: then it
answers for what its first steps have not learnt. A network of another process is trained through `Remapped`, as the
flow it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Pair
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow, add_noise
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone, Remapped
from fewstep.objectives import base
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.objectives.pieces.distances import Seen, distance, perceived
from fewstep.objectives.pieces.exits import Exits
from fewstep.objectives.pieces.paired import refuse_fresh_noise


@dataclass
class Config:
    name: str = "rectified_flow"
    phase: Literal["reflow", "distill"] = "reflow"
    """reflow: straighten at all times; distill: regress the pairs at the student's own steps"""
    times: Times = field(default_factory=Times)
    """flow times of the reflow"""
    distance: Seen = "l2"
    """of the distillation: l2 | l1 | huber | reader (features of the built-in reader) | lpips (InstaFlow's)"""
    lpips: str | None = None
    """file with the weights of LPIPS, for distance=lpips: VGG16's features and the linear layers"""
    states: Literal["line", "teacher", "own"] = "line"
    """distill: inputs on the lines of the pairs, on the teacher's trajectories, or where the student itself walks to"""
    exits: Exits = field(default_factory=Exits)
    """of own states: the step that is compared"""

    def __post_init__(self) -> None:
        if (self.distance == "lpips") != (self.lpips is not None):
            raise UserError(
                "objective.distance=lpips goes with objective.lpips, the file of its weights: give both, or neither "
                "and take reader, which is built in"
            )


class Objective(base.Objective):
    @property
    def flow(self) -> Backbone:
        """The generator as a flow network."""
        generator = self.triad.generator
        return generator if isinstance(generator.schedule, Flow) else Remapped(generator, Flow(), "flow_prediction")

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.reads = ("pair", "path") if config.phase == "distill" and config.states == "teacher" else ("pair",)
        if config.phase == "distill" and config.distance in ("reader", "lpips"):
            self.perception = config.distance
        if config.states == "own":
            refuse_fresh_noise(rollout, "objective.states=own", "objective.states=line")

    def turns(self, batch: Batch, step: int) -> Turns:
        pair = batch.pair
        assert pair is not None
        loss, x0 = self.reflow(batch, pair) if self.config.phase == "reflow" else self.distill(batch, pair)
        yield Turn("generator", loss, sample_logs(x0, pair))

    def reflow(self, batch: Batch, pair: Pair) -> tuple[Tensor, Tensor]:
        flow = self.flow
        t = self.config.times(batch.draw.uniform("reflow.t"), flow.schedule)
        prediction = flow(add_noise(flow.schedule, pair.x0, pair.noise, t), t, pair.cond)
        loss = (prediction.value.float() - prediction.target(pair.x0, pair.noise)).square().mean()
        return loss, prediction.x0

    def distill(self, batch: Batch, pair: Pair) -> tuple[Tensor, Tensor]:
        x0 = self.walked(batch, pair) if self.config.states == "own" else self.at_a_step(batch, pair)
        if self.perceive is not None:
            return perceived(x0, pair.x0, self.perceive), x0
        return distance(x0, pair.x0, self.config.distance), x0

    def walked(self, batch: Batch, pair: Pair) -> Tensor:
        """What the student makes of the pair's noise, looked at where it exits."""
        exits, args = self.config.exits, (self.triad.generator, pair.noise, pair.cond, batch.draw)
        return self.rollout(*args, exit=exits.at(self.rollout, batch.draw, "distill.exit"), grad=exits.window).x0

    def at_a_step(self, batch: Batch, pair: Pair) -> Tensor:
        """What a random step of the student makes of the pair's line, or of the teacher's way."""
        generator = self.triad.generator
        index = batch.draw.integers("distill.step", len(self.rollout))
        told = torch.tensor([s.told for s in self.rollout.steps], device=index.device)[index]
        level = torch.tensor([s.level for s in self.rollout.steps], device=index.device)[index]
        start = pair.noise * generator.schedule.prior_std
        if pair.path is not None:
            x_t = torch.cat([start[:, None], pair.path], 1)[torch.arange(len(index)), index]
        else:
            on_line = add_noise(generator.schedule, pair.x0, pair.noise, level)
            x_t = torch.where((index == 0).reshape(-1, *[1] * (start.ndim - 1)), start, on_line)
        return generator(x_t, told, pair.cond).at(level).x0

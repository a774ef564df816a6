"""Improved rectified flow (RF++; Lee et al. 2024, arXiv:2405.20320): one round of reflow that needs no second one.

On the lines of stored pairs, as reflow, but at times of a U-shaped law, and with

    L = E (1 - t) Huber(v - (z - x)) / d + perceptual(x0(x_t, t), x) / t

the pseudo-Huber of a sample as a whole with c = .00054 d, d its number of values. Several steps are walked with the
noise that they began with (`model.transition=reuse`), which is exact where the paths are straight. Real data are not
mixed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Pair
from fewstep.core.errors import UserError
from fewstep.core.schedule import add_noise
from fewstep.core.times import Times
from fewstep.objectives import rectified_flow
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.objectives.pieces.distances import Seen, perceived_each

HUBER = 5.4e-4


@dataclass
class Config:
    name: str = "rf_plus_plus"
    times: Times = field(default_factory=lambda: Times(law="u_shape", std=2.0))
    """law of t; the u_shape of the paper, whose a = 4 is twice the std here"""
    perceptual: float = 1.0
    """weight of the perceptual part; 0 = none"""
    distance: Seen = "reader"
    """of that part: reader (features of the built-in reader) | lpips (the paper's)"""
    lpips: str | None = None
    """file with the weights of LPIPS, for distance=lpips: VGG16's features and the linear layers"""

    def __post_init__(self) -> None:
        if self.perceptual < 0 or self.distance not in ("reader", "lpips"):
            raise UserError(
                "objective.perceptual is at least 0 and objective.distance reader or lpips, but "
                f"{self.perceptual} and {self.distance} were given"
            )
        if (self.distance == "lpips") != (self.lpips is not None):
            raise UserError(
                "objective.distance=lpips goes with objective.lpips, the file of its weights: give both, or neither "
                "and take reader, which is built in"
            )
        if self.times.low == 0:
            self.times.low = 1e-3  # the perceptual part is divided by t


class Objective(rectified_flow.Objective):
    def __init__(self, config, triad, rollout):
        super(rectified_flow.Objective, self).__init__(config, triad, rollout)
        self.reads = ("pair",)
        self.perception = config.distance if config.perceptual else None

    def turns(self, batch: Batch, step: int) -> Turns:
        pair = batch.pair
        assert pair is not None
        loss, x0 = self.reflow(batch, pair)
        yield Turn("generator", loss, sample_logs(x0, pair))

    def reflow(self, batch: Batch, pair: Pair) -> tuple[Tensor, Tensor]:
        flow = self.flow
        t = self.config.times(batch.draw.uniform("reflow.t"), flow.schedule)
        prediction = flow(add_noise(flow.schedule, pair.x0, pair.noise, t), t, pair.cond)
        each = (1 - t) * huber(prediction.value.float() - (pair.noise - pair.x0))
        if self.config.perceptual:
            assert self.perceive is not None
            each = each + self.config.perceptual * perceived_each(prediction.x0, pair.x0, self.perceive) / t
        return each.mean(), prediction.x0


def huber(difference: Tensor) -> Tensor:
    """(B,): (sqrt(|difference|^2 + c^2) - c) / d with c = .00054 d, over the d values of a sample."""
    flat = difference.flatten(1)
    c = HUBER * flat.shape[1]
    return (torch.sqrt(flat.square().sum(1) + c * c) - c) / flat.shape[1]

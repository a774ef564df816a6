"""Inductive moment matching (Zhou et al. 2025, arXiv:2503.07565): jumps whose samples, not their points, must agree.

f(x_t, t, s) = x_t - (t - s) u(x_t, t, s) from a time t and from a nearer one r, both of the same image and noise,
shall be of one law at s. M = 4 particles that share the times make a group, and with y = f(x_r, r, s) the loss is the
squared maximum mean discrepancy of two groups under a Laplace kernel,

    L = w(t) / M^2 sum_jk k(x_j, x_k) + k(sg y_j, sg y_k) - 2 k(x_j, sg y_k),    k(x, y) = exp(-|x - y| / ((t - s) D))
    w(t) = 1/2 sigmoid(b - l) (-l') alpha / (alpha^2 + sigma^2),                  l = log(alpha^2 / sigma^2)
    r = max(s, the time whose sigma / alpha is lower than that of t by 2^-gap of their whole range)

With r = s the other group is data. With M = 1 it is consistency training. Particles keep conditions of their own, so
that the terms of two different particles see the law over all labels and the M of one with itself its label. No time
beyond `times` is trained, while a walk begins at 1 and ends at 0. Guidance is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.schedule import add_noise, expand
from fewstep.core.times import Times
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.objectives.pieces.flow_map import TwoTimes


@dataclass
class Config:
    name: str = "imm"
    times: Times = field(default_factory=lambda: Times(low=0.006, high=0.994))
    """t; s is drawn evenly between its lowest value and t"""
    gap: int = 12
    """r is nearer than t by 2^-gap of the range of sigma / alpha"""
    bias: float = 4.0
    """b of the weight: times whose log signal-to-noise ratio is above it count little"""

    def __post_init__(self) -> None:
        if self.gap < 1:
            raise UserError(f"objective.gap is at least 1, but {self.gap} was given")
        if self.times.low <= 0 or self.times.high >= 1:
            raise UserError(
                "objective.times stay inside 0 and 1, where sigma / alpha is neither 0 nor infinite, but low is "
                f"{self.times.low} and high is {self.times.high}"
            )


class Objective(TwoTimes):
    reads = ("x0",)
    group = 4
    alike = False

    def turns(self, batch: Batch, step: int) -> Turns:
        x0 = batch.x0
        assert x0 is not None
        t, r, s = self.interval(batch)
        eps = batch.draw.normal("imm.eps", x0.shape[1:])
        x_t, x_r = (add_noise(self.flow.schedule, x0, eps, time) for time in (t, r))
        with torch.no_grad():
            y = x_r - expand(r - s, x0) * self.flow(x_r, r, batch.cond, to=s).velocity
        prediction = self.flow(x_t, t, batch.cond, to=s)
        x = x_t - expand(t - s, x0) * prediction.velocity
        x, y, t, width = (self.grouped(part) for part in (x, y, t, t - s))
        apart = discrepancy(x.flatten(2), y.flatten(2), width[:, 0])
        loss = (self.weight(t[:, 0]) * apart).mean()
        yield Turn("generator", loss, {"discrepancy": apart.detach().mean(), **sample_logs(prediction.x0, batch)})

    def grouped(self, rows: Tensor) -> Tensor:
        """(B, ..) -> (B / M, M, ..)."""
        return rows.unflatten(0, (-1, self.group))

    def interval(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """t > r >= s, each (B,), alike in a group."""
        drawn = (self.grouped(batch.draw.uniform(f"imm.{name}"))[:, :1] for name in ("t", "s"))
        for_t, for_s = (u.expand(-1, self.group).flatten() for u in drawn)
        low = self.config.times.low
        t = self.config.times(for_t, self.flow.schedule).to(batch.noise.device)
        t = t.minimum(self.noisiest(batch.noise)[1])
        s = low + for_s.to(t.device) * (t - low)
        return t, torch.maximum(s, self.nearer(t)), s

    def nearer(self, t: Tensor) -> Tensor:
        """The time (B,) that lies one step of the range nearer than t; below 0 where that leaves it."""
        low, high = self.config.times.low, self.config.times.high
        ratio = t / (1 - t) - (high / (1 - high) - low / (1 - low)) / 2**self.config.gap
        return ratio / (1 + ratio).clamp(min=1e-6)

    def weight(self, t: Tensor) -> Tensor:
        """w (B,)."""
        log_snr = 2 * torch.log((1 - t) / t)
        return torch.sigmoid(self.config.bias - log_snr) / (t * (1 - t)) * (1 - t) / ((1 - t) ** 2 + t**2)


def discrepancy(x: Tensor, y: Tensor, width: Tensor, floor: float = 1e-8) -> Tensor:
    """Squared discrepancies (G,) of x and y (G, M, D), by kernels of these widths (G,) times D."""

    def likeness(a: Tensor, b: Tensor) -> Tensor:
        squared = (a[:, :, None] - b[:, None]).float().square().sum(3)
        far = squared.clamp(min=floor**2).sqrt()  # of equal points the gradient is 0, not undefined
        return torch.exp(-far / (expand(width, far).clamp(min=1e-6) * a.shape[2])).mean((1, 2))

    return likeness(x, x) + likeness(y, y) - 2 * likeness(x, y)

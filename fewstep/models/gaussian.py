"""Gaussian and mixture teachers with exact scores and flow maps: the truth every objective is tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import NoiseSchedule
from fewstep.models.backbone import Backbone


class GaussianModel(Backbone):
    """The exact denoiser of data N(mean, std^2 I). With `learned`, mean and log-deviation are parameters.

    `mean` is a float or a tensor (*S). E[x0 | x_t] = mean + alpha std^2 / V (x_t - alpha mean) with
    V = alpha^2 std^2 + sigma^2.
    """

    def __init__(self, mean: float | Tensor, std: float, schedule: NoiseSchedule, kind: Kind, learned: bool = False):
        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.mean = nn.Parameter(torch.as_tensor(mean, dtype=torch.float32).clone(), requires_grad=learned)
        self.log_std = nn.Parameter(torch.tensor(math.log(std)), requires_grad=learned)

    def null(self, cond: Condition) -> Condition:
        return cond

    def forward(self, x_t, t, cond, *, to=None, taps: Sequence[str] = (), stop=False):
        c = self.schedule.at(t, x_t)
        variance = (2 * self.log_std).exp()
        marginal = c.alpha**2 * variance + c.sigma**2
        residual = x_t - c.alpha * self.mean
        x0 = self.mean + c.alpha * variance / marginal * residual
        eps = c.sigma / marginal * residual
        empty = Prediction(x_t, self.kind, x_t, t, self.schedule, {name: x_t for name in taps})
        return Prediction(empty.target(x0, eps), self.kind, x_t, t, self.schedule, empty.features)

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The end (B, *S) at level s of the probability flow ODE through x at level t."""
        at_t, at_s = self.schedule.at(t, x), self.schedule.at(s, x)
        variance = (2 * self.log_std).exp()
        ratio = (at_s.alpha**2 * variance + at_s.sigma**2) / (at_t.alpha**2 * variance + at_t.sigma**2)
        return at_s.alpha * self.mean + ratio.sqrt() * (x - at_t.alpha * self.mean)


class MixtureModel(Backbone):
    """The exact denoiser of an isotropic Gaussian mixture: `means` (K, D), one `std`, `weights` (K,), x (B, D)."""

    def __init__(self, means: Tensor, std: float, weights: Tensor, schedule: NoiseSchedule, kind: Kind):
        super().__init__()
        self.schedule, self.kind, self.std = schedule, kind, std
        self.register_buffer("means", means.float())
        self.register_buffer("log_weights", (weights / weights.sum()).float().log())

    def null(self, cond: Condition) -> Condition:
        return cond

    def forward(self, x_t, t, cond, *, to=None, taps: Sequence[str] = (), stop=False):
        c = self.schedule.at(t, x_t)
        marginal = c.alpha**2 * self.std**2 + c.sigma**2
        residual = x_t[:, None] - c.alpha[:, None] * self.means
        log_density = self.log_weights - (residual**2).sum(2) / (2 * marginal)
        share = log_density.softmax(1)[:, :, None]
        x0 = (share * (self.means + (c.alpha * self.std**2 / marginal)[:, None] * residual)).sum(1)
        eps = (share * (c.sigma / marginal)[:, None] * residual).sum(1)
        empty = Prediction(x_t, self.kind, x_t, t, self.schedule, {name: x_t for name in taps})
        return Prediction(empty.target(x0, eps), self.kind, x_t, t, self.schedule, empty.features)

    @torch.no_grad()
    def flow_map(self, x: Tensor, t: Tensor, s: Tensor, steps: int = 400) -> Tensor:
        """The probability flow ODE from t to s by `steps` Heun steps; exact to the step size squared."""
        cond = Condition()
        for i in range(steps):
            now, then = t + (s - t) * (i / steps), t + (s - t) * ((i + 1) / steps)
            h = (then - now).reshape(-1, 1)
            v = self(x, now, cond).velocity
            ahead = x + h * v
            x = x + 0.5 * h * (v + self(ahead, then, cond).velocity) if i + 1 < steps else ahead
        return x

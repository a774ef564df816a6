"""One solver step of the probability flow ODE by a teacher."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.core.schedule import expand
from fewstep.models.backbone import Backbone

Solver = Literal["euler", "heun"]


def teacher_step(teacher: Backbone, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, solver: Solver) -> Tensor:
    """x_s (B, *S) from x_t, t -> s (B,). Euler is the DDIM step; Heun averages eps alone over both ends.

    d(x / alpha) = eps d(sigma / alpha), so the averaged eps gives Heun's step in sigma / alpha, where the ODE has no
    linear part; x0 is not averaged. Rows with s = 0, where the noise cannot be read, and with alpha_t near 0, where
    sigma / alpha is singular, take the DDIM step.
    """
    first = teacher(x_t, t, cond)
    x_s = first.to(s)
    if solver == "euler":
        return x_s
    second = teacher(x_s, s, cond)
    c = teacher.schedule.at(s, x_t)
    at_t = teacher.schedule.at(t, x_t)
    eps = 0.5 * (first.eps + second.eps)
    # x / alpha moves by eps d(sigma / alpha); times alpha_s, so that alpha_t = 0 is the only singular start.
    heun = c.alpha / at_t.alpha * (x_t - at_t.sigma * eps) + c.sigma * eps
    stays = expand(s == 0, x_t) | (at_t.alpha < 1e-3)
    return torch.where(stays, x_s, heun)

"""A network whose output is a policy: a mixture of velocities with momentum, followed without asking it again.

Told the state x at time t, it says K velocities v_k and their weights w_k at every place (softmax); g_k are rates.
Until it is asked again, the flow is taken to move at time t - d with sum_k w_k v_k exp(g_k d), which has an integral:

    x(t - d) = x - sum_k w_k v_k d (exp(g_k d) - 1) / (g_k d)

(ArcFlow, arXiv:2602.09014). The modes are the network's own velocity and what a small layer adds to it, zero at the
start: then it is an Euler step of the network, to .4 % over the whole time. The rates are learnt once for all states
and places, where the official network says its own for each, beside a mode that has none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow, expand
from fewstep.models.backbone import Composite
from fewstep.models.diffusers import DiffusersBackbone

SPREAD = 0.25
"""of the rates at the start: apart enough to grow apart, and near enough that a step is Euler's"""
SMALL = 1e-4
"""below this g d the quotient is its series"""


@dataclass(frozen=True)
class Policy(Prediction):
    """Velocities (B, K, *S) that are weighted already, and rates (K,), asked for at x_t and t (B,)."""

    modes: Tensor = None  # type: ignore[assignment]
    rates: Tensor = None  # type: ignore[assignment]

    def to(self, s: Tensor) -> Tensor:
        """The state (B, *S) at level s (B,)."""
        d = (self.t - s)[:, None]
        way = d * grown(self.rates * d)
        return self.x_t.float() - (self.modes * _rows(way, self.modes)).sum(1)

    @property
    def x0(self) -> Tensor:
        return self.to(torch.zeros_like(self.t))

    @property
    def eps(self) -> Tensor:
        """What x0 and x_t are the mixture of."""
        return self.x0 + (self.x_t.float() - self.x0) / expand(self.t, self.x_t)

    @property
    def velocity(self) -> Tensor:
        return self.between(self.t, self.t)

    def between(self, t: Tensor, s: Tensor) -> Tensor:
        """The mean velocity (B, *S) from time t to s <= t (B,), both at or below the time it was asked at."""
        past, d = (self.t - t)[:, None], (t - s)[:, None]
        factor = torch.exp(self.rates * past) * grown(self.rates * d)
        return (self.modes * _rows(factor, self.modes)).sum(1)


def grown(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x, 1 at 0."""
    safe = torch.where(x.abs() < SMALL, torch.ones_like(x), x)
    return torch.where(x.abs() < SMALL, 1 + x / 2 + x * x / 6, torch.expm1(safe) / safe)


def _rows(value: Tensor, like: Tensor) -> Tensor:
    """(B, K) -> (B, K, 1, .., 1) with the rank of `like`."""
    return value.reshape(*value.shape, *[1] * (like.ndim - 2))


class PolicyNet(Composite):
    """`inner` with a layer that makes K modes of its velocity and of x_t (B, C, ..), channel by channel.

    Raises UserError for a network that is no flow.
    """

    inner: DiffusersBackbone

    def __init__(self, inner: DiffusersBackbone, modes: int, hidden: int, x: Tensor):
        super().__init__(inner)
        if not isinstance(inner.schedule, Flow) or inner.kind != "flow_prediction":
            raise UserError("a policy moves in velocities: take a flow teacher")
        self.modes, channels = modes, x.shape[1]
        layers = [nn.Linear(2 * channels + 1, hidden), nn.SiLU(), nn.Linear(hidden, modes * (channels + 1))]
        self.layers = nn.Sequential(*layers)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        self.rates = nn.Parameter(torch.linspace(-SPREAD, SPREAD, modes) if modes > 1 else torch.zeros(1))

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        prediction = self.inner(x_t, t, cond, to=to, taps=taps, stop=stop)
        if stop:
            return prediction
        v, x = prediction.value.float(), x_t.float()
        when = expand(t.float(), x).expand(-1, 1, *x.shape[2:])
        said = self.layers(torch.cat([x, v, when], 1).movedim(1, -1)).movedim(-1, 1).unflatten(1, (self.modes, -1))
        modes = said[:, :, :1].softmax(1) * (v[:, None] + said[:, :, 1:])
        policy = {"modes": modes, "rates": self.rates.float()}
        return Policy(**vars(replace(prediction)), **policy)

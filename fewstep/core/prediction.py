"""What a network said at (x_t, t), readable as x0, eps, velocity or score whatever the network predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch import Tensor

from fewstep.core.schedule import Coefficients, Flow, NoiseSchedule, add_noise, bridge, expand

Kind = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def _mixture(kind: Kind, c: Coefficients) -> tuple[Tensor | float, Tensor | float]:
    """(p, q) such that the network output is p x0 + q eps."""
    if kind == "epsilon":
        return 0.0, 1.0
    if kind == "sample":
        return 1.0, 0.0
    if kind == "v_prediction":
        return -c.sigma, c.alpha
    return -1.0, 1.0


@dataclass(frozen=True)
class Prediction:
    """A network output `value` (B, *S) of some `kind` at `x_t` (B, *S), t (B,). All readings are float32.

    x_t = alpha x0 + sigma eps and value = p x0 + q eps are two linear equations; x0 and eps solve them.
    `features` holds the outputs of the blocks that were tapped, by name.
    """

    value: Tensor
    kind: Kind
    x_t: Tensor
    t: Tensor
    schedule: NoiseSchedule
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def _solve(self) -> tuple[Coefficients, Tensor | float, Tensor | float, Tensor | float]:
        c = self.schedule.at(self.t, self.x_t)
        p, q = _mixture(self.kind, c)
        return c, p, q, c.alpha * q - c.sigma * p

    @property
    def x0(self) -> Tensor:
        if self.kind == "sample":
            return self.value.float()
        c, _, q, determinant = self._solve()
        return (q * self.x_t.float() - c.sigma * self.value.float()) / determinant

    @property
    def eps(self) -> Tensor:
        if self.kind == "epsilon":
            return self.value.float()
        c, p, _, determinant = self._solve()
        return (c.alpha * self.value.float() - p * self.x_t.float()) / determinant

    @property
    def velocity(self) -> Tensor:
        """dx/dt of the probability flow ODE: alpha' x0 + sigma' eps."""
        if self.kind == "flow_prediction" and isinstance(self.schedule, Flow):
            return self.value.float()
        c = self.schedule.at(self.t, self.x_t)
        return c.d_alpha * self.x0 + c.d_sigma * self.eps

    @property
    def score(self) -> Tensor:
        """grad log p_t(x_t) = -eps / sigma."""
        return -self.eps / self.schedule.at(self.t, self.x_t).sigma

    def to(self, s: Tensor) -> Tensor:
        """The jump to level s (B,): alpha_s x0 + sigma_s eps, one DDIM or Euler step."""
        return add_noise(self.schedule, self.x0, self.eps, s)

    def at(self, t: Tensor) -> Prediction:
        """The same output read with the level t (B,) instead of the time the network was told."""
        return replace(self, t=t)

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The output (B, *S) a perfect network gives when (x0, eps) made x_t."""
        p, q = _mixture(self.kind, self.schedule.at(self.t, self.x_t))
        return p * x0.float() + q * eps.float()

    def jump_target(self, x_s: Tensor, s: Tensor) -> Tensor:
        """The output whose jump to level s (B,) below t is x_s: (x_t - x_s) / (t - s) for a flow."""
        c, at_s = self.schedule.at(self.t, self.x_t), self.schedule.at(s, self.x_t)
        turn = at_s.alpha * c.sigma - c.alpha * at_s.sigma
        x0 = (c.sigma * x_s - at_s.sigma * self.x_t) / turn
        return self.target(x0, (at_s.alpha * self.x_t - c.alpha * x_s) / turn)

    def bridge_target(self, x_s: Tensor, s: Tensor, eps: Tensor) -> Tensor:
        """The unbiased output target when x_t = a x_s + b eps left level s (B,) with fresh noise.

        Phased DMD: the virtual clean sample and noise are x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 b) eps
        and (sigma_t / b) eps. Rows with s = 0 are ordinary denoising, exactly.
        """
        c, at_s = self.schedule.at(self.t, self.x_t), self.schedule.at(s, self.x_t)
        _, b = bridge(self.schedule, s, self.t, self.x_t)
        clean = expand(s == 0, self.x_t)
        b = b.masked_fill(clean, 1.0)
        x0 = x_s / at_s.alpha - c.alpha * at_s.sigma**2 / (at_s.alpha**2 * b) * eps
        noise = (c.sigma / b).masked_fill(clean, 1.0) * eps
        return self.target(x0, noise)

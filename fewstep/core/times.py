"""Times t in [0, 1]: their distributions, as maps from a uniform u, so that every draw stays a `Draw`; and steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.schedule import NoiseSchedule, shift

Law = Literal["uniform", "logit_normal", "log_normal", "karras", "u_shape"]


@dataclass
class Times:
    """How t is drawn. Applied in this order: law, shift, clamp to [low, high], snap to the process's own grid."""

    law: Law = "uniform"
    """uniform | logit_normal | log_normal (of sigma / alpha) | karras (grid with rho = 7) | u_shape (RF++)"""
    low: float = 0.0
    """lowest time, 0 = data"""
    high: float = 1.0
    """highest time, 1 = noise"""
    mean: float = 0.0
    """mean of the logit- or log-normal"""
    std: float = 1.0
    """deviation of the logit- or log-normal; steepness of the u-shape"""
    shift: float = 1.0
    """moves mass towards noise (> 1), as flow families do for large images"""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"times need 0 <= low < high <= 1, but low is {self.low} and high is {self.high}")
        if self.shift <= 0 or self.std <= 0:
            raise UserError(f"times need shift > 0 and std > 0, but shift is {self.shift} and std is {self.std}")

    def __call__(
        self, u: Tensor, schedule: NoiseSchedule, above: Tensor | None = None, below: Tensor | None = None
    ) -> Tensor:
        """t (B,) from u (B,) uniform in (0, 1). With `above` (B,), t is drawn from the part over that time.

        With `below` (B,) too, from the part between the two.
        """
        t = _LAWS[self.law](self, u.double(), schedule)
        t = shift(t, self.shift).clamp(self.low, self.high)
        if above is not None:
            t = above + ((1.0 if below is None else below) - above) * t
        return schedule.snap(t, above).to(torch.float32)


def _uniform(times: Times, u: Tensor, schedule: NoiseSchedule) -> Tensor:
    return times.low + (times.high - times.low) * u if times.shift == 1 else u


def _logit_normal(times: Times, u: Tensor, schedule: NoiseSchedule) -> Tensor:
    return torch.sigmoid(times.mean + times.std * torch.special.ndtri(u))


def _log_normal(times: Times, u: Tensor, schedule: NoiseSchedule) -> Tensor:
    return schedule.time_of(torch.exp(times.mean + times.std * torch.special.ndtri(u)))


def _karras_sigma(u: Tensor) -> Tensor:
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    return (low + u * (high - low)) ** 7


def _karras(times: Times, u: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Uniform on the ladder sigma = (min^(1/7) + u (max^(1/7) - min^(1/7)))^7 between 0.002 and 80."""
    return schedule.time_of(_karras_sigma(u))


def _u_shape(times: Times, u: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Density proportional to cosh(a (2 t - 1)) with a = std (RF++ uses 4 on this scale halved)."""
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(times.std)) / (2 * times.std)


_LAWS: dict[str, Callable[[Times, Tensor, NoiseSchedule], Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "log_normal": _log_normal,
    "karras": _karras,
    "u_shape": _u_shape,
}


@dataclass(frozen=True)
class Step:
    """`told` is the time the network is given, `level` the time whose alpha and sigma are used."""

    told: float
    level: float


@dataclass
class Grid:
    """A descending ladder of `count` + 1 times from 1 to 0 and neighbouring pairs (t, s) on it.

    The grid is shifted first and indices are skipped afterwards; shift(t) - step would leave the grid.
    """

    count: int = 18
    """intervals of the ladder"""
    shift: float = field(default=1.0)
    """moves the ladder towards noise (> 1)"""
    law: Literal["even", "karras"] = "even"
    """even | karras (even in sigma^(1/7) from .002 to 80, the last rung at noise)"""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"a time grid needs at least one interval, but count is {self.count}")

    def times(self, schedule: NoiseSchedule) -> Tensor:
        """(count + 1,) float32, ascending from exactly 0 to 1; fewer where a process has no time for a rung."""
        ladder = torch.arange(self.count + 1, dtype=torch.float64) / self.count
        if self.law == "karras":
            ladder[1:-1] = schedule.time_of(_karras_sigma(ladder[1:-1]))
        ladder = shift(ladder, self.shift)
        return torch.unique_consecutive(torch.cat([ladder[:1], schedule.snap(ladder[1:])]).float())

    def pair(self, u: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        """(t, s), each (B,): a uniformly chosen rung and the next cleaner one."""
        times = self.times(schedule).to(u.device)
        last = len(times) - 2
        index = (u * (last + 1)).long().clamp(max=last)
        return times[index + 1], times[index]

    def around(self, t: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        """(t, s), each (B,): the rungs between which the given times lie.

        Of a density of t this makes its integrals over the intervals (iCT's discretised log-normal).
        """
        times = self.times(schedule).to(t.device)
        index = torch.searchsorted(times, t.float().contiguous()).clamp(1, len(times) - 1)
        return times[index], times[index - 1]

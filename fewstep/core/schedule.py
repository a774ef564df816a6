"""Forward processes x_t = alpha_t x0 + sigma_t eps. Time t lies in [0, 1]: 0 is data, 1 is noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives in t, each (B, 1, .., 1) float32."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def expand(value: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, .., 1) with the rank of `like`."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


class NoiseSchedule(ABC):
    """One forward process. `prior_std` is the deviation of the noise a sampler starts from."""

    prior_std: float = 1.0

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, d_alpha / dt, d_sigma / dt for float64 t (B,)."""

    @abstractmethod
    def time_of(self, ratio: Tensor) -> Tensor:
        """The time t (B,) at which sigma / alpha equals `ratio` (B,) float64, clamped to the schedule's range."""

    def snap(self, t: Tensor, above: Tensor | None = None) -> Tensor:
        """The nearest time (B,) the networks of this process were trained on; with `above` (B,), one over that."""
        return t

    def at(self, t: Tensor, like: Tensor) -> Coefficients:
        """Coefficients at t (B,), shaped to broadcast over `like` (B, *S)."""
        values = self.coefficients(t.double())
        return Coefficients(*(expand(value.float(), like) for value in values))


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Piecewise linear interpolation: value and slope at x."""
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    slope = (values[right] - values[right - 1]) / (knots[right] - knots[right - 1])
    return values[right - 1] + slope * (x - knots[right - 1]), slope


@dataclass(eq=False)
class VP(NoiseSchedule):
    """Variance preserving, from the cumulative products `alphas_cumprod` (T,) of a diffusers scheduler.

    Index i of T sits at t = (i + 1) / T, and t = 0 is exactly clean. Between the knots the angle
    phi = atan2(sigma, alpha) is linear in t, so alpha^2 + sigma^2 = 1 everywhere and a zero terminal SNR is finite.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        products = self.alphas_cumprod.double().clamp(0, 1)
        self.steps = len(products)
        angles = torch.atan2((1 - products).sqrt(), products.sqrt())
        self._angles = torch.cat([torch.zeros(1, dtype=torch.float64), angles])
        self._knots = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        angle, speed = _interpolate(t, self._knots.to(t.device), self._angles.to(t.device))
        return angle.cos(), angle.sin(), -angle.sin() * speed, angle.cos() * speed

    def time_of(self, ratio: Tensor) -> Tensor:
        angle = torch.atan(ratio.double())
        t, _ = _interpolate(angle, self._angles.to(angle.device), self._knots.to(angle.device))
        return t.clamp(0, 1)

    def snap(self, t: Tensor, above: Tensor | None = None) -> Tensor:
        index = (t.double() * self.steps).round().clamp(min=1)
        if above is not None:
            index = index.maximum((above.double() * self.steps).round() + 1)
        return index.clamp(max=self.steps).div(self.steps).to(t.dtype)


@dataclass(eq=False)
class Flow(NoiseSchedule):
    """Rectified flow: alpha = 1 - t, sigma = t, velocity eps - x0."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return 1 - t, t, -one, one

    def time_of(self, ratio: Tensor) -> Tensor:
        return torch.where(ratio.isinf(), 1.0, ratio / (1 + ratio))


@dataclass(eq=False)
class EDM(NoiseSchedule):
    """Variance exploding (Karras et al. 2022): alpha = 1, sigma = sigma_max t."""

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        self.prior_std = self.sigma_max

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return one, self.sigma_max * t, torch.zeros_like(t), self.sigma_max * one

    def time_of(self, ratio: Tensor) -> Tensor:
        return (ratio / self.sigma_max).clamp(0, 1)


@dataclass(eq=False)
class Trig(NoiseSchedule):
    """TrigFlow with unit data deviation (Lu & Song 2024): alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        angle = t * (math.pi / 2)
        half_pi = math.pi / 2
        return angle.cos(), angle.sin(), -half_pi * angle.sin(), half_pi * angle.cos()

    def time_of(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio) / (math.pi / 2)


def vp_from_betas(kind: str, start: float, end: float, steps: int = 1000, zero_terminal_snr: bool = False) -> VP:
    """VP from the beta schedule `kind` of diffusers: linear, scaled_linear or squaredcos_cap_v2.

    `zero_terminal_snr` rescales as in Lin et al. 2023, algorithm 1. Raises ValueError for another kind.
    """
    if kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":
        knots = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((knots + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"unknown beta schedule '{kind}': use linear, scaled_linear or squaredcos_cap_v2")
    products = torch.cumprod(1 - betas, 0)
    if zero_terminal_snr:
        root = products.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        products = root**2
    return VP(products)


def add_noise(schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps for x0, eps (B, *S) and t (B,)."""
    c = schedule.at(t, x0)
    return c.alpha * x0 + c.sigma * eps


def bridge(schedule: NoiseSchedule, s: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), each (B, 1, .., 1), with x_t = a x_s + b eps for s < t (B,): the forward process from level s to t.

    a = alpha_t / alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2, formed in float64 because b vanishes as t -> s.
    """
    alpha_s, sigma_s, _, _ = schedule.coefficients(s.double())
    alpha_t, sigma_t, _, _ = schedule.coefficients(t.double())
    a = alpha_t / alpha_s
    b = ((sigma_t - a * sigma_s) * (sigma_t + a * sigma_s)).sqrt()
    return expand(a.float(), like), expand(b.float(), like)


def shift(t: Tensor, factor: float) -> Tensor:
    """t' = f t / (1 + (f - 1) t): multiplies the flow's sigma / alpha by f. The inverse has factor 1 / f."""
    return factor * t / (1 + (factor - 1) * t)


def remap(source: NoiseSchedule, target: NoiseSchedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(t', scale): x at level t of `source`, times scale (B, 1, .., 1), lies at level t' (B,) of `target`.

    Both levels have the same sigma / alpha, as far as `target` reaches; the scale is the ratio of the lengths
    sqrt(alpha^2 + sigma^2), which stays right where the source has more noise than the target's last level.
    """
    alpha, sigma, _, _ = source.coefficients(t.double())
    there = target.time_of(sigma / alpha)
    alpha_to, sigma_to, _, _ = target.coefficients(there)
    scale = torch.hypot(alpha_to, sigma_to) / torch.hypot(alpha, sigma)
    return there.to(t.dtype), expand(scale.float(), like)

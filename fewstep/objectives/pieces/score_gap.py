"""The distribution-matching gradient F - R in x0 space, its weights, and losses that carry it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewstep.core.prediction import Prediction
from fewstep.core.schedule import NoiseSchedule, bridge, expand

Weight = Literal["abs_mean", "snr", "alpha_sigma", "none"]


def noised(schedule: NoiseSchedule, x: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x at level s (B,), carried forward to level t (B,): a x + b eps; s = 0 is ordinary noising."""
    a, b = bridge(schedule, s, t, x)
    return a * x + b * eps


def abs_mean(x: Tensor, real: Tensor) -> Tensor:
    """DMD's normaliser (B, 1, .., 1): mean |x - R| over each sample, detached (Yin et al. 2024, eq. 8)."""
    mean = (x - real).abs().flatten(1).mean(1).clamp(min=1e-4)
    return expand(mean, x).detach()


def kl_weight(schedule: NoiseSchedule, s: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """alpha_t a / sigma_t^2 (B, 1, .., 1): makes F - R the exact KL gradient in x_s; SNR(t) at s = 0."""
    a, _ = bridge(schedule, s, t, like)
    c = schedule.at(t, like)
    return c.alpha * a / c.sigma**2


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient in x (B, *S) is `gradient` / numel, formed in float32."""
    x = x.float()
    return 0.5 * (x - (x - gradient.float()).detach()).square().mean()


@torch.no_grad()
def signals(x: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """`gap`: rms of F - R. `lag`: E[(R - F)(F - x)], zero where the critic knows the generator."""
    return {"gap": (fake - real).square().mean().sqrt(), "lag": ((real - fake) * (fake - x)).mean()}


def direction(
    real: Tensor, fake: Tensor, x0: Tensor, weight: Weight, schedule: NoiseSchedule, s: Tensor, t: Tensor
) -> Tensor:
    """The weighted gap (B, *S): (F - R) / mean |x0 - R|, alpha_t a / sigma_t^2 (F - R), alpha_t sigma_t (F - R), F - R.

    alpha_sigma is sigma^2 on the gap of the predicted noises (SwiftBrush).
    """
    gap = fake - real
    if weight == "abs_mean":
        return gap / abs_mean(x0, real)
    if weight == "alpha_sigma":
        c = schedule.at(t, x0)
        return c.alpha * c.sigma * gap
    return gap * kl_weight(schedule, s, t, x0) if weight == "snr" else gap


def denoising_loss(prediction: Prediction, x: Tensor, s: Tensor, eps: Tensor, clamp: float = 10.0) -> Tensor:
    """The critic's loss on x at level s (B,), noised to the prediction's level with eps.

    At s = 0 plain denoising. Above, the unbiased bridge target with weight min(1, clamp b^2), because its variance
    grows like 1 / b^2 as t -> s (Phased DMD).
    """
    target = prediction.bridge_target(x, s, eps)
    _, b = bridge(prediction.schedule, s, prediction.t, x)
    weight = (clamp * b.square()).clamp(max=1.0).masked_fill(expand(s == 0, x), 1.0)
    return (weight * (prediction.value.float() - target).square()).mean()

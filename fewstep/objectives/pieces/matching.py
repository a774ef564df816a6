"""Matching the generator's noised samples to the teacher's, from level s = 0 or above."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.prediction import Prediction
from fewstep.objectives.base import Logs, Triad
from fewstep.objectives.pieces.score_gap import Weight, denoising_loss, direction, noised, signals, surrogate
from fewstep.rollout import Sample


def matching_loss(
    triad: Triad, batch: Batch, sample: Sample, t: Tensor, weight: Weight, huber: float = 0.0
) -> tuple[Tensor, Logs]:
    """A loss whose gradient is the weighted F - R at x_t, the sample carried from its level s to t (B,) > s.

    With weight snr the gradient is that of KL(q_t || p_t) in the state x_s; otherwise it is applied to the sample's
    x0, which is x_s up to a positive factor constant over the step. With `huber` = c > 0 the gap is that of the
    pseudo-Huber sqrt(gap^2 + c^2) - c.
    """
    schedule, x0 = triad.generator.schedule, sample.x0.detach()
    eps = batch.draw.normal("matching.eps", x0.shape[1:])
    with torch.no_grad():
        x_t = noised(schedule, sample.x.detach(), sample.s, t, eps)
        real, fake = triad.real_score(x_t, t, batch.cond).x0, triad.fake_score(x_t, t, batch.cond).x0
        gradient = direction(real, fake, x0, weight, schedule, sample.s, t)
        if huber:
            gradient = gradient / ((fake - real).square() + huber**2).sqrt()
    carrier = sample.x if weight == "snr" else sample.x0
    return surrogate(carrier, gradient), signals(x0, real, fake)


def critic_loss(triad: Triad, batch: Batch, sample: Sample, t: Tensor) -> Tensor:
    """Denoising of the detached sample from its level s to t (B,) by the critic, without guidance."""
    prediction, eps = judged(triad, batch, sample, t)
    return denoising_loss(prediction, sample.x, sample.s, eps)


def judged(triad: Triad, batch: Batch, sample: Sample, t: Tensor) -> tuple[Prediction, Tensor]:
    """What the critic says of the sample, carried from its level s to t (B,), and the noise (B, *S) that was added."""
    eps = batch.draw.normal("matching.critic_eps", sample.x.shape[1:])
    x_t = noised(triad.generator.schedule, sample.x, sample.s, t, eps)
    return triad.fake_score(x_t, t, batch.cond), eps

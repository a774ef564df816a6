"""f-distill (Xu et al. 2025, arXiv:2502.15681): DMD2 with the score gap of any f-divergence.

D_f(p || q) = E_q f(r), r = p / q, has the gradient -E h(r) alpha (s_p - s_q) dx/dtheta with h(r) = f''(r) r^2. The
discriminator's logit at the same x_t is log r, so each sample's (F - R) / mean |x - R| is multiplied by its h(r).
Ratios are divided by their mean in one of ten bins of time, and the weights by their mean; both means are those of
the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.schedule import expand
from fewstep.core.times import Times
from fewstep.objectives import dmd2
from fewstep.objectives.base import Share, Turn, Turns, sample_logs
from fewstep.objectives.pieces.carried import carried

Divergence = Literal[
    "reverse_kl",
    "softened_reverse_kl",
    "jensen_shannon",
    "squared_hellinger",
    "forward_kl",
    "jeffreys",
    "neyman",
    "pearson",
]
WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "jensen_shannon": lambda r: r / (1 + r),
    "squared_hellinger": lambda r: r.sqrt() / 4,
    "forward_kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 2 / r,
    "pearson": lambda r: 2 * r.square(),
}
"""h(r) = f''(r) r^2, from mode seeking to mode covering, then the two chi-squares"""
BINS = 10


@dataclass
class Config(dmd2.Config):
    name: str = "f_distill"
    divergence: Divergence = "jensen_shannon"
    """reverse_kl (DMD2) | softened_reverse_kl | jensen_shannon | squared_hellinger | forward_kl | jeffreys | neyman |
    pearson: the weight of each sample by how much likelier it is for real images than for the student's"""
    ratio_low: float = 0.1
    """smallest ratio that is believed"""
    ratio_high: float = 20.0
    """largest ratio that is believed"""
    bin_decay: float = 0.0
    """how much of a bin's mean ratio comes from earlier generator moves; 0 = the batch alone"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gan_weight:
            raise UserError(
                "f_distill reads the ratio of densities from its discriminator, but objective.gan_weight is 0: set it "
                "above 0, or use dmd2"
            )
        if not 0 < self.ratio_low < self.ratio_high:
            raise UserError(
                "f_distill needs 0 < objective.ratio_low < ratio_high, but "
                f"{self.ratio_low} and {self.ratio_high} were given"
            )
        if not 0 <= self.bin_decay < 1:
            raise UserError(f"objective.bin_decay is from 0 to below 1, but {self.bin_decay} was given")


class Objective(dmd2.Objective):
    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.register_buffer("levels", torch.ones(BINS))

    def turns(self, batch: Batch, step: int) -> Turns:
        """As DMD2's, but the weights of the whole batch stand between the look at a sample and its loss.

        A graph of the generator that lived through that would stand beside those of the other micro-batches. So the
        sample is made without one, looked at, and made again, the same, with it.
        """
        if self.generates(step):
            look, leaf = self.glance(batch, step)
            weight = yield from self.weights(look)
            sample = self.sample(batch, step, grad=True)
            if look.adversarial is not None:
                look = replace(look, adversarial=carried(look.adversarial, leaf, sample.x0))
            gradient = expand(weight, leaf) * self.gradient(batch, sample, look)
            loss, logs = self.loss_along(batch, sample, look, gradient)
            logs["ratio/spread"] = weight.std(unbiased=False)
            yield Turn("generator", loss, {**logs, **sample_logs(sample.x0, batch)})
        else:
            sample = self.sample(batch, step, grad=False)
        if self.criticises(step):
            loss, logs = self.critic_loss(batch, sample.detach(), step)
            yield Turn("fake_score", loss, logs)

    def glance(self, batch: Batch, step: int) -> tuple[dmd2.Look, Tensor]:
        """A look at a sample made without a graph, and the leaf (B, *S) in which its loss is differentiable."""
        sample = self.sample(batch, step, grad=False)
        leaf = sample.x0.detach().requires_grad_()
        return self.heard(self.look(batch, replace(sample, x0=leaf)), step), leaf

    def weights(self, look: dmd2.Look) -> Generator[Share, Any, Tensor]:
        """h (B,) of each sample, one in the mean over the whole batch."""
        assert look.logits is not None
        ratio = look.logits.clamp(-10, 10).exp().clamp(self.config.ratio_low, self.config.ratio_high)
        within = torch.nn.functional.one_hot(bin_of(look.t, self.config.times), BINS).to(ratio)
        before = self.levels.clone()  # micro-batches share their answer before any of them moves on
        total, count = yield Share(torch.stack([ratio @ within, within.sum(0)]))
        mean = before.lerp(total / count.clamp(min=1e-12), 1 - self.config.bin_decay)
        self.levels.copy_(torch.where(count > 0, mean, before))
        weight = WEIGHTS[self.config.divergence](ratio / (within @ self.levels))
        return weight / (yield Share(weight.mean()))


def bin_of(t: Tensor, times: Times) -> Tensor:
    """The bin (B,) of t (B,) in equal parts of [low, high]."""
    return ((t - times.low) / (times.high - times.low) * BINS).long().clamp(0, BINS - 1)

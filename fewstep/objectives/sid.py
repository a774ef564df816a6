"""Score identity distillation (Zhou et al. 2024, arXiv:2404.04057): the Fisher divergence, made trainable.

Generator: (R - F) [(R - x) - alpha (R - F)] / mean |x - R|, differentiated through x and through R and F as functions
of x_t; alpha = 1/2 is half the gradient of E |R - F|^2 for the critic that knows the generator. Critic: denoising.
With `critic_guidance` it is SiD-LSG (arXiv:2406.01561), whose critic is guided where it learns and where it is asked.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import add_noise
from fewstep.core.times import Times
from fewstep.models.backbone import Guided, frozen
from fewstep.objectives import diff_instruct
from fewstep.objectives.base import Logs, Triad
from fewstep.objectives.pieces.carried import carried
from fewstep.objectives.pieces.exits import Exits
from fewstep.objectives.pieces.matching import critic_loss
from fewstep.objectives.pieces.score_gap import abs_mean, signals
from fewstep.rollout import Sample


@dataclass
class Config:
    name: str = "sid"
    alpha: float = 1.2
    """how much of the divergence as it stands is taken off: 1.2 (the paper's) | 1 | 0.5 (the exact gradient)"""
    weight: Literal["abs_mean", "none"] = "abs_mean"
    """of the loss: abs_mean (the paper's) | none"""
    critic_guidance: float = 1.0
    """guidance of the critic, in its training and in the comparison; 1 = none, SiD-LSG: that of model.guidance"""
    times: Times = field(default_factory=lambda: Times(low=0.02, high=0.98))
    """times at which the scores are compared"""
    critic_times: Times = field(default_factory=Times)
    """times at which the critic is trained"""
    ratio: int = 1
    """critic moves for each generator move"""
    exits: Exits = field(default_factory=Exits)
    """of several steps: the one that is trained"""

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise UserError(f"objective.ratio is at least 1, but {self.ratio} was given")


class Objective(diff_instruct.Objective):
    def attach(self, x: Tensor, cond: Condition) -> None:
        """Raises UserError for a guided critic that does not know what to say without a condition."""
        try:
            _ = self.config.critic_guidance == 1 or self.triad.fake_score.null(cond)
        except ValueError:
            raise UserError(
                "objective.critic_guidance guides the critic, but this network has no null condition: set "
                "objective.critic_guidance=1"
            ) from None

    def compared(self, batch: Batch) -> Triad:
        kappa = self.config.critic_guidance
        return self.triad if kappa == 1 else replace(self.triad, fake_score=Guided(self.triad.fake_score, kappa))

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.draw_time(batch, "sid.t", self.config.times)
        eps = batch.draw.normal("sid.eps", sample.x0.shape[1:])
        x = sample.x0.detach().requires_grad_()
        with frozen(self.triad.fake_score):
            loss, logs = self.divergence(x, add_noise(self.triad.generator.schedule, x, eps, t), t, batch, step)
            return carried(loss, x, sample.x0), logs

    def divergence(self, x: Tensor, x_t: Tensor, t: Tensor, batch: Batch, step: int) -> tuple[Tensor, Logs]:
        """The loss as a function of the samples x and of x_t, which is made of them."""
        triad = self.compared(batch)
        real, fake = triad.real_score(x_t, t, batch.cond), triad.fake_score(x_t, t, batch.cond)
        return self.identity(x, real, fake), signals(x, real.x0, fake.x0)

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.draw_time(batch, "diff_instruct.critic_t", self.config.critic_times)
        return critic_loss(self.compared(batch), batch, sample, t), {}

    def identity(self, x: Tensor, real: Prediction, fake: Prediction) -> Tensor:
        """Mean of (R - F) [(R - x) - alpha (R - F)], weighted."""
        # Networks that were constants in x_t would make this nearly the plain score gap, whatever alpha is.
        assert real.value.requires_grad and fake.value.requires_grad, "both scores are differentiable in x_t"
        gap = real.x0 - fake.x0
        terms = gap * (real.x0 - x - self.config.alpha * gap)
        return (terms / abs_mean(x, real.x0) if self.config.weight == "abs_mean" else terms).mean()

"""Diff-Instruct (Luo et al. 2023, arXiv:2305.18455): the integral over time of w(t) KL(q_t || p_t).

Generator: x = G(z), x_t = alpha x + sigma eps, gradient F(x_t) - R(x_t) in x0 as it is, at log-normal noise levels.
Critic: denoising on the generator's samples, one move for each of the generator's. No data and no pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.times import Times
from fewstep.objectives import base
from fewstep.objectives.base import Logs, Triad
from fewstep.objectives.pieces.exits import Exits
from fewstep.objectives.pieces.matching import critic_loss, matching_loss
from fewstep.objectives.pieces.score_gap import Weight
from fewstep.rollout import Sample


def edm_times() -> Times:
    """ln(sigma / alpha) ~ N(-1.2, 1.2^2), at which EDM teachers are trained."""
    return Times(law="log_normal", mean=-1.2, std=1.2)


@dataclass
class Config:
    name: str = "diff_instruct"
    weight: Weight = "none"
    """of the score gap: none (the paper's, in x0) | snr (the exact KL gradient) | abs_mean | alpha_sigma"""
    times: Times = field(default_factory=edm_times)
    """times at which the scores are compared"""
    critic_times: Times = field(default_factory=edm_times)
    """times at which the critic is trained"""
    ratio: int = 1
    """critic moves for each generator move"""
    exits: Exits = field(default_factory=Exits)
    """of several steps: the one that is trained"""

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise UserError(f"objective.ratio is at least 1, but {self.ratio} was given")


class Objective(base.Objective):
    roles = ("generator", "real_score", "fake_score")

    def generates(self, step: int) -> bool:
        return step % self.config.ratio == 0

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        exits, net = self.config.exits, self.triad.generator
        exit = exits.at(self.rollout, batch.draw, "diff_instruct.exit")
        return self.rollout(net, batch.noise, batch.cond, batch.draw, exit=exit, grad=exits.window * grad)

    def compared(self, batch: Batch) -> Triad:
        """The networks whose scores are compared."""
        return self.triad

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.draw_time(batch, "diff_instruct.t", self.config.times)
        return matching_loss(self.compared(batch), batch, sample, t, self.config.weight)

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.draw_time(batch, "diff_instruct.critic_t", self.config.critic_times)
        return critic_loss(self.triad, batch, sample, t), {}

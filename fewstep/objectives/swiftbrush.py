"""SwiftBrush (Nguyen & Tran 2024, arXiv:2312.05239): variational score distillation into one step.

Generator: gradient sigma^2 (eps_R - eps_F) at x_t, which is alpha sigma (F - R) in x0, with the same guidance on the
teacher and on the critic. Critic: alpha^2 |eps_F - eps|^2 on the generator's samples, now and then without their
condition because it is guided. The paper's critic is an adapter on the teacher's weights: players.fake_score.lora.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.schedule import add_noise
from fewstep.core.times import Times
from fewstep.models.backbone import Guided
from fewstep.objectives import diff_instruct
from fewstep.objectives.base import Logs, Triad
from fewstep.objectives.pieces.conditions import drop_labels
from fewstep.objectives.pieces.exits import Exits
from fewstep.objectives.pieces.score_gap import Weight
from fewstep.rollout import Sample


@dataclass
class Config:
    name: str = "swiftbrush"
    weight: Weight = "alpha_sigma"
    """of the score gap: alpha_sigma (the paper's) | snr (the exact KL gradient) | abs_mean | none"""
    times: Times = field(default_factory=lambda: Times(low=0.02, high=0.98))
    """times at which the scores are compared"""
    critic_times: Times = field(default_factory=Times)
    """times at which the critic is trained"""
    label_dropout: float = 0.1
    """share of samples on which the critic is trained without their condition"""
    ratio: int = 1
    """critic moves for each generator move"""
    exits: Exits = field(default_factory=Exits)
    """of several steps: the one that is trained"""

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise UserError(f"objective.ratio is at least 1, but {self.ratio} was given")
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"objective.label_dropout is a share in [0, 1), but {self.label_dropout} was given")


class Objective(diff_instruct.Objective):
    def compared(self, batch: Batch) -> Triad:
        return replace(self.triad, fake_score=Guided(self.triad.fake_score, self.triad.real_score.scale))  # type: ignore[arg-type]

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        loss, logs = super().generator_loss(batch, sample, step)
        return loss, {"gap": logs["gap"]}  # a guided critic lags behind the samples by design

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        fake_score, schedule = self.triad.fake_score, self.triad.generator.schedule
        t = self.draw_time(batch, "swiftbrush.critic_t", self.config.critic_times)
        eps = batch.draw.normal("swiftbrush.critic_eps", sample.x0.shape[1:])
        cond = drop_labels(fake_score, batch, self.config.label_dropout)
        prediction = fake_score(add_noise(schedule, sample.x0, eps, t), t, cond)
        alpha = schedule.at(t, eps).alpha
        return (alpha * (prediction.eps - eps)).square().mean(), {}

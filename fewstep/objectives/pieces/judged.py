"""A discriminator between what a student jumps to and its target there (PCM, arXiv:2405.18407, section 3.3).

Both are noised anew, from the level s that they end at to a time between s and t, and read by heads on the frozen
teacher's features. Real is the target, not data: where the two agree there is nothing to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone, unguided
from fewstep.models.head import Heads
from fewstep.objectives import base
from fewstep.objectives.base import Logs, Turn, Turns
from fewstep.objectives.pieces import gan
from fewstep.objectives.pieces.gan import GanLoss
from fewstep.objectives.pieces.score_gap import noised


@dataclass(frozen=True)
class Jump:
    """Where a student's jump from t led at s, and where it should have led: x and target (B, *S), t and s (B,)."""

    x: Tensor
    target: Tensor
    t: Tensor
    s: Tensor
    loss: Tensor
    logs: Mapping[str, Tensor]


@dataclass
class JudgeConfig:
    weight: float = 0.0
    """of the discriminator in the generator's loss; 0 = none"""
    loss: GanLoss = "hinge"
    """hinge | softplus (non-saturating)"""
    taps: list[str] = field(default_factory=list)
    """blocks of the teacher that are read, each by a head of its own; default: the family's middle block"""
    times: Times = field(default_factory=Times)
    """law of the time between s and t that both are noised to"""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise UserError(f"judge.weight is at least 0, but {self.weight} was given")


class Judged(base.Objective):
    """To be mixed into an objective with a method `compared(batch, step) -> Jump` and a JudgeConfig, `config.judge`."""

    compared: Callable[[Batch, int], Jump]

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.heads: Heads | None = None

    @property
    def watched(self) -> Backbone:
        return unguided(self.triad.real_score)

    def attach(self, x: Tensor, cond: Condition) -> None:
        super().attach(x, cond)
        judge = self.config.judge
        if judge.weight and self.triad.real_score is None:
            raise UserError(
                "objective.judge reads the features of a teacher: set objective.mode=distillation, or "
                "objective.judge.weight=0"
            )
        if judge.weight:
            self.heads = gan.heads_for(self.watched, tuple(judge.taps) or (self.watched.tap,), x, cond)

    def learns(self):
        return {} if self.heads is None else {"discriminator": [self.heads]}

    def turns(self, batch: Batch, step: int) -> Turns:
        jump = self.compared(batch, step)
        if self.heads is None:
            yield Turn("generator", jump.loss, dict(jump.logs))
            return
        x_t, t = self.noised_anew(batch, jump.x, jump)
        _, _, adversarial = gan.heard(self.watched, self.heads, x_t, t, batch.cond, self.config.judge.loss)
        loss = jump.loss + self.config.judge.weight * adversarial
        yield Turn("generator", loss, {**jump.logs, "gan/generator": adversarial.detach()})
        told_apart, logs = self.discriminated(batch, jump)
        yield Turn("discriminator", told_apart, logs)

    def noised_anew(self, batch: Batch, x: Tensor, jump: Jump) -> tuple[Tensor, Tensor]:
        """x (B, *S) at level s, carried to a time (B,) between s and t; the same draws for both sides."""
        t = self.draw_time(batch, "judged.t", self.config.judge.times, above=jump.s, below=jump.t)
        eps = batch.draw.normal("judged.eps", x.shape[1:])
        return noised(self.triad.generator.schedule, x, jump.s, t, eps), t

    def discriminated(self, batch: Batch, jump: Jump) -> tuple[Tensor, Logs]:
        fake, real = (self.opinion(batch, x, jump) for x in (jump.x.detach(), jump.target))
        return gan.discriminator_loss(fake, real, self.config.judge.loss), {"gan/accuracy": gan.accuracy(fake, real)}

    def opinion(self, batch: Batch, x: Tensor, jump: Jump) -> Tensor:
        """The logits (B, heads); the teacher's features carry no graph."""
        assert self.heads is not None
        x_t, t = self.noised_anew(batch, x, jump)
        with torch.no_grad():
            features = self.watched(x_t, t, batch.cond, taps=self.heads.names, stop=True).features
        return self.heads.each(features)

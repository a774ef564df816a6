"""Phased DMD (arXiv:2510.27684): the schedule is split by SNR into phases, each matched on its own sub-interval.

Phase k walks its steps and stops at x_s, s the level at which the next phase begins. The scores are compared at
t in (s, 1) on x_t = a x_s + b eps, and the critic learns the unbiased bridge target there; no clean sample is needed
before the last phase. One phase is DMD.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.times import Times
from fewstep.objectives import base
from fewstep.objectives.base import Logs
from fewstep.objectives.pieces.matching import critic_loss, matching_loss
from fewstep.objectives.pieces.score_gap import Weight
from fewstep.rollout import Sample


@dataclass
class Config:
    name: str = "phased_dmd"
    phases: int = 2
    """sub-intervals; the student's steps are shared out evenly"""
    phase: int = 0
    """the phase this stage trains, from 1; 0 alternates over all of them with one shared network"""
    weight: Weight = "abs_mean"
    """of the score gap: abs_mean | snr | none"""
    times: Times = field(default_factory=lambda: Times(low=0.02, high=0.98))
    """where in (s, 1) the scores are compared, as a share of that interval"""
    critic_times: Times = field(default_factory=lambda: Times(low=0.02))
    """where in (s, 1) the critic is trained, as a share of that interval"""
    ratio: int = 5
    """steps for each generator move; the critic moves at every step"""

    def __post_init__(self) -> None:
        if self.ratio < 1 or self.phases < 1:
            raise UserError("objective.ratio and objective.phases are at least 1")
        if not 0 <= self.phase <= self.phases:
            raise UserError(f"objective.phase is from 0 (all) to {self.phases}, but {self.phase} was given")
        if self.phases > 1 and (self.times.low == 0 or self.critic_times.low == 0):
            raise UserError("phased times need low > 0: the bridge from s to t is singular as t reaches s")


class Objective(base.Objective):
    roles = ("generator", "real_score", "fake_score")

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.partial = config.phases > 1
        if len(rollout) % config.phases:
            raise UserError(
                f"{len(rollout)} steps cannot be shared out to {config.phases} phases: make model.steps a multiple, or "
                "objective.phases one of its divisors"
            )

    def generates(self, step: int) -> bool:
        return step % self.config.ratio == 0

    def phase_of(self, step: int) -> int:
        """The phase, from 0, that `step` trains.

        Alternating ones change right after each generator move, so that the critic has just trained on the phase that
        it judges next.
        """
        if self.config.phase:
            return self.config.phase - 1
        return (step + self.config.ratio - 1) // self.config.ratio % self.config.phases

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        """Exits at a random step of the phase and jumps from there to the level at which the phase ends."""
        length = len(self.rollout) // self.config.phases
        first = self.phase_of(step) * length
        exit = first + batch.draw.shared_integer("phased.exit", length)
        stop = self.rollout.level_after(first + length - 1)
        return self.rollout(
            self.triad.generator, batch.noise, batch.cond, batch.draw, exit=exit, stop=stop, grad=int(grad)
        )

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.draw_time(batch, "phased.t", self.config.times, above=sample.s)
        return matching_loss(self.triad, batch, sample, t, self.config.weight)

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.draw_time(batch, "phased.critic_t", self.config.critic_times, above=sample.s)
        assert torch.all(t > sample.s), "the bridge goes from the cleaner to the noisier level"
        return critic_loss(self.triad, batch, sample, t), {}

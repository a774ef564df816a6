"""DisBack (Zhang et al. 2024, arXiv:2408.15991): the teacher's score is met on its way back from the student.

Degradation recording: for the first `record` steps the generator rests, the critic, a copy of the teacher, learns its
samples, and snapshots of the critic are kept. Backtracking: DMD2, whose real score is the last snapshot, then the one
before at every `interval` steps, and in the end the teacher. A student that starts far away is never asked to leap.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.models.backbone import Backbone, Guided
from fewstep.objectives import dmd2
from fewstep.objectives.base import Logs
from fewstep.rollout import Sample


@dataclass
class Config(dmd2.Config):
    name: str = "disback"
    snapshots: int = 4
    """degraded teachers between the student and the teacher, kept with the run; 0 = DMD2, without any recording"""
    record: int = 100
    """steps of the recording, over which the snapshots are spread out evenly"""
    interval: int = 100
    """steps after which the next cleaner snapshot takes over"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snapshots < 0 or self.interval < 1:
            raise UserError(
                f"objective.snapshots is at least 0 and objective.interval at least 1, but {self.snapshots} and "
                f"{self.interval} were given"
            )
        if self.record < self.snapshots:
            raise UserError(
                f"objective.record is at least one step a snapshot, {self.snapshots}, but {self.record} was given"
            )


class Objective(dmd2.Objective):
    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.recorded = config.record if config.snapshots else 0
        # Of the critic and not of the teacher: a snapshot of an adapter is an adapter.
        kept = [copy.deepcopy(triad.fake_score).requires_grad_(False) for _ in range(config.snapshots)]
        self.snapshots = nn.ModuleList(kept)
        self.degraded = 0

    def generates(self, step: int) -> bool:
        return step >= self.recorded and super().generates(step - self.recorded)

    def moment(self, number: int) -> int:
        """The step before which snapshot `number`, from 1, is taken; the critic goes on for as long as between two."""
        return -(-number * self.recorded // (self.config.snapshots + 1))

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Takes the snapshots of this step, before the critic moves."""
        for number, snapshot in enumerate(self.snapshots, 1):
            if step == self.moment(number):
                snapshot.load_state_dict(self.triad.fake_score.state_dict())

    def target(self, step: int) -> int:
        """The number of the snapshot that is the real score of this step, 0 for the teacher."""
        return max(0, self.config.snapshots - (step - self.recorded) // self.config.interval)

    @property
    def real(self) -> Backbone:
        if self.degraded == 0:
            return self.triad.real_score
        return Guided(self.snapshots[self.degraded - 1], self.triad.real_score.scale)  # type: ignore[arg-type]

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        self.take(step)
        self.degraded = self.target(step)
        loss, logs = super().generator_loss(batch, sample, step)
        return loss, {**logs, "target": torch.tensor(float(self.degraded))}

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        self.take(step)
        return super().critic_loss(batch, sample, step)

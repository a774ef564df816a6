"""Multi-student distillation (Song et al. 2024, arXiv:2410.23274): each student for its own part of the conditions.

The labels are split into K equal blocks; a run trains the student of one of them with DMD2. Its score gap and its GAN
move the generator on samples of that part alone, K times as much, while a paired regression keeps them all. The others
have runs of their own, and `fewstep sample RUN --bank RUN..` asks each for its part. One part is DMD2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import expand
from fewstep.models.bank import Partition
from fewstep.objectives import dmd2
from fewstep.objectives.base import Logs
from fewstep.rollout import Sample


@dataclass
class Config(dmd2.Config):
    name: str = "msd"
    parts: int = 4
    """students, and equal blocks of labels"""
    part: int = 1
    """the block whose student this run trains, from 1"""
    labels: int = 12
    """class labels of the data, the one that means "no class" not counted"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.parts <= self.labels:
            raise UserError(
                f"objective.parts is from 1 to the number of labels ({self.labels}), but {self.parts} was given"
            )
        if not 1 <= self.part <= self.parts:
            raise UserError(f"objective.part is from 1 to {self.parts}, but {self.part} was given")


class Objective(dmd2.Objective):
    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.partition = Partition(config.parts, config.labels)

    def attach(self, x: Tensor, cond: Condition) -> None:
        if self.config.parts > 1 and "class_labels" not in cond.inputs:
            raise UserError(
                f"objective.parts={self.config.parts} parts the class labels, but these networks are told none: set "
                "objective.parts=1, or use data with labels"
            )
        super().attach(x, cond)

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        return super().generator_loss(batch, replace(sample, x0=self.filtered(sample.x0, batch.cond)), step)

    def filtered(self, x0: Tensor, cond: Condition) -> Tensor:
        """x0 (B, *S) itself, whose gradient is that of the part's samples alone, made up for the others."""
        own = self.config.part - 1
        kept = (self.partition.of(cond, len(x0)) == own).to(x0) / self.partition.share(own)
        return x0.detach() + expand(kept, x0) * (x0 - x0.detach())

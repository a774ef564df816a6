"""Segmented trajectory consistency (TSCD of Hyper-SD; Ren et al. 2024, arXiv:2404.13686): jumps inside of segments.

Time is cut into k equal segments. A jump from t ends in the segment of t, at a rung s from its floor to m; stages with
k = 8, 4, 2, 1, each from the last one's weights, lengthen the jumps step by step. k = 1 is trajectory consistency.
With `gan_weight`, as the paper mixes it in, a discriminator on the frozen teacher's features tells jumps from their
targets. Its human feedback and the score gap of its one-step model are stages of other objectives.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.times import Grid
from fewstep.objectives import tcd
from fewstep.objectives.pieces.distances import Robust
from fewstep.objectives.pieces.judged import JudgeConfig, Judged


@dataclass
class Config(tcd.Config):
    name: str = "tscd"
    distance: Robust = "l2"
    """l2 | l1 | huber | sample_huber (of a sample as a whole)"""
    grid: Grid = field(default_factory=lambda: Grid(count=48))
    """neighbouring times"""
    segments: int = 4
    """k, equal parts of the grid"""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """the discriminator between jumps and their targets"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segments < 1 or self.grid.count % self.segments:
            raise UserError(
                f"objective.segments divides the {self.grid.count} intervals of objective.grid, but {self.segments} "
                "was given"
            )


class Objective(Judged, tcd.Objective):
    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        rungs = len(config.grid.times(triad.generator.schedule)) - 1
        if rungs != config.grid.count:
            raise UserError(
                f"objective.grid has {config.grid.count} intervals, but the process of this teacher has times for "
                f"{rungs} of them alone: make it coarser, for segments are equal parts of it"
            )

    def floor(self, t: Tensor) -> Tensor:
        """The lower end (B,) of the segment that t lies in or ends."""
        ladder = self.config.grid.times(self.triad.generator.schedule).to(t.device)
        long = (len(ladder) - 1) // self.config.segments
        index = torch.searchsorted(ladder, t.contiguous())
        return ladder[(index - 1) // long * long]

    def ends(self, batch: Batch, t: Tensor, m: Tensor) -> Tensor:
        return self.rung(batch, self.floor(t), m)

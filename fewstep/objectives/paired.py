"""Distance to a teacher's stored pairs (z, y), d(G(z), y): DMD's regression (arXiv:2311.18828) as a term of any `sum`.

The step that is compared is that of the sample of the step, so it is trained with what else is said of that sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.objectives import base
from fewstep.objectives.base import Logs
from fewstep.objectives.pieces.distances import Seen
from fewstep.objectives.pieces.paired import paired_loss, refuse_fresh_noise
from fewstep.rollout import Rollout, Sample


@dataclass
class Config:
    name: str = "paired"
    distance: Seen = "l2"
    """l2 | l1 | huber | reader (features of the built-in reader) | lpips"""
    lpips: str | None = None
    """file with the weights of LPIPS, for distance=lpips"""
    window: int = 1
    """steps before that of the sample, itself included, that carry a gradient"""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"objective.window is at least 1 step, but {self.window} was given")
        if (self.distance == "lpips") != (self.lpips is not None):
            raise UserError(
                "objective.distance=lpips goes with objective.lpips, the file of its weights: give both, or neither"
            )


class Objective(base.Objective):
    reads = ("pair",)

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.perception = config.distance if config.distance in ("reader", "lpips") else None

    def refuse(self, rollout: Rollout) -> None:
        refuse_fresh_noise(rollout, "the objective paired", "leave it out")

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        """Of an objective by itself: where the rollout ends; its gradient comes from the pairs."""
        return super().sample(batch, step, grad=False)

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        args = (self.triad.generator, self.rollout, batch, sample.index, self.config.window)
        loss = paired_loss(*args, self.config.distance, self.perceive)
        return loss, {"paired": loss.detach()}

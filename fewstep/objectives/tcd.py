"""Trajectory consistency distillation (TCD; Zheng et al. 2024, arXiv:2402.19159): jumps to any cleaner time.

t > m are neighbours on a grid and s is a rung at or below m. Both ends jump to s along the line that x0 and eps of the
prediction span, and are compared there:

    L = E d(j(x_t, t, s), sg j'(x_m, m, s)),    j(x, t, s) = alpha_s x0(x, t) + sigma_s eps(x, t)

Sampled by `model.transition=gamma`: a jump to (1 - gamma) s, then fresh noise up to s. As in the paper the network is
told t alone, so no weights bring the loss to zero for all s at once: x0 and eps would have to be those of the map to
each s. With `second_time` it is told s too and such weights exist. The paper's training code is not public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.objectives import consistency
from fewstep.rollout import GammaJump, Rollout, jumps, ode, renoise


@dataclass
class Config(consistency.Config):
    name: str = "tcd"
    second_time: bool = False
    """the generator is told where it jumps"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curriculum.law != "constant":
            raise UserError(f"objective.{self.name} jumps to rungs of one grid: leave objective.curriculum out")


class Objective(consistency.Objective):
    @classmethod
    def two_times(cls, config: Any) -> bool:
        return config.second_time

    def refuse(self, rollout: Rollout) -> None:
        if self.two_times(self.config) and not jumps(rollout.step):
            raise UserError(
                "this network is told where it jumps, which fresh noise alone does not say: set model.transition=ode, "
                "or gamma"
            )
        if len(rollout) > 1 and not (rollout.step in (ode, renoise) or isinstance(rollout.step, GammaJump)):
            raise UserError(
                "jumps to cleaner times are walked with all, some or none of the noise fresh: set "
                "model.transition to renoise, gamma or ode"
            )

    def ends(self, batch: Batch, t: Tensor, m: Tensor) -> Tensor:
        return self.rung(batch, torch.zeros_like(m), m)

    def rung(self, batch: Batch, low: Tensor, high: Tensor) -> Tensor:
        """A rung (B,) of the grid in [low, high], all of them alike; both ends are rungs."""
        ladder = self.config.grid.times(self.triad.generator.schedule).to(high.device)
        first, last = (torch.searchsorted(ladder, end.contiguous()) for end in (low, high))
        index = first + (batch.draw.uniform("tcd.s") * (last - first + 1)).long()
        return ladder[index.minimum(last)]

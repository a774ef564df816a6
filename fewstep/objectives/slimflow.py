"""SlimFlow (Zhu et al. 2024, arXiv:2407.12718): reflow and distillation into a network smaller than its teacher.

Annealing reflow: the noise of a pair (z, x) is replaced by z' = sqrt(1 - b^2) z + b eps, b falling from 1 to 0 during
`anneal` steps. At b = 1 this is flow matching on the teacher's samples, from which a new network can start; at b = 0 it
is reflow. Flow-guided distillation, from the reflowed network v2 (`objective.target_teacher`): at t = 1 the pairs, and
for fresh noise z, whose one step is u = v(z, 1), a second look: x_t = z - (1 - t) u and one more step of v2 from there,

    L = E |z - u - x|^2 on pairs + weight E |u - (z - (x_t - t v2(x_t, t)))|^2,   t ~ U(low, high)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Pair
from fewstep.core.errors import UserError
from fewstep.core.schedule import expand
from fewstep.core.times import Times
from fewstep.models.backbone import unguided
from fewstep.objectives import rectified_flow
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.objectives.pieces.flow import as_flow


@dataclass
class Config(rectified_flow.Config):
    name: str = "slimflow"
    phase: Literal["reflow", "distill"] = "reflow"
    """reflow: annealed; distill: one step, guided by the reflowed network"""
    anneal: int = 400
    """steps over which the share of fresh noise falls to 0; 0 = reflow from the start"""
    target_teacher: str | None = None
    """of distill, the reflowed network: previous.generator, or a run or model folder"""
    guided: float = 1.0
    """weight of the second look"""
    second_times: Times = field(default_factory=lambda: Times(low=0.2, high=0.8))
    """where on the way of the one step it is taken"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anneal < 0 or self.guided < 0:
            raise UserError(
                f"objective.anneal and objective.guided are at least 0, but {self.anneal} and {self.guided} were given"
            )
        if self.phase == "distill" and self.guided and not self.target_teacher:
            raise UserError(
                "objective.phase=distill is guided by the reflowed network: set "
                "objective.target_teacher=previous.generator, or objective.guided=0"
            )


class Objective(rectified_flow.Objective):
    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        return ("generator", *(["target_score"] if config.phase == "distill" and config.guided else []))

    def turns(self, batch: Batch, step: int) -> Turns:
        pair = batch.pair
        assert pair is not None
        if self.config.phase == "reflow":
            loss, x0 = self.reflow(batch, replace(pair, noise=self.annealed(batch, pair, step)))
        else:
            loss, x0 = self.distill(batch, pair)
            if self.config.guided:
                loss = loss + self.config.guided * self.looked_again(batch)
        yield Turn("generator", loss, sample_logs(x0, pair))

    def share(self, step: int) -> float:
        """b at a step."""
        return max(0.0, 1 - step / self.config.anneal) if self.config.anneal else 0.0

    def annealed(self, batch: Batch, pair: Pair, step: int) -> Tensor:
        """z' (B, *S)."""
        b = self.share(step)
        return (1 - b * b) ** 0.5 * pair.noise + b * batch.draw.normal("slimflow.fresh", pair.noise.shape[1:])

    def looked_again(self, batch: Batch) -> Tensor:
        z, ones = batch.noise, torch.ones(len(batch.noise), device=batch.noise.device)
        u = self.flow(z, ones, batch.cond).velocity
        t = self.config.second_times(batch.draw.uniform("slimflow.t"), self.flow.schedule)
        with torch.no_grad():
            x_t = z - expand(1 - t, z) * u
            end = as_flow(unguided(self.triad.target_score))(x_t, t, batch.cond).x0
        return (u - (z - end)).square().mean()

"""Trajectory-backward consistency (TBCM; Tang et al. 2025, arXiv:2511.20410): sCM without images.

The states are those that the teacher itself passes on its way from noise: times t_0 = 1 > t_1 > .. are drawn one from
each interval of a shifted ladder, and x <- cos(d) x - sin(d) v turns the state by the angle d between them. All of them
but the first are learnt from in one batch, and the velocity that made each is the one of its tangent, so the teacher is
asked once a state. r rises during `warmup`, and towards the end falls to `last_share` over `calm` steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.schedule import expand, shift
from fewstep.objectives import scm
from fewstep.objectives.scm import QUARTER, States


@dataclass
class Config(scm.Config):
    name: str = "tbcm"
    states: int = 8
    """states of a trajectory, each from its own interval"""
    route_shift: float = 2.5
    """moves the intervals towards noise (> 1)"""
    calm_from: int = 0
    """step from which r falls again; 0 = never"""
    calm: int = 200
    """steps over which it falls"""
    last_share: float = 0.5
    """what it falls to"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "distillation" or self.data != "real":
            raise UserError(
                "tbcm follows a teacher and reads nothing: leave objective.mode and objective.data out, or use scm"
            )
        if self.states < 2 or self.route_shift <= 0 or self.calm < 1 or not 0 <= self.last_share <= 1:
            raise UserError(
                "objective.states is at least 2, route_shift above 0, calm at least 1 and last_share from 0 to 1, but "
                f"{self.states}, {self.route_shift}, {self.calm} and {self.last_share} were given"
            )


class Objective(scm.Objective):
    reads = ()

    def share(self, step: int) -> float:
        risen, config = super().share(step), self.config
        if not config.calm_from or step < config.calm_from:
            return risen
        fallen = min(1.0, (step - config.calm_from) / config.calm)
        return risen + (config.last_share - risen) * fallen

    def route(self, batch: Batch) -> Tensor:
        """Times (states, B), falling from 1: the first is pure noise, each other one from its own interval."""
        count = self.config.states
        low = torch.arange(count - 1, -1, -1, dtype=torch.float64, device=batch.noise.device) / count
        place = batch.draw.uniform("tbcm.route", (count,)).T.double()
        times = shift(low[:, None] + place / count, self.config.route_shift).float()
        return torch.cat([torch.ones_like(times[:1]), times[1:]])

    def states(self, batch: Batch) -> States:
        times, x, seen = self.route(batch), batch.noise, []
        for t, after in zip(times, [*times[1:], None], strict=True):
            v = self.velocity(self.teacher(batch), x, t, batch.cond)
            seen.append((x, t, v))
            if after is not None:
                turn = expand((t - after) * QUARTER, x)
                x = turn.cos() * x - turn.sin() * v
        states, when, velocities = (torch.cat(part) for part in zip(*seen[1:], strict=True))
        rows = torch.arange(len(batch.noise), device=x.device).repeat(len(times) - 1)
        return States(states, when, velocities, self.told(batch, batch.cond)[rows])

"""What objectives share whose network, read as a flow, is told where its step ends: x_s = x_t - (t - s) u(x_t, t, s).

u is the mean velocity from t to s where it obeys, at all times, either of

    of the start    u = v(x_t, t) - (t - s) du/dt    along the flow, s held (Euler)
    of the end      u = v(x_s, s) + (t - s) du/ds    x_t and t held (Lagrange)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow, add_noise, expand, remap
from fewstep.models.backbone import Backbone
from fewstep.models.tangent import Direction, along
from fewstep.objectives import base
from fewstep.objectives.pieces.derivative import Derivative
from fewstep.objectives.pieces.flow import as_flow
from fewstep.rollout import Rollout, jumps


class TwoTimes(base.Objective):
    @classmethod
    def two_times(cls, config: Any) -> bool:
        return True

    def refuse(self, rollout: Rollout) -> None:
        if not jumps(rollout.step):
            raise UserError(
                "this objective learns where a flow leads, which is deterministic: set model.transition=ode, or gamma, "
                "which adds noise where the network has landed"
            )

    @property
    def flow(self) -> Backbone:
        return as_flow(self.triad.generator)

    def noisiest(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Pure noise (B, *S) and its time (B,) as a flow's: 1, or as far as the generator's process reaches."""
        schedule = self.triad.generator.schedule
        z = noise * schedule.prior_std
        t, scale = remap(schedule, Flow(), z.new_ones(len(z), dtype=torch.float32), z)
        return scale * z, t


class FlowMap(Derivative, TwoTimes):
    """Learns from a derivative: its Config has `tangent`; `interval` also needs `times` and `equal`."""

    stream: ClassVar[str] = "flow_map"
    """what its draws are called"""

    def attach(self, x: Tensor, cond: Condition) -> None:
        self.choose_way(self.flow, x, cond, to=True)

    def interval(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """t and s <= t, each (B,), of the flow; s = t in a share `equal` of the rows."""
        pair = [self.config.times(batch.draw.uniform(f"{self.stream}.{i}"), self.flow.schedule) for i in range(2)]
        t, s = torch.maximum(*pair), torch.minimum(*pair)
        return t, torch.where(batch.draw.uniform(f"{self.stream}.equal").to(t.device) < self.config.equal, t, s)

    def noised(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and eps - x0, each (B, *S)."""
        assert batch.x0 is not None
        eps = batch.draw.normal(f"{self.stream}.eps", batch.x0.shape[1:])
        return add_noise(self.flow.schedule, batch.x0, eps, t), eps - batch.x0

    def by_start(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, v: Tensor) -> Tensor:
        """(t - s) du/dt (B, *S), x moving with the velocity v."""
        toward = Direction(v, torch.ones_like(t), torch.zeros_like(s))
        return expand(t - s, x_t) * self.along(x_t, t, s, cond, toward)

    def by_end(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """(t - s) du/ds (B, *S)."""
        toward = Direction(torch.zeros_like(x_t), torch.zeros_like(t), torch.ones_like(s))
        return expand(t - s, x_t) * self.along(x_t, t, s, cond, toward)

    def along(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, toward: Direction) -> Tensor:
        return along(self.flow, x_t, t, cond, toward, self.way, self.config.tangent.step, to=s)

    @torch.no_grad()
    def at_end(self, teacher: Backbone, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """v(x_s, s) (B, *S) of the teacher, where the network lands."""
        u = self.flow(x_t, t, cond, to=s).velocity
        return as_flow(teacher)(x_t - expand(t - s, x_t) * u, s, Condition(cond.inputs)).velocity

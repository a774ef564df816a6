"""ArcFlow (Yang et al. 2026, arXiv:2602.09014): a policy that bends, learnt on its own way without data.

Between two questions the student follows a mixture of velocities with momentum in closed form (see `models/policy.py`).
From pure noise its own walk leads to the beginning of a random segment. Inside of it, at a random time a, the state is
where the policy leads, or, in a share of the rows that falls to 0 during `mixing` steps, where the (guided) teacher
does. The policy's mean velocity over a short window below a is drawn to the teacher's velocity at that state:

    L = E |mean velocity from a to a - window - v(x_a, a)|^2

The official code lets parts of the policy's and of the teacher's way alternate inside of a segment, and looks at four
states of it; here each row has one state, made by the one or the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import expand
from fewstep.models.backbone import Backbone
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.policy import Policy, PolicyNet
from fewstep.objectives import base
from fewstep.objectives.base import Turn, Turns, sample_logs
from fewstep.rollout import Rollout, ode


@dataclass
class Config:
    name: str = "arcflow"
    modes: int = 16
    """velocities of the mixture"""
    hidden: int = 64
    """width of the layer that makes them"""
    window: float = 0.0234
    """over which the policy's velocity is the mean; the paper's 3 / 128"""
    mixing: int = 400
    """steps over which the share of states on the teacher's way falls from 1 to 0"""
    teacher_steps: int = 2
    """steps of the teacher from the segment's beginning to such a state"""

    def __post_init__(self) -> None:
        if self.modes < 1 or self.hidden < 1 or self.teacher_steps < 1 or self.mixing < 0:
            raise UserError(
                "objective.modes, hidden and teacher_steps are at least 1 and objective.mixing at least 0, but "
                f"{self.modes}, {self.hidden}, {self.teacher_steps} and {self.mixing} were given"
            )
        if not 0 < self.window <= 1:
            raise UserError(f"objective.window is a time above 0 and at most 1, but {self.window} was given")


class Objective(base.Objective):
    roles = ("generator", "real_score")

    @classmethod
    def wrapped(cls, config: Any, network: DiffusersBackbone, x: Tensor, cond: Condition) -> Backbone:
        return PolicyNet(network, config.modes, config.hidden, x)

    def refuse(self, rollout: Rollout) -> None:
        if rollout.step is not ode:
            raise UserError("the policy of arcflow is followed without fresh noise: set model.transition=ode")

    def turns(self, batch: Batch, step: int) -> Turns:
        index = batch.draw.shared_integer("arcflow.segment", len(self.rollout))
        start, policy = self.asked(batch, index)
        low = self.rollout.level_after(index)
        a = low + (policy.t - low) * batch.draw.uniform("arcflow.a").to(policy.t)
        with torch.no_grad():
            x_a = policy.to(a)
            if step < self.config.mixing:
                x_a = torch.where(self.taught(batch, step, x_a), self.by_teacher(start, policy.t, a, batch), x_a)
            v = self.triad.real_score(x_a, a, batch.cond).velocity
        mean = policy.between(a, (a - self.config.window).clamp(min=low))
        yield Turn("generator", (mean - v).square().mean(), sample_logs(policy.x0, batch))

    def asked(self, batch: Batch, index: int) -> tuple[Tensor, Policy]:
        """The state (B, *S) at which segment `index` begins, on the student's own way, and what it says there."""
        net, x, here = self.triad.generator, batch.noise, self.rollout.steps[index]
        if index:
            with torch.no_grad():
                args = (net, x, batch.cond, batch.draw)
                x = self.rollout(*args, exit=index - 1, stop=here.level).x
        rows = x.new_ones(len(x), dtype=torch.float32)
        policy = net(x, here.told * rows, batch.cond).at(here.level * rows)
        assert isinstance(policy, Policy)
        return x, policy

    def taught(self, batch: Batch, step: int, like: Tensor) -> Tensor:
        """(B, 1, .., 1) whose state the teacher makes."""
        return expand(batch.draw.uniform("arcflow.taught") < 1 - step / self.config.mixing, like)

    def by_teacher(self, x: Tensor, t: Tensor, a: Tensor, batch: Batch) -> Tensor:
        count = self.config.teacher_steps
        for i in range(count):
            here, after = (t + (a - t) * k / count for k in (i, i + 1))
            x = self.triad.real_score(x, here, batch.cond).to(after)
        return x

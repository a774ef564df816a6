"""TwinFlow (Cheng et al. 2025, arXiv:2512.05150): one flow network is student, teacher and critic at once.

Told no sign it jumps to the clean sample, x = x_t - t v(x_t, t); told + it is the velocity of the data, told - that of
its own samples. Both velocities learn by flow matching, and two residuals, clamped, are the gradients of the jump:

    of the gap      v-(x_t, t) - v+(x_t, t)                            at x_t = (1 - t) x + t eps, x its own sample
    any-step        (t v(x_t, t) - (t - d) v(x_(t-d), t - d)) / d - (eps - x0)    at x_t of data, x_(t-d) on its line

The second is zero on average, but for O(d), where v is the mean velocity of the flow from t to 0. The sign is a dial
that is silent at the start, so all three start as the teacher; a trained student needs none and is a plain network.
Every loss sees the whole batch, of which the paper gives each a part. Self-guidance, the robust norm, the weight over
times, a second sub-step and an averaged target are not here.

With `ends: any` the network is told where a jump ends, x_r = x_t - (t - r) v(x_t, t, r), for a third of the rows at 0,
near t, and anywhere between; t - r and t - d - r stand for t and t - d in the residual, and velocities end where they
begin. Then several steps need no fresh noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow, add_noise, expand
from fewstep.core.times import Times
from fewstep.objectives import base
from fewstep.objectives.base import Logs
from fewstep.objectives.pieces.exits import Exits
from fewstep.objectives.pieces.score_gap import signals, surrogate
from fewstep.rollout import Rollout, Sample, renoise

REAL, FAKE = 1.0, -1.0


@dataclass
class Config:
    name: str = "twinflow"
    times: Times = field(default_factory=lambda: Times(low=0.02, high=0.98))
    """times at which the two velocities are compared"""
    flow_times: Times = field(default_factory=Times)
    """times at which the velocities and the jump are learnt"""
    rectify: float = 0.5
    """weight of the gap between the two velocities"""
    jump: float = 1.0
    """weight of the any-step residual; 0 leaves the jump to the gap alone"""
    clamp: float = 1.0
    """largest size of a value of either residual"""
    short_step: float = 0.01
    """d of the any-step residual"""
    ends: Literal["clean", "any"] = "clean"
    """where jumps go to: always the clean sample, or a time that the network is told"""
    exits: Exits = field(default_factory=Exits)
    """of several steps: the one that is trained"""

    def __post_init__(self) -> None:
        if min(self.rectify, self.jump) < 0 or not self.clamp > 0:
            raise UserError(
                f"objective.rectify and jump are at least 0 and objective.clamp is above 0, but {self.rectify}, "
                f"{self.jump} and {self.clamp} were given"
            )
        if not 0 < self.short_step < 1:
            raise UserError(f"objective.short_step is a time between 0 and 1, but {self.short_step} was given")


class Objective(base.Objective):
    reads = ("x0",)
    dials = ("sign",)

    @classmethod
    def two_times(cls, config: Any) -> bool:
        return config.ends == "any"

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        if config.ends == "any" and not rollout.two_times:
            raise UserError(
                "objective.ends=any tells the network where a step ends: set model.transition=ode or gamma, or "
                "objective.ends=clean"
            )
        if not isinstance(triad.generator.schedule, Flow):
            raise UserError("twinflow compares velocities of a flow: take a flow teacher, or another objective")

    def refuse(self, rollout: Rollout) -> None:
        """A jump to the clean sample is no denoiser: see the objective `consistency`."""
        if len(rollout) > 1 and rollout.step is not renoise and not rollout.two_times:
            raise UserError(
                f"{len(rollout)} jumps to the clean sample need fresh noise in between: set model.transition=renoise, "
                "or objective.ends=any, or use one step"
            )

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        exits, net = self.config.exits, self.triad.generator
        exit = exits.at(self.rollout, batch.draw, "twinflow.exit")
        return self.rollout(net, batch.noise, batch.cond, batch.draw, exit=exit, grad=exits.window * grad)

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        assert batch.x0 is not None
        rectified, logs = self.rectified(batch, sample)
        real = self.flow_matching(batch, batch.x0, REAL, "twinflow.real")
        fake = self.flow_matching(batch, sample.x0.detach(), FAKE, "twinflow.critic")
        loss = self.config.rectify * rectified + real + fake
        if self.config.jump:
            logs["jump"] = self.jumped(batch, batch.x0)
            loss = loss + self.config.jump * logs["jump"]
        return loss, {**logs, "velocity/real": real, "velocity/fake": fake}

    def rectified(self, batch: Batch, sample: Sample) -> tuple[Tensor, Logs]:
        """The gap between the network's velocities, both asked where the sample is noised to."""
        x = sample.x0.detach()
        t = self.draw_time(batch, "twinflow.t", self.config.times)
        x_t = add_noise(self.triad.generator.schedule, x, batch.draw.normal("twinflow.eps", x.shape[1:]), t)
        with torch.no_grad():
            real, fake = (self.signed(x_t, t, batch.cond, sign) for sign in (REAL, FAKE))
        velocity = (sample.x_t - sample.x0.float()) / expand(sample.t, x)
        return self.pulled(velocity, fake.velocity - real.velocity), signals(x, real.x0, fake.x0)

    def flow_matching(self, batch: Batch, x: Tensor, sign: float, purpose: str) -> Tensor:
        """Of samples x (B, *S) by the velocity of that sign."""
        t = self.draw_time(batch, f"{purpose}_t", self.config.flow_times)
        eps = batch.draw.normal(f"{purpose}_eps", x.shape[1:])
        velocity = self.signed(add_noise(self.triad.generator.schedule, x, eps, t), t, batch.cond, sign).velocity
        return (velocity - (eps - x)).square().mean()

    def jumped(self, batch: Batch, x0: Tensor) -> Tensor:
        """The any-step residual; where t - r < d the short step is the whole way, and this is flow matching."""
        net = self.triad.generator
        t = self.draw_time(batch, "twinflow.jump_t", self.config.flow_times)
        end = self.end(batch, t)
        line = batch.draw.normal("twinflow.jump_eps", x0.shape[1:]) - x0
        way = t if end is None else (t - end).clamp(min=1e-6)  # rounding can put the end on t
        short = expand(way.clamp(max=self.config.short_step), x0)
        x_t, s = x0 + expand(t, x0) * line, t - short.flatten()
        velocity = net(x_t, t, batch.cond, to=end).velocity
        with torch.no_grad():
            rest = (expand(way, x0) - short) * net(x_t - short * line, s, batch.cond, to=end).velocity
        return self.pulled(velocity, (expand(way, x0) * velocity.detach() - rest) / short - line)

    def end(self, batch: Batch, t: Tensor) -> Tensor | None:
        """r (B,) of the any-step residual."""
        if self.config.ends == "clean":
            return None
        part = batch.draw.uniform("twinflow.end").to(t.device)
        kinds = torch.stack([torch.zeros_like(t), t * (0.95 + 0.05 * part), t * part])
        return kinds.gather(0, batch.draw.integers("twinflow.end_kind", 3).to(t.device)[None])[0]

    def pulled(self, velocity: Tensor, residual: Tensor) -> Tensor:
        """A loss whose gradient in the velocity is the clamped residual."""
        return surrogate(velocity, residual.clamp(-self.config.clamp, self.config.clamp))

    def signed(self, x_t: Tensor, t: Tensor, cond: Condition, sign: float) -> Prediction:
        """The network with the sign of its time told."""
        told = Condition(cond.inputs, {**cond.dials, "sign": torch.full_like(t, sign)})
        return self.triad.generator(x_t, t, told, to=t if self.config.ends == "any" else None)

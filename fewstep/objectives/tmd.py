"""TMD (Nie et al. 2026, arXiv:2601.09881): a student whose trunk runs once a step and whose head walks N inner steps.

Stage `flow` teaches the head the law of y = eps - x0 given x_t, as a mean flow: with y_s = (1 - s) y + s y_1 its target
is y - (s - r) d head / ds along y_1 - y. Stage `match` is DMD2 on samples whose gradient goes through all inner steps.
With inner = 1 the student is the network itself and `match` is DMD2.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import add_noise, expand
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.inner import Headed
from fewstep.models.tangent import Direction, Tangent, Way, along
from fewstep.objectives import dmd2
from fewstep.objectives.base import Turn, Turns, sample_logs


@dataclass
class Config(dmd2.Config):
    name: str = "tmd"
    stage: Literal["flow", "match"] = "match"
    """flow: the head learns to walk, from data | match: DMD2 on what it makes"""
    inner: int = 2
    """N, how often the head runs in a step; 1 = the plain network"""
    split: str = ""
    """the last block of the trunk; default: the family's middle block"""
    flow_times: Times = field(default_factory=Times)
    """stage flow: of x_t"""
    inner_times: Times = field(default_factory=Times)
    """stage flow: of which two are drawn, the noisier one is s, the other r"""
    equal: float = 0.5
    """stage flow: share of rows with r = s, which are flow matching"""
    tangent: Tangent = field(default_factory=lambda: Tangent("difference", 1e-2))
    """stage flow: how the head's derivative is taken; the paper's way is differences"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner < 1 or not 0 <= self.equal <= 1:
            raise UserError(
                "objective.inner is at least 1 and objective.equal a share from 0 to 1, but "
                f"{self.inner} and {self.equal} were given"
            )
        if self.stage == "flow" and self.inner == 1:
            raise UserError("objective.stage=flow teaches a head that walks: set objective.inner above 1")


class Objective(dmd2.Objective):
    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        return ("generator",) if config.stage == "flow" else super().needs(config)

    @classmethod
    def wrapped(cls, config: Any, network: DiffusersBackbone, x: Tensor, cond: Condition) -> Backbone:
        return Headed(network, config.inner, config.split, x, cond) if config.inner > 1 else network

    def __init__(self, config, triad, rollout):
        flow = config.stage == "flow"
        super().__init__(replace(config, gan_weight=0.0, regression=0.0) if flow else config, triad, rollout)
        self.reads = ("x0",) if flow else self.reads

    def turns(self, batch: Batch, step: int) -> Turns:
        yield from (self.walked(batch),) if self.config.stage == "flow" else super().turns(batch, step)

    def walked(self, batch: Batch) -> Turn:
        """|head - sg(y - (s - r) d head / ds)|^2."""
        net, x0 = self.triad.generator, batch.x0
        assert x0 is not None and isinstance(net, Headed)
        t = self.draw_time(batch, "tmd.t", self.config.flow_times)
        eps, start = (batch.draw.normal(f"tmd.{word}", x0.shape[1:]) for word in ("eps", "start"))
        y, (s, r) = eps - x0, self.interval(batch)
        y_s = y + expand(s, y) * (start - y)
        x_t = add_noise(net.schedule, x0, eps, t)
        moment, turn = net.moment(x_t, t, batch.cond), Direction(start - y, torch.ones_like(s))
        slope = along(moment, y_s, s, batch.cond, turn, self.way, self.config.tangent.step, to=r)
        head = moment(y_s, s, batch.cond, to=r).value.float()
        loss = (head - (y - expand(s - r, y) * slope)).square().mean()
        return Turn("generator", loss, sample_logs(x_t - expand(t, y) * head, batch))

    @property
    def way(self) -> Way:
        return "exact" if self.config.tangent.way == "auto" else self.config.tangent.way

    def interval(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """s and r <= s, each (B,)."""
        one, other = (self.draw_time(batch, f"tmd.{i}", self.config.inner_times) for i in range(2))
        s, r = torch.maximum(one, other), torch.minimum(one, other)
        return s, torch.where(batch.draw.uniform("tmd.equal") < self.config.equal, s, r)

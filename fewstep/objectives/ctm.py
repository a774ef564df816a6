"""Consistency trajectory models (CTM; Kim et al. 2023, arXiv:2310.02279): jumps from any time to any cleaner one.

The network is told both times, G(x, t, s) = alpha_s x0 + sigma_s eps, which is x at s = t. From x_t the teacher takes a
random number of steps to x_m, and s is a rung at or below m. G(x_t, t, s) and sg G(x_m, m, s) are both carried to the
clean end by the trailing copy of the generator, and compared there. Beside it the diagonal is a denoiser:

    L = E d(G'(G(x_t, t, s), s, 0), G'(sg G'(x_m, m, s), s, 0)) + weight E |x0(x_t, t, t) - x0|^2

The paper balances the two by gradient norms and adds a GAN; here the weight is a number, and `judge` a discriminator of
the jumps on the teacher's features.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.schedule import add_noise, expand
from fewstep.objectives import tcd
from fewstep.objectives.pieces.distances import Robust, each
from fewstep.objectives.pieces.judged import JudgeConfig, Judged, Jump
from fewstep.objectives.pieces.teacher_step import Solver, teacher_step


@dataclass
class Config(tcd.Config):
    name: str = "ctm"
    second_time: bool = True
    """the generator is told where it jumps; always true"""
    solver: Solver = "heun"
    """teacher steps: euler (= DDIM) | heun"""
    distance: Robust = "l2"
    """l2 | l1 | huber | sample_huber (of a sample as a whole)"""
    most_steps: int = 4
    """most intervals of the grid that the teacher walks, of 1 to these at random, alike for the batch"""
    denoising: float = 1.0
    """weight of the denoising on the diagonal s = t; 0 = none"""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """the discriminator between jumps and their targets"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.second_time or self.target != "follower":
            raise UserError(
                "ctm is told where it jumps and is compared by its follower: leave objective.second_time and "
                "objective.target out"
            )
        if self.weight != "none":
            raise UserError("ctm compares clean ends, however far a jump is: leave objective.weight out")
        if not 1 <= self.most_steps <= self.grid.count or self.denoising < 0:
            raise UserError(
                f"objective.most_steps is from 1 to the {self.grid.count} intervals of objective.grid and "
                f"objective.denoising at least 0, but {self.most_steps} and {self.denoising} were given"
            )


class Objective(Judged, tcd.Objective):
    def neighbours(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """t, and m some rungs below it."""
        t, _ = super().neighbours(batch, step)
        return t, self.below(t, 1 + batch.draw.shared_integer("ctm.steps", self.config.most_steps))

    def below(self, t: Tensor, count: int) -> Tensor:
        """The rung (B,) `count` below the rung t, or the last one."""
        ladder = self.config.grid.times(self.triad.generator.schedule).to(t.device)
        return ladder[(torch.searchsorted(ladder, t.contiguous()) - count).clamp(min=0)]

    def cleaner(self, x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, m: Tensor, batch: Batch) -> Tensor:
        if self.config.mode == "training":
            return super().cleaner(x_t, x0, eps, t, m, batch)
        for _ in range(self.config.most_steps):
            if not bool((t > m).any()):
                break
            s = self.below(t, 1).maximum(m)
            moved = teacher_step(self.teacher(batch), x_t, t, s, batch.cond, self.config.solver)
            x_t, t = torch.where(expand(t > m, x_t), moved, x_t), s
        return x_t

    def compared(self, batch: Batch, step: int) -> Jump:
        jump = super().compared(batch, step)
        with torch.no_grad():
            target = self.carried(jump.target, jump.s, batch)
        loss = each(self.carried(jump.x, jump.s, batch), target, self.config.distance).mean()
        if self.config.denoising:
            loss = loss + self.config.denoising * self.diagonal(batch)
        return replace(jump, loss=loss)

    def carried(self, x_s: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """The clean end of a jump's end, by the follower, through which the gradient goes on to x_s."""
        clean = self.jump(self.targets["target"], x_s, s, torch.zeros_like(s), batch.cond).x0
        return torch.where(expand(s == 0, x_s), x_s, clean)

    def diagonal(self, batch: Batch) -> Tensor:
        """Denoising by the generator that is told to stay, in its own output."""
        net, x0 = self.triad.generator, batch.x0
        assert x0 is not None
        t = net.schedule.snap(batch.draw.uniform("ctm.diagonal").float())
        eps = batch.draw.normal("ctm.diagonal_eps", x0.shape[1:])
        prediction = net(add_noise(net.schedule, x0, eps, t), t, batch.cond, to=t)
        return (prediction.value.float() - prediction.target(x0, eps)).square().mean()

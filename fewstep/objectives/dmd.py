"""Distribution matching distillation (Yin et al. 2024, arXiv:2311.18828).

Generator: x = G(z), x_t = alpha x + sigma eps, gradient (F(x_t) - R(x_t)) / mean |x - R|, plus a regression to the
teacher's deterministic pairs. Critic: denoising on the generator's samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.core.times import Times
from fewstep.objectives import base
from fewstep.objectives.base import Logs
from fewstep.objectives.pieces.distances import Seen
from fewstep.objectives.pieces.exits import Exits
from fewstep.objectives.pieces.matching import critic_loss, matching_loss
from fewstep.objectives.pieces.paired import paired_loss, refuse_fresh_noise
from fewstep.objectives.pieces.score_gap import Weight
from fewstep.rollout import Sample


@dataclass
class Config:
    name: str = "dmd"
    weight: Weight = "abs_mean"
    """of the score gap: abs_mean (the paper's) | snr (the exact KL gradient) | none"""
    times: Times = field(default_factory=lambda: Times(low=0.02, high=0.98))
    """times at which the scores are compared"""
    critic_times: Times = field(default_factory=Times)
    """times at which the critic is trained"""
    regression: float = 0.25
    """weight of the paired regression; 0 needs no pairs"""
    distance: Seen = "l2"
    """of the regression: l2 | l1 | huber | reader (features of the built-in reader) | lpips (the paper's)"""
    lpips: str | None = None
    """file with the weights of LPIPS, for distance=lpips: VGG16's features and the linear layers"""
    ratio: int = 1
    """critic moves for each generator move"""
    exits: Exits = field(default_factory=Exits)
    """of several steps: the one that is trained"""

    def __post_init__(self) -> None:
        if self.ratio < 1 or self.regression < 0:
            raise UserError(
                f"objective.ratio is at least 1 and objective.regression at least 0, but {self.ratio} and "
                f"{self.regression} were given"
            )
        if (self.distance == "lpips") != (self.lpips is not None):
            raise UserError(
                "objective.distance=lpips goes with objective.lpips, the file of its weights: give both, or neither "
                "and take reader, which is built in"
            )


class Objective(base.Objective):
    roles = ("generator", "real_score", "fake_score")

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.reads = ("pair",) if config.regression else ()
        if config.regression:
            refuse_fresh_noise(rollout)
            self.perception = config.distance if config.distance in ("reader", "lpips") else None

    def generates(self, step: int) -> bool:
        return step % self.config.ratio == 0

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        exits, net = self.config.exits, self.triad.generator
        exit = exits.at(self.rollout, batch.draw, "dmd.exit")
        return self.rollout(net, batch.noise, batch.cond, batch.draw, exit=exit, grad=exits.window * grad)

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.draw_time(batch, "dmd.t", self.config.times)
        loss, logs = matching_loss(self.triad, batch, sample, t, self.config.weight)
        if self.config.regression:
            window, args = self.config.exits.window, (self.triad.generator, self.rollout, batch)
            logs["regression"] = paired_loss(*args, sample.index, window, self.config.distance, self.perceive)
            loss = loss + self.config.regression * logs["regression"]
        return loss, logs

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        t = self.draw_time(batch, "dmd.critic_t", self.config.critic_times)
        return critic_loss(self.triad, batch, sample, t), {}

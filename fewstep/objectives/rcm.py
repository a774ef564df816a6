"""rCM (Zheng et al. 2025, arXiv:2510.08431): continuous-time consistency, held to the teacher's law by a score gap.

    L = consistency L_sCM(data) + gap L_DMD(own samples)

Consistency is of the forward kind and keeps what there is, the gap of the reverse kind and sharpens it. The second
begins after the warm-up of the first. consistency = 0 is DMD2, gap = 0 is sCM, without a critic; with `discrete` the
first is consistency on a grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.times import Times
from fewstep.objectives import consistency, dmd2, scm
from fewstep.objectives.base import Logs, Turn, Turns, sample_logs
from fewstep.objectives.consistency import Config as Discrete
from fewstep.rollout import Sample


@dataclass
class Config(scm.Config):
    name: str = "rcm"
    times: Times = field(default_factory=lambda: Times(law="log_normal", mean=0.7, std=1.6))
    """law of the angle; log_normal is of its tangent, sigma / alpha"""
    weight: Literal["inverse_tan", "none"] = "none"
    """inverse_tan: 1 / tan of the angle | none"""
    adaptive: bool = False
    """a head of the time learns the size of the loss"""
    consistency: float = 50.0
    """weight of the consistency; the score gap has a factor of 1/2 in it, so that the paper's 100 to 1 is 50 to 1"""
    gap: float = 1.0
    """weight of the score gap and of what `matching` has beside it; 0 needs no critic"""
    discrete: Discrete | None = None
    """consistency on a grid in place of the continuous one"""
    matching: dmd2.Config = field(default_factory=lambda: dmd2.Config(ratio=5, gan_weight=0.0))
    """the score gap, its critic and its cadence"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.consistency, self.gap) < 0 or self.consistency + self.gap == 0:
            raise UserError(
                "objective.consistency and objective.gap are at least 0, and not both 0, but "
                f"{self.consistency} and {self.gap} were given"
            )
        if self.discrete is not None and (self.data != "real" or self.mode != self.discrete.mode):
            raise UserError(
                "objective.discrete of rcm is on real data, in a mode of its own: leave objective.data out, and set "
                f"objective.mode={self.discrete.mode}"
            )
        if self.matching.regression or not self.matching.backward_simulation:
            raise UserError(
                "objective.matching of rcm is the gap on own samples: leave its regression and backward_simulation out"
            )


class Objective(scm.Objective):
    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.matching = dmd2.Objective(config.matching, triad, rollout) if config.gap else None
        discrete = config.discrete if config.consistency else None
        self.on_grid = consistency.Objective(discrete, triad, rollout) if discrete is not None else None
        reads = {"x0" if self.on_grid or config.data == "real" else "pair"} if config.consistency else set()
        self.reads = tuple(sorted(reads | set(self.matching.reads if self.matching else ())))

    @classmethod
    def by_derivative(cls, config: Any) -> bool:
        return bool(config.consistency) and config.discrete is None

    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        teacher = config.gap or config.mode == "distillation"
        return ("generator", *(["real_score"] if teacher else []), *(["fake_score"] if config.gap else []))

    def attach(self, x: Tensor, cond: Condition) -> None:
        super().attach(x, cond)
        if self.matching is not None:
            self.matching.attach(x, cond)

    def followers(self):
        return {} if self.on_grid is None else self.on_grid.followers()

    def learns(self):
        return {**super().learns(), **({} if self.matching is None else self.matching.learns())}

    def generates(self, step: int) -> bool:
        return self.matching is None or self.matching.generates(step)

    def matches(self, step: int) -> bool:
        """Whether the score gap is heard: not while the tangent warms up."""
        return self.matching is not None and (not self.config.consistency or self.share(step) == 1)

    def turns(self, batch: Batch, step: int) -> Turns:
        matching = self.matching
        sample = None if matching is None else matching.sample(batch, step, grad=self.generates(step))
        if self.generates(step):
            yield Turn("generator", *self.generator_part(batch, sample, step))
        if matching is not None and sample is not None and matching.criticises(step):
            loss, logs = matching.critic_loss(batch, sample.detach(), step)
            yield Turn("fake_score", loss, logs)

    def generator_part(self, batch: Batch, sample: Sample | None, step: int) -> tuple[Tensor, Logs]:
        loss, logs = batch.noise.new_zeros(()), Logs()
        if self.config.consistency:
            kept, logs = self.consistent(batch, step)
            loss = self.config.consistency * kept
        if self.matching is not None and sample is not None and self.matches(step):
            gap, seen = self.matching.generator_loss(batch, sample, step)
            loss, logs = loss + self.config.gap * gap, {**logs, **seen, **sample_logs(sample.x0, batch)}
        return loss, logs

    def consistent(self, batch: Batch, step: int) -> tuple[Tensor, Logs]:
        if self.on_grid is None:
            loss, logs, x0 = self.continuous(self.states(batch), step)
            return loss, {**logs, **sample_logs(x0, batch)}
        self.on_grid.targets = self.targets
        jump = self.on_grid.compared(batch, step)
        return jump.loss, dict(jump.logs)

"""SANA-Sprint (Chen et al. 2025, arXiv:2503.09641): continuous-time consistency beside a latent GAN.

    L = L_sCM(v of a guidance w, which the generator is told) + weight (-D(noised f(x_t, t)))

w is one of a list for every sample. The GAN's jumps start from pure noise in a share of the rows, where cos(a) = 0 and
the tangent has nothing to say. Jumps and data are noised alike and read by heads on several blocks of the frozen
teacher, with the hinge. The paper's negative pairs of images and other prompts are not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Trig, add_noise
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone, Guided, unguided
from fewstep.models.head import Heads
from fewstep.objectives import scm
from fewstep.objectives.base import Logs, Turn, Turns, sample_logs
from fewstep.objectives.pieces import gan
from fewstep.objectives.pieces.gan import GanLoss

TENTH = 0.1
"""of the guidance is what the generator is told"""


@dataclass
class Config(scm.Config):
    name: str = "sana_sprint"
    times: Times = field(default_factory=lambda: Times(law="log_normal", mean=0.2, std=1.6))
    """law of the angle; log_normal is of its tangent, sigma / alpha"""
    guidances: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0])
    """of the teacher, one for every sample"""
    guidance: float = 1.5
    """what the generator is told when it is sampled"""
    gan_weight: float = 0.5
    """of the discriminator in the generator's loss"""
    gan_loss: GanLoss = "hinge"
    """hinge | softplus (non-saturating)"""
    gan_taps: list[str] = field(default_factory=list)
    """blocks of the teacher that are read, each by a head of its own; default: the family's middle block"""
    gan_times: Times = field(default_factory=lambda: Times(law="log_normal", mean=-0.6, std=1.0))
    """times that jumps and data are noised to"""
    from_noise: float = 0.5
    """share of the GAN's jumps that start from pure noise"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "distillation" or self.data != "real":
            raise UserError(
                "sana_sprint reads a teacher and real data: leave objective.mode and objective.data out, or use scm"
            )
        if not self.guidances or min(self.guidances) < 0:
            raise UserError(f"objective.guidances are numbers from 0, at least one, but {self.guidances} was given")
        if not min(self.guidances) <= self.guidance <= max(self.guidances):
            raise UserError(
                f"objective.guidance is what was trained, from {min(self.guidances)} to {max(self.guidances)}, but "
                f"{self.guidance} was given"
            )
        if not 0 <= self.from_noise <= 1 or not self.gan_weight > 0:
            raise UserError(
                "objective.from_noise is a share from 0 to 1 and objective.gan_weight above 0 (scm has no GAN), but "
                f"{self.from_noise} and {self.gan_weight} were given"
            )


class Objective(scm.Objective):
    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        self.heads: Heads | None = None

    @classmethod
    def tells(cls, config: Any) -> dict[str, float]:
        return {"guidance": TENTH * config.guidance}

    @property
    def watched(self) -> Backbone:
        return unguided(self.triad.real_score)

    def attach(self, x: Tensor, cond: Condition) -> None:
        if not cond.inputs:
            raise UserError(
                "objective sana_sprint guides its teacher, but these networks are told nothing: use scm, or data with "
                "labels or prompts"
            )
        super().attach(x, cond)
        self.heads = gan.heads_for(self.watched, tuple(self.config.gan_taps) or (self.watched.tap,), x, cond)

    def learns(self):
        return {**super().learns(), "discriminator": [self.heads]}

    def turns(self, batch: Batch, step: int) -> Turns:
        loss, logs, _ = self.continuous(self.states(batch), step)
        x0 = self.jumped(batch)
        adversarial = self.adversarial(batch, x0)
        logs |= {"gan/generator": adversarial.detach(), **sample_logs(x0, batch)}
        yield Turn("generator", loss + self.config.gan_weight * adversarial, logs)
        yield Turn("discriminator", *self.discriminated(batch, x0.detach()))

    def scales(self, batch: Batch) -> Tensor:
        """The guidance (B,) of each sample."""
        which = batch.draw.integers("sana.guidance", len(self.config.guidances))
        return torch.tensor(self.config.guidances, device=which.device)[which]

    def teacher(self, batch: Batch) -> Backbone:
        return Guided(self.watched, self.scales(batch))

    def told(self, batch: Batch, cond: Condition) -> Condition:
        return Condition(cond.inputs, {**cond.dials, "guidance": TENTH * self.scales(batch)})

    def jumped(self, batch: Batch) -> Tensor:
        """The clean ends (B, *S) of jumps from noised data, some of them from pure noise."""
        assert batch.x0 is not None
        free = self.config.times(batch.draw.uniform("sana.t"), Trig())
        t = torch.where(batch.draw.uniform("sana.pure").to(free) < self.config.from_noise, 1.0, free)
        x = add_noise(Trig(), batch.x0, batch.draw.normal("sana.eps", batch.x0.shape[1:]), t)
        return self.net(x, t, self.told(batch, batch.cond)).x0

    def noised(self, batch: Batch, x0: Tensor) -> tuple[Tensor, Tensor]:
        """x0 (B, *S) at the time (B,) of the teacher at which it is read; the same draws for jumps and data."""
        t = self.draw_time(batch, "sana.gan_t", self.config.gan_times)
        return add_noise(self.watched.schedule, x0, batch.draw.normal("sana.gan_eps", x0.shape[1:]), t), t

    def adversarial(self, batch: Batch, x0: Tensor) -> Tensor:
        assert self.heads is not None
        return gan.heard(self.watched, self.heads, *self.noised(batch, x0), batch.cond, self.config.gan_loss)[2]

    def discriminated(self, batch: Batch, x0: Tensor) -> tuple[Tensor, Logs]:
        assert batch.x0 is not None
        fake, real = (self.opinion(batch, x) for x in (x0, batch.x0))
        return gan.discriminator_loss(fake, real, self.config.gan_loss), {"gan/accuracy": gan.accuracy(fake, real)}

    def opinion(self, batch: Batch, x0: Tensor) -> Tensor:
        """The logits (B, heads); the teacher's features carry no graph."""
        assert self.heads is not None
        x_t, t = self.noised(batch, x0)
        with torch.no_grad():
            features = self.watched(x_t, t, batch.cond, taps=self.heads.names, stop=True).features
        return self.heads.each(features)

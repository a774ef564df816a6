"""The network passes that a cycle of DMD2 cannot do without, and nothing else: what a step is measured against."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor

from fewstep import build
from fewstep.build import Run
from fewstep.core.batch import Condition
from fewstep.models.backbone import frozen
from fewstep.models.diffusers import DiffusersBackbone, network_time
from fewstep.models.precision import computing
from fewstep.models.taps import Stopped, tapped
from fewstep.train.loop import train_step


def speaking(backbone: DiffusersBackbone) -> AbstractContextManager[None]:
    """Forwards of its network inside are those of this backbone: one network may have several voices."""
    shared = getattr(backbone, "shared", None)
    return nullcontext() if shared is None else shared.speaking(backbone.voice)  # type: ignore[attr-defined]


class Bare:
    """The passes of one cycle, with the cheapest possible losses: no draws, no data, no losses, no optimizer.

    A cycle is one generator move and the critic moves that go with it, of one-step DMD2, with or without its GAN.
    """

    def __init__(self, run: Run):
        self.generator, self.fake = run.triad.generator, run.triad.fake_score
        self.real = run.triad.real_score.inner  # type: ignore[union-attr]
        self.heads, self.ratio = run.objective.heads, run.config.objective.ratio  # type: ignore[attr-defined]
        size = run.config.batch // run.config.micro_batches
        self.x = torch.randn(size, *run.shape, device=run.device)
        self.t = network_time(self.real.schedule, torch.full((size,), 0.5, device=run.device))
        self.cond = run.conditions.of(torch.arange(size)).to(run.device)
        self.guided = run.config.model.guidance != 1
        self.taps = (self.fake.tap,) if self.heads is not None else ()  # type: ignore[union-attr, operator]

    def forward(
        self, backbone: DiffusersBackbone, x: Tensor, cond: Condition, tap: bool = False, stop: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, empty when stopped, and the tapped features."""
        output, t = x.new_zeros(()), self.t.repeat(len(x) // len(self.t))
        net, family = backbone.net, backbone.family
        with (
            speaking(backbone),
            computing(net, x.device.type),
            tapped(net, self.taps if tap else (), stop, family.feature) as features,
            suppress(Stopped),
        ):
            output = family.call(net, x, t, cond)
        return output, {name: feature.float() for name, feature in features.items()}

    def teacher(self) -> None:
        """One pass, of twice the rows where there is guidance."""
        with torch.no_grad():
            if self.guided:
                both = Condition.cat(self.real.null(self.cond), self.cond)
                self.forward(self.real, self.x.repeat(2, *[1] * (self.x.ndim - 1)), both)
            else:
                self.forward(self.real, self.x, self.cond)

    def generator_turn(self, sample: Tensor) -> None:
        self.teacher()
        if self.heads is None:
            with torch.no_grad():
                self.forward(self.fake, self.x, self.cond)
            sample.mean().backward()
            return
        with frozen(self.fake), frozen(self.heads):
            _, features = self.forward(self.fake, sample, self.cond, tap=True)
            (sample.mean() + self.heads(features).mean()).backward()

    def critic_turn(self) -> None:
        output, features = self.forward(self.fake, self.x, self.cond, tap=True)
        loss = output.mean()
        if self.heads is not None:
            _, real = self.forward(self.fake, self.x, self.cond, tap=True, stop=True)
            loss = loss + self.heads(features).mean() + self.heads(real).mean()
        loss.backward()

    def cycle(self) -> None:
        for step in range(self.ratio):
            with torch.set_grad_enabled(step == 0):
                sample, _ = self.forward(self.generator, self.x, self.cond)
            if step == 0:
                self.generator_turn(sample.float())
            self.critic_turn()
        for net in (self.generator, self.fake, self.heads):
            if net is not None:
                net.zero_grad(set_to_none=True)


def cycle_of(run: Run) -> Callable[[], None]:
    """The same cycle as the framework plays it: data, draws, losses, optimizers and followers included."""
    batches, ratio = build.batches(run), run.config.objective.ratio  # type: ignore[attr-defined]

    def cycle() -> None:
        for step in range(ratio):
            train_step(run.objective, batches(step), step, run.players)

    return cycle

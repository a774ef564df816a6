"""Few-step generation, shared by training, evaluation, sampling and the exported scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import add_noise, bridge
from fewstep.core.times import Step
from fewstep.models.backbone import Backbone, passes

TransitionName = Literal["renoise", "ode", "cps", "gamma", "reuse"]
Move = tuple[Tensor, Tensor | None]
"""Mean (B, *S) and deviation (B, 1, .., 1) of the next state; without a deviation the move is deterministic."""
Transition = Callable[[Prediction, Tensor], Move]
"""A prediction and the level s (B,) it moves to -> its Move."""


@dataclass(frozen=True)
class Sample:
    """What a rollout hands on.

    `x` (B, *S) is the state at level `s` (B,), 0 = clean; `x0` the last prediction of the clean sample;
    `x_t` and `t` (B,) the input of the last step and `index` its position in the rollout.
    """

    x: Tensor
    s: Tensor
    x0: Tensor
    x_t: Tensor
    t: Tensor
    index: int

    def detach(self) -> Sample:
        return Sample(self.x.detach(), self.s, self.x0.detach(), self.x_t.detach(), self.t, self.index)

    def clean(self) -> Sample:
        """The same step with x0 for its state, at level 0."""
        return replace(self, x=self.x0, s=torch.zeros_like(self.s))


def renoise(prediction: Prediction, s: Tensor) -> Move:
    """alpha_s x0 + sigma_s z with fresh z: the consistency-model (SDE) sampler."""
    at_s = prediction.schedule.at(s, prediction.x_t)
    return at_s.alpha * prediction.x0, at_s.sigma


def ode(prediction: Prediction, s: Tensor) -> Move:
    """alpha_s x0 + sigma_s eps: one DDIM or Euler step; with a flow map, its jump."""
    return prediction.to(s), None


def reuse(prediction: Prediction, s: Tensor) -> Move:
    """alpha_s x0 + sigma_s z with the noise z that the walk began with (RF++): exact where the paths are straight."""
    return renoise(prediction, s)


def cps(eta: float) -> Transition:
    """Coefficient-preserving sampling: the noise is cos(pi eta / 2) eps + sin(pi eta / 2) z.

    eta = 0 is `ode`, eta = 1 is `renoise`.
    """
    kept, new = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)

    def step(prediction: Prediction, s: Tensor) -> Move:
        at_s = prediction.schedule.at(s, prediction.x_t)
        return at_s.alpha * prediction.x0 + kept * at_s.sigma * prediction.eps, new * at_s.sigma

    return step


@dataclass(frozen=True)
class GammaJump:
    """TCD: jump to the cleaner level (1 - gamma) s, then add fresh noise up to s.

    gamma = 0 is `ode`, gamma = 1 is `renoise`.
    """

    gamma: float

    def __call__(self, prediction: Prediction, s: Tensor) -> Move:
        cleaner = (1 - self.gamma) * s
        a, b = bridge(prediction.schedule, cleaner, s, prediction.x_t)
        return a * prediction.to(cleaner), b


def jumps(step: Transition) -> bool:
    """Whether this transition lets a network that is told where its step ends land there."""
    return step is ode or isinstance(step, GammaJump)


def landing(step: Transition, s: float) -> float:
    """Where the network itself lands in a step to level s."""
    return (1 - step.gamma) * s if isinstance(step, GammaJump) else s


def transition(name: TransitionName, eta: float = 0.5) -> Transition:
    """The transition of that name; `eta` is the share of fresh noise of `cps` and the gamma of `gamma`."""
    if name == "cps":
        return cps(eta)
    if name == "gamma":
        return GammaJump(eta)
    return {"renoise": renoise, "reuse": reuse, "ode": ode}[name]


COUNT = "steps"
"""The dial that tells a network of how many steps its walk is."""


def counted(cond: Condition, count: int, noise: Tensor) -> Condition:
    """`cond` with 1 / count told for every row of noise (B, *S)."""
    share = torch.full((len(noise),), 1 / count, device=noise.device)
    return Condition(cond.inputs, {**cond.dials, COUNT: share})


class Rollout:
    """Walks `steps`, noisiest first, from unit noise. With `two_times` the network is told where each step ends.

    With `count` it is told of how many steps the walk is, by the dial `steps`: 1 / count; `tells` are further dials,
    each of one value.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        step: Transition = renoise,
        two_times: bool = False,
        count: int | None = None,
        tells: Mapping[str, float] | None = None,
    ):
        if not steps:
            raise ValueError("a rollout needs at least one step")
        if two_times and not jumps(step):
            raise ValueError("a network that is told where its step ends goes with the transitions ode and gamma alone")
        self.steps, self.step, self.two_times, self.count = tuple(steps), step, two_times, count
        self.tells = dict(tells or {})

    def __len__(self) -> int:
        return len(self.steps)

    def every(self, stride: int) -> Rollout:
        """The shorter walk of every `stride`-th step, the first one included."""
        return self.over(self.steps[::stride])

    def over(self, steps: Sequence[Step]) -> Rollout:
        """The same walk over other steps."""
        return Rollout(steps, self.step, self.two_times, len(steps) if self.count else None, self.tells)

    def told(self, net: Backbone, cond: Condition, draw: Draw, purpose: str, noise: Tensor) -> Condition:
        """`cond` with what a step of this walk tells beside the time; noise (B, *S) gives the shape."""
        cond = net.randomness(cond, draw, purpose, noise.shape[1:])
        dials = {name: torch.full((len(noise),), value, device=noise.device) for name, value in self.tells.items()}
        cond = Condition(cond.inputs, {**cond.dials, **dials})
        return cond if self.count is None else counted(cond, self.count, noise)

    def passes(self, net: Backbone) -> float:
        """Network passes from noise to a sample."""
        return len(self) * passes(net)

    def level_after(self, index: int) -> float:
        """The level a step hands its state on at: the next step's, or 0 after the last."""
        return self.steps[index + 1].level if index + 1 < len(self.steps) else 0.0

    def __call__(
        self,
        net: Backbone,
        noise: Tensor,
        cond: Condition,
        draw: Draw,
        *,
        exit: int | None = None,
        stop: float = 0.0,
        grad: int = 0,
        purpose: str = "rollout",
    ) -> Sample:
        """Rolls out through step `exit` (default: the last) and returns its Sample; see `walk`."""
        *_, sample = self.walk(net, noise, cond, draw, exit=exit, stop=stop, grad=grad, purpose=purpose)
        return sample

    def walk(
        self,
        net: Backbone,
        noise: Tensor,
        cond: Condition,
        draw: Draw,
        *,
        exit: int | None = None,
        stop: float = 0.0,
        grad: int = 0,
        purpose: str = "rollout",
    ) -> Iterator[Sample]:
        """Every step's Sample through step `exit` (default: the last).

        `noise` (B, *S) is unit normal. `stop` is the level the last step hands its state on at; 0 hands on x0.
        `grad`: how many of the last steps carry a gradient; the others run without. Fresh noise comes from `draw`.
        """
        last = len(self.steps) - 1 if exit is None else exit
        rows = noise.new_ones(len(noise), dtype=torch.float32)
        x = noise * net.schedule.prior_std
        for i in range(last + 1):
            here, after = self.steps[i], self.level_after(i) if i < last else stop
            with nullcontext() if last - i < grad else torch.no_grad():
                to = landing(self.step, after) * rows if self.two_times else None
                told = self.told(net, cond, draw, f"{purpose}.{i}", noise)
                prediction = net(x, here.told * rows, told, to=to).at(here.level * rows)
                x0, x_t, s = prediction.x0, x, after * rows
                x = x0
                if after > 0:
                    x, std = self.step(prediction, s)
                    if std is not None:
                        x = x + std * (noise if self.step is reuse else draw.normal(f"{purpose}.{i}", noise.shape[1:]))
            yield Sample(x, s, x0, x_t, here.level * rows, i)

    def alone(
        self, net: Backbone, x0: Tensor, noise: Tensor, cond: Condition, draw: Draw, index: int, grad: bool
    ) -> Sample:
        """Step `index` to level 0, from x0 (B, *S) noised to where it begins."""
        here, rows = self.steps[index], noise.new_ones(len(noise), dtype=torch.float32)
        # The first step begins at pure noise, also where the process leaves some of the image at its last level.
        noised = add_noise(net.schedule, x0, noise, here.level * rows)
        x_t = noised if index else noise * net.schedule.prior_std
        with nullcontext() if grad else torch.no_grad():
            to, told = 0 * rows if self.two_times else None, self.told(net, cond, draw, "alone", noise)
            clean = net(x_t, here.told * rows, told, to=to).at(here.level * rows).x0
        return Sample(clean, 0 * rows, clean, x_t, here.level * rows, index)

    def log_prob(self, net: Backbone, taken: Sample, cond: Condition) -> Tensor:
        """log p(x | x_t) (B,) under `net` of a step that was taken, for policy gradients.

        Raises ValueError for a step without fresh noise: a deterministic transition, or the last one.
        """
        rows = taken.t.new_ones(len(taken.t))
        prediction = net(taken.x_t, self.steps[taken.index].told * rows, cond).at(taken.t)
        mean, std = self.step(prediction, taken.s)
        if std is None or not bool((taken.s > 0).all()):
            raise ValueError(
                "a step without fresh noise has no density: use renoise, cps or gamma, but not the last step"
            )
        density = torch.distributions.Normal(mean, std.expand_as(mean))
        return density.log_prob(taken.x).flatten(1).sum(1)

"""The one face of every network, and the composites that wear it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import NoiseSchedule, expand, remap


class Backbone(nn.Module):
    """`backbone(x_t, t, cond)` -> Prediction, for x_t (B, *S) and t (B,) in [0, 1].

    `to` (B,) is the second time of a flow map. `taps` names blocks whose outputs come back as features;
    `stop` ends the forward after the last tapped block, and `value` is then empty.
    """

    schedule: NoiseSchedule
    kind: Kind

    @abstractmethod
    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        *,
        to: Tensor | None = None,
        taps: Sequence[str] = (),
        stop: bool = False,
    ) -> Prediction: ...

    @property
    def cost(self) -> float:
        """Of one prediction, in passes of the network."""
        return 1.0

    def randomness(self, cond: Condition, draw: Draw, purpose: str, shape: tuple[int, ...]) -> Condition:
        """`cond` with the noise (B, *shape) that a network needs for one step, if it has a use for any."""
        return cond

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
        """The outputs (B, *S) without and with the condition, put together: u + w (c - u)."""
        return unconditional + scale * (conditional - unconditional)

    def null(self, cond: Condition) -> Condition:
        """The unconditional counterpart of `cond`. Raises ValueError when the model has none."""
        raise ValueError(f"{type(self).__name__} has no null condition: set guidance to 1")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Forwards inside are differentiable in their input but leave no gradient on `module`'s parameters."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


class Composite(Backbone):
    """A backbone over another one, which lends it the process, the kind, the null condition and its guidance."""

    def __init__(self, inner: Backbone):
        super().__init__()
        self.inner = inner
        self.schedule, self.kind = inner.schedule, inner.kind

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
        return self.inner.guide(unconditional, conditional, scale)

    def null(self, cond: Condition) -> Condition:
        return self.inner.null(cond)


class Guided(Composite):
    """Classifier-free guidance u + w (c - u) in one batched pass; w is alike for all rows, or (B,).

    Where the pipeline of a family guides otherwise, so does this: see `Backbone.guide`.

    w = 1 for all costs a plain pass.
    """

    def __init__(self, inner: Backbone, scale: float | Tensor = 1.0):
        super().__init__(inner)
        self.scale = scale

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        scale = self.scale
        if isinstance(scale, Tensor):
            scale = expand(scale, x_t).float()
        elif scale == 1.0:
            return self.inner(x_t, t, cond, to=to, taps=taps, stop=stop)
        if taps or stop:
            raise ValueError("a guided backbone has no features of its own: tap its inner backbone")
        both = Condition.cat(self.null(cond), cond)
        twice = None if to is None else torch.cat([to, to])
        prediction = self.inner(torch.cat([x_t, x_t]), torch.cat([t, t]), both, to=twice)
        unconditional, conditional = prediction.value.float().chunk(2)
        value = self.inner.guide(unconditional, conditional, scale)
        return replace(prediction, value=value, x_t=x_t, t=t)


def unguided(net: Backbone) -> Backbone:
    """The bare network inside a guided one: its answers and features are those of the conditional pass."""
    return net.inner if isinstance(net, Guided) else net


def _plain(scale: float | Tensor) -> bool:
    return not isinstance(scale, Tensor) and scale == 1


def passes(net: Backbone) -> float:
    """What one prediction costs: guidance asks twice."""
    return 2 * net.inner.cost if isinstance(net, Guided) and not _plain(net.scale) else net.cost


class Blend(Backbone):
    """The weighted mean of backbones on one process, sum_i w_i x0_i / sum_i w_i, read as the first one's kind."""

    def __init__(self, parts: Sequence[Backbone], weights: Sequence[float]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.weights = tuple(weights)
        self.schedule, self.kind = parts[0].schedule, parts[0].kind

    def null(self, cond: Condition) -> Condition:
        return self.parts[0].null(cond)  # type: ignore[operator]

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        if taps or stop:
            raise ValueError("a blend has no features of its own: tap one of its parts")
        predictions = [part(x_t, t, cond, to=to) for part in self.parts]
        first, total = predictions[0], sum(self.weights)
        x0 = sum(w * p.x0 for w, p in zip(self.weights, predictions, strict=True)) / total
        eps = sum(w * p.eps for w, p in zip(self.weights, predictions, strict=True)) / total
        return replace(first, value=first.target(x0, eps))


class Experts(Backbone):
    """Several backbones on one process, each in charge of some rows; whoever inherits says of which."""

    def __init__(self, experts: Sequence[Backbone]):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.schedule, self.kind = experts[0].schedule, experts[0].kind

    @abstractmethod
    def choose(self, t: Tensor, cond: Condition) -> Tensor:
        """(B,) index of the expert in charge of each row."""

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
        return self.experts[0].guide(unconditional, conditional, scale)  # type: ignore[operator]

    def null(self, cond: Condition) -> Condition:
        return self.experts[0].null(cond)  # type: ignore[operator]

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        route = self.choose(t, cond)
        if (route == route[0]).all():
            return self.experts[int(route[0])](x_t, t, cond, to=to, taps=taps, stop=stop)
        if taps or stop:
            raise ValueError("features are read from one expert at a time: give all rows to one expert")
        value = torch.zeros_like(x_t)
        for index in route.unique().tolist():
            rows = (route == index).nonzero().squeeze(1)
            part = self.experts[index](x_t[rows], t[rows], cond[rows], to=None if to is None else to[rows])
            value = value.index_put((rows,), part.value.to(value.dtype))
        return Prediction(value, self.kind, x_t, t, self.schedule)


class Routed(Experts):
    """One expert for each stretch of time: expert i serves t in (bounds[i], bounds[i - 1]], noisiest first."""

    def __init__(self, experts: Sequence[Backbone], bounds: Sequence[float]):
        super().__init__(experts)
        if len(bounds) != len(experts) - 1 or list(bounds) != sorted(bounds, reverse=True):
            raise ValueError(f"{len(experts)} experts need {len(experts) - 1} descending bounds, got {list(bounds)}")
        self.bounds = tuple(bounds)

    def route(self, t: Tensor) -> Tensor:
        """(B,) index of the expert in charge."""
        return sum((t <= bound).long() for bound in self.bounds) if self.bounds else torch.zeros_like(t).long()

    def choose(self, t: Tensor, cond: Condition) -> Tensor:
        return self.route(t)


class Remapped(Composite):
    """A backbone on another process: match sigma / alpha, rescale x, and read the answer as a velocity or v.

    A VP epsilon teacher becomes a flow teacher this way. Where the outer process has more noise than the inner
    one's last level, the inner network is asked at its last level.
    """

    def __init__(self, inner: Backbone, schedule: NoiseSchedule, kind: Kind):
        super().__init__(inner)
        self.schedule, self.kind = schedule, kind

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        there, scale = remap(self.schedule, self.inner.schedule, t, x_t)
        second = None if to is None else remap(self.schedule, self.inner.schedule, to, x_t)[0]
        inner = self.inner(scale * x_t, there, cond, to=second, taps=taps, stop=stop)
        outer = Prediction(inner.value, self.kind, x_t, t, self.schedule, inner.features)
        if stop:
            return outer
        return replace(outer, value=outer.target(inner.x0, inner.eps))

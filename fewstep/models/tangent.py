"""How fast a network's output changes along a direction in (x_t, t, to): what flow maps and continuous time learn from.

exact       one forward-mode pass. Of attention, plain matrix products alone have such a derivative, so that is what
            computes it meanwhile, whatever the network uses otherwise; memory is quadratic in the tokens.
semi        forward mode in x_t alone, and a difference quotient in the times.
difference  a central difference in everything, for networks that forward mode cannot enter: sharded, offloaded or
            compiled ones.

All are taken without a graph: whoever trains makes another, ordinary pass for the gradient. A difference is for
float32: the sinusoids of 1000 t turn so fast that in half precision no step is right (relative error above .9).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import expand
from fewstep.models import attention
from fewstep.models.backbone import Backbone

Way = Literal["auto", "exact", "semi", "difference"]


@dataclass
class Tangent:
    """How the derivative of the network is taken."""

    way: Way = "auto"
    """exact, where the network allows it | semi | difference; auto tries exact and falls back to difference"""
    step: float = 1e-4
    """of a difference, in units of the direction"""

    def __post_init__(self) -> None:
        if not 0 < self.step <= 0.1:
            raise UserError(f"tangent.step is a time above 0 and at most 0.1, but {self.step} was given")


@dataclass(frozen=True)
class Direction:
    """Where a derivative looks: dx (B, *S), dt (B,) and, for a network told where it jumps, dto (B,)."""

    dx: Tensor
    dt: Tensor
    dto: Tensor | None = None


def along(
    net: Backbone, x_t: Tensor, t: Tensor, cond: Condition, toward: Direction, way: Way, step: float, to: Tensor | None
) -> Tensor:
    """d value / d tau (B, *S) float32 of `net` at (x_t + tau dx, t + tau dt, to + tau dto), without a graph."""
    told = () if to is None else (to,)
    turned = () if to is None else (torch.zeros_like(to) if toward.dto is None else toward.dto,)

    def value(x: Tensor, *times: Tensor) -> Tensor:
        return net(x, times[0], cond, to=times[1] if len(times) > 1 else None).value.float()

    at, slope = (x_t, t, *told), (toward.dx, toward.dt, *turned)
    with torch.no_grad():
        if way == "difference":
            return _quotient(value, at, slope, step)
        if way == "exact":
            return _forward(net, value, at, slope)
        still = tuple(torch.zeros_like(part) for part in slope[1:])
        in_x = _forward(net, value, at, (slope[0], *still))
        return in_x + _quotient(value, at, (torch.zeros_like(slope[0]), *slope[1:]), step)


def _forward(net: Backbone, value: Callable[..., Tensor], at: tuple, slope: tuple) -> Tensor:
    torch.clear_autocast_cache()  # weights cast without a tangent would be taken for these
    with attention.exact(net):
        return torch.func.jvp(value, at, slope)[1]


def _quotient(value: Callable[..., Tensor], at: tuple, slope: tuple, step: float) -> Tensor:
    """Central; one-sided in rows where a time would leave [0, 1]."""
    ahead, behind = _room(at[1:], slope[1:], step)
    upper = value(*(_moved(a, d, ahead) for a, d in zip(at, slope, strict=True)))
    lower = value(*(_moved(a, d, -behind) for a, d in zip(at, slope, strict=True)))
    return (upper - lower) / expand(ahead + behind, upper)


def _room(times: tuple, slopes: tuple, step: float) -> tuple[Tensor, Tensor]:
    """(B,) how far to go ahead, and how far back: `step`, or 0 in rows that may not."""

    def fits(sign: int) -> Tensor:
        reached = torch.stack([time + sign * step * slope for time, slope in zip(times, slopes, strict=True)])
        return step * ((reached >= 0) & (reached <= 1)).all(0).to(reached.dtype)

    return fits(1), fits(-1)


def _moved(a: Tensor, d: Tensor, far: Tensor) -> Tensor:
    return a + (far if a.ndim == 1 else expand(far, a)) * d


def choose(net: Backbone, x_t: Tensor, cond: Condition, wanted: Tangent, to: bool = False) -> tuple[Way, str]:
    """The way to take for this network, and the reason in words; x_t (B, *S) are inputs such as it will see.

    Raises UserError for a way that was asked for and does not pass through the network.
    """
    asked: Way = "exact" if wanted.way == "auto" else wanted.way
    if x_t.is_meta or asked == "difference":
        return asked, "as asked for"
    x, told = x_t[:1], cond[torch.zeros(1, dtype=torch.long, device=x_t.device)]
    t = x.new_full((1,), 0.5, dtype=torch.float32)
    try:
        along(net, x, t, told, Direction(x, torch.ones_like(t)), "exact", wanted.step, t if to else None)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        why = f"forward mode does not pass through this network ({reason})"
        if wanted.way == "auto":
            return "difference", why
        raise UserError(f"tangent.way={wanted.way} was asked for, but {why}: set it to auto or difference") from None
    return asked, "forward mode passes through this network" if wanted.way == "auto" else "as asked for"

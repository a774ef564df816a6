"""Several diffusers networks of one class as one network: each is in charge of a stretch of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.core.prediction import Prediction
from fewstep.models.shaped import is_unknown

Speak = Callable[[Tensor], Prediction]
"""What the expert that speaks says of the rows (N,) of a batch."""


class TimeExperts(nn.Module):
    """Expert i serves the t in [bounds[i], bounds[i - 1]), noisiest first; what they are called is what one is called.

    As in Wan 2.2, whose pipeline has two transformers and a boundary. A forward is that of the expert that speaks.
    """

    def __init__(self, experts: Sequence[nn.Module], bounds: Sequence[float]):
        super().__init__()
        if len(bounds) != len(experts) - 1 or list(bounds) != sorted(bounds, reverse=True):
            raise ValueError(f"{len(experts)} experts need {len(experts) - 1} descending bounds, got {list(bounds)}")
        self.experts = nn.ModuleList(experts)
        self.bounds = tuple(bounds)
        self.speaking = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.experts[self.speaking](*args, **kwargs)

    @contextmanager
    def by(self, expert: int) -> Iterator[None]:
        """Inside, this expert speaks."""
        before, self.speaking = self.speaking, expert
        try:
            yield
        finally:
            self.speaking = before

    def route(self, t: Tensor) -> Tensor:
        """(B,) index of the expert in charge."""
        return sum((t < bound).long() for bound in self.bounds) + torch.zeros_like(t).long()

    def shared_out(self, t: Tensor, speak: Speak) -> Prediction:
        """What all rows are told, each by its expert; `stop` leaves the values empty here too."""
        parts, order = [], []
        route = torch.zeros_like(t).long() if is_unknown(t) else self.route(t)
        for expert in self._asked(route):
            rows = _rows(route, expert)
            with self.by(expert):
                parts.append(speak(rows) if len(rows) else _silenced(speak(torch.zeros_like(route[:1]))))
            order.append(rows)
        return parts[0] if len(parts) == 1 else _joined(parts, torch.cat(order).argsort())

    def _asked(self, route: Tensor) -> list[int]:
        """The experts that some process needs: sharded networks are asked by all of them together."""
        if is_unknown(route):
            return [0]
        needed = torch.stack([(route == i).any() for i in range(len(self.experts))]).int()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(needed, dist.ReduceOp.MAX)
        return needed.nonzero().flatten().tolist()

    @property
    def config(self) -> Any:
        return self.experts[0].config

    @property
    def dtype(self) -> torch.dtype:
        return self.experts[0].dtype  # type: ignore[return-value]

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(expert.is_gradient_checkpointing for expert in self.experts)

    def enable_gradient_checkpointing(self, *args: Any) -> None:
        for expert in self.experts:
            expert.enable_gradient_checkpointing(*args)  # type: ignore[operator]

    def disable_gradient_checkpointing(self) -> None:
        for expert in self.experts:
            expert.disable_gradient_checkpointing()  # type: ignore[operator]

    @property
    def _no_split_modules(self) -> Any:
        return self.experts[0]._no_split_modules

    @property
    def _keep_in_fp32_modules(self) -> Any:
        return self.experts[0]._keep_in_fp32_modules


def models_of(net: nn.Module) -> list[nn.Module]:
    """The diffusers networks in `net`: itself, or its experts."""
    return list(net.experts) if isinstance(net, TimeExperts) else [net]


def model_of(net: nn.Module) -> nn.Module:
    """The diffusers network itself, or the first of several experts: they are of one class and shape."""
    return models_of(net)[0]


def _rows(route: Tensor, expert: int) -> Tensor:
    """Where networks are only shaped, any expert stands for all."""
    return (
        torch.arange(len(route), device=route.device) if is_unknown(route) else (route == expert).nonzero().squeeze(1)
    )


def _silenced(prediction: Prediction) -> Prediction:
    """No rows, but with a graph behind them: what the other processes reduce this one reduces too."""
    none = {name: feature[:0] for name, feature in prediction.features.items()}
    return replace(prediction, value=prediction.value[:0], x_t=prediction.x_t[:0], t=prediction.t[:0], features=none)


def _joined(parts: Sequence[Prediction], back: Tensor) -> Prediction:
    def together(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values))[back] if sum(map(len, values)) == len(back) else values[0]

    return replace(
        parts[0],
        value=together([part.value for part in parts]),
        x_t=together([part.x_t for part in parts]),
        t=together([part.t for part in parts]),
        features={name: together([part.features[name] for part in parts]) for name in parts[0].features},
    )

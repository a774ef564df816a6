"""A teacher's deterministic pairs (noise, sample, condition): made once, stored, and read by paired objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.batch import Condition, Pair
from fewstep.core.draw import Draw
from fewstep.models.backbone import Backbone
from fewstep.rollout import Rollout

BATCH = 128
SHARD = 2 * BATCH


@dataclass(frozen=True)
class Pairs:
    """`x0` (N, *S) is what the teacher made of the unit noise of `Draw(seed, 0, row)` under `cond` (N rows).

    The noise is the tensor before any scaling by the schedule; it is drawn again instead of stored.
    """

    x0: Tensor
    cond: Condition
    seed: int

    def __len__(self) -> int:
        return len(self.x0)

    def of(self, draw: Draw) -> Pair:
        """A random pair for each sample of `draw`."""
        rows = draw.integers("pairs.row", len(self)).to(self.x0.device)
        return Pair(noise_of(self.seed, rows, self.x0.shape[1:]), self.x0[rows], self.cond[rows])


def noise_of(seed: int, rows: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The unit noise (N, *S) of the pairs `rows` (N,)."""
    return Draw(seed, 0, rows).normal("pairs.noise", tuple(shape))


@torch.no_grad()
def make_pairs(
    teacher: Backbone,
    rollout: Rollout,
    condition: Callable[[Tensor], Condition],
    shape: tuple[int, ...],
    count: int,
    seed: int,
    batch: int = BATCH,
    progress: Callable[[int], object] = lambda done: None,
    device: torch.device | None = None,
    first: int = 0,
) -> Pairs:
    """Runs the (guided) teacher by a deterministic `rollout` from the `count` noises of the rows from `first` on.

    `condition(rows)` labels them. They are made on `device`, by default where the weights of the teacher lie.
    """
    device = device or next(teacher.parameters()).device
    parts, conditions = [], []
    for rows in torch.arange(first, first + count, device=device).split(batch):
        cond = condition(rows)
        draw = Draw(seed, 0, rows)
        parts.append(rollout(teacher, noise_of(seed, rows, shape), cond, draw).x0.cpu())
        conditions.append(cond.to("cpu"))
        progress(len(rows))
    cond = conditions[0]
    for more in conditions[1:]:
        cond = Condition.cat(cond, more)
    return Pairs(torch.cat(parts), cond, seed)


def tensors_of(pairs: Pairs) -> dict[str, Tensor]:
    """x0 and the condition by the names they are stored under; the noise is a function of the seed."""
    return {"x0": pairs.x0, **{f"cond/{name}": value for name, value in pairs.cond.inputs.items()}}


def stored(tensors: Mapping[str, Tensor], seed: int) -> Pairs:
    """The pairs that `tensors_of` were made from."""
    inputs = {name.removeprefix("cond/"): value for name, value in tensors.items() if name.startswith("cond/")}
    return Pairs(tensors["x0"], Condition(inputs), seed)

"""A teacher's deterministic pairs (noise, sample, condition) and the states between: made once, stored, read by
paired objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.batch import Condition, Pair
from fewstep.core.draw import Draw
from fewstep.core.times import Step
from fewstep.models.backbone import Backbone
from fewstep.rollout import Rollout

BATCH = 128
SHARD = 2 * BATCH


@dataclass(frozen=True)
class Pairs:
    """`x0` (N, *S) is what the teacher made of the unit noise of `Draw(seed, 0, row)` under `cond` (N rows).

    The noise is the tensor before any scaling by the schedule; it is drawn again instead of stored. `path`
    (N, K, *S) are states that the teacher passed on its way.
    """

    x0: Tensor
    cond: Condition
    seed: int
    path: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x0)

    def of(self, draw: Draw) -> Pair:
        """A random pair for each sample of `draw`."""
        rows = draw.integers("pairs.row", len(self)).to(self.x0.device)
        path = None if self.path is None else self.path[rows]
        return Pair(noise_of(self.seed, rows, self.x0.shape[1:]), self.x0[rows], self.cond[rows], path)


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
    kept: Sequence[float] = (),
) -> Pairs:
    """Runs the (guided) teacher by a deterministic `rollout` from the `count` noises of the rows from `first` on.

    `condition(rows)` labels them. They are made on `device`, by default where the weights of the teacher lie. The
    states at the levels `kept` are their path; each is the level of a step of the rollout.
    """
    device = device or next(teacher.parameters()).device
    parts, paths, conditions = [], [], []
    for rows in torch.arange(first, first + count, device=device).split(batch):
        cond = condition(rows)
        draw = Draw(seed, 0, rows)
        states = []
        for sample in rollout.walk(teacher, noise_of(seed, rows, shape), cond, draw):
            if rollout.steps[sample.index].level in kept:
                states.append(sample.x_t.cpu())
        parts.append(sample.x0.cpu())
        paths.append(torch.stack(states, 1) if kept else None)
        conditions.append(cond.to("cpu"))
        progress(len(rows))
    cond = conditions[0]
    for more in conditions[1:]:
        cond = Condition.cat(cond, more)
    return Pairs(torch.cat(parts), cond, seed, torch.cat(paths) if kept else None)  # type: ignore[arg-type]


def through(rollout: Rollout, levels: Sequence[Step]) -> Rollout:
    """The walk of `rollout` with steps at `levels` among its own, so that it passes them."""
    known = {step.level: step for step in (*rollout.steps, *levels)}
    return Rollout([known[level] for level in sorted(known, reverse=True)], rollout.step)


def tensors_of(pairs: Pairs) -> dict[str, Tensor]:
    """x0, the condition and the path by the names they are stored under; the noise is a function of the seed."""
    path = {} if pairs.path is None else {"path": pairs.path}
    return {"x0": pairs.x0, **path, **{f"cond/{name}": value for name, value in pairs.cond.inputs.items()}}


def stored(tensors: Mapping[str, Tensor], seed: int) -> Pairs:
    """The pairs that `tensors_of` were made from."""
    inputs = {name.removeprefix("cond/"): value for name, value in tensors.items() if name.startswith("cond/")}
    return Pairs(tensors["x0"], Condition(inputs), seed, tensors.get("path"))

"""A teacher's deterministic pairs (noise, sample, condition): made once, stored, and read by paired objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core.batch import Condition, Pair
from fewstep.core.draw import Draw
from fewstep.models.backbone import Backbone
from fewstep.rollout import Rollout


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
    batch: int = 128,
    progress: Callable[[int], None] = lambda done: None,
    device: torch.device | None = None,
) -> Pairs:
    """Runs the (guided) teacher by a deterministic `rollout` from `count` noises; `condition(rows)` labels them.

    They are made on `device`, by default where the weights of the teacher lie.
    """
    device = device or next(teacher.parameters()).device
    parts, conditions = [], []
    for rows in torch.arange(count, device=device).split(batch):
        cond = condition(rows)
        draw = Draw(seed, 0, rows)
        parts.append(rollout(teacher, noise_of(seed, rows, shape), cond, draw).x0.cpu())
        conditions.append(cond.to("cpu"))
        progress(len(rows))
    cond = conditions[0]
    for more in conditions[1:]:
        cond = Condition.cat(cond, more)
    return Pairs(torch.cat(parts), cond, seed)


def save(file: Path, pairs: Pairs, recipe: str = "") -> None:
    """Writes x0, the condition and the `recipe` they were made by; the noise is a function of the seed."""
    aside = file.with_suffix(".partial")
    tensors = {"x0": pairs.x0, **{f"cond/{k}": v for k, v in pairs.cond.inputs.items()}}
    save_file(tensors, aside, {"recipe": recipe})
    aside.rename(file)


def recipe_of(file: Path) -> str | None:
    """What the pairs in `file` were made by; None for no file, or one that cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("recipe")
    except (OSError, SafetensorError):
        return None


def load(file: Path, seed: int) -> Pairs:
    state = load_file(file)
    inputs = {k.removeprefix("cond/"): v for k, v in state.items() if k.startswith("cond/")}
    return Pairs(state["x0"], Condition(inputs), seed)

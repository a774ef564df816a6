"""Tensors under names, each of them read when it is asked for: from safetensors files, or from the leader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep import reading
from fewstep.train import processes


class Stored(Mapping[str, Tensor]):
    """`read(names[name])` under `name`, anew whenever it is asked for; nothing is kept."""

    def __init__(self, read: Callable[[str], Tensor], names: Mapping[str, str]):
        self.read, self.names = read, dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(self.names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def under(self, prefix: str) -> Stored:
        """Those whose names begin with `prefix`, without it."""
        return Stored(self.read, {k.removeprefix(prefix): v for k, v in self.names.items() if k.startswith(prefix)})

    def within(self, prefix: str) -> Stored:
        """The same with `prefix` before their names."""
        return Stored(self.read, {prefix + k: v for k, v in self.names.items()})


def held(state: Mapping[str, Tensor]) -> Stored:
    """Tensors that are in memory, or in another Stored."""
    return Stored(state.__getitem__, {name: name for name in state})


def joined(parts: Iterable[Stored]) -> Stored:
    """All of several, which have no name in common."""
    owner = {name: part for part in parts for name in part}
    return Stored(lambda name: owner[name][name], {name: name for name in owner})


def files(paths: Iterable[Path]) -> Stored:
    """The tensors of safetensors files, on the CPU. Raises UserError for a file that is none, or is not there."""
    opened: dict[str, Any] = {}
    for path in paths:
        file = reading.safetensors(path)
        opened |= dict.fromkeys(file.keys(), file)
    return Stored(lambda name: opened[name].get_tensor(name), {name: name for name in opened})


def from_leader(state: Mapping[str, Tensor] | None) -> Stored:
    """The leader's `state`, on the CPU; a tensor is sent when all processes ask for it, in the same order."""
    shapes = processes.from_leader(lambda: {k: (tuple(v.shape), v.dtype) for k, v in (state or {}).items()})

    def read(name: str) -> Tensor:
        shape, dtype = shapes[name]
        tensor = state[name].detach().cpu().contiguous() if state is not None else torch.empty(shape, dtype=dtype)
        if processes.size() > 1:
            dist.broadcast(tensor, 0)
        return tensor

    return Stored(read, {name: name for name in shapes})

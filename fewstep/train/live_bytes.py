"""Counts the bytes of tensors that are alive and what they were at the peak; of real tensors and of fake ones alike.

The numbers are those of every machine: no allocator and its cache, no workspace of a kernel, nothing of Python.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.train.parallel import local

REST = "activations"
"""the usual name of what has no other: activations, and whatever else comes and goes"""


class LiveBytes(TorchDispatchMode):
    """While entered, every storage that an operator makes is counted once, as `rest`, until it is freed.

    `name` says what tensors are, those made before among them. `now` and `peak` are bytes by name. Of a tensor that is
    sharded its part in this process counts, and one on the meta device does not.
    """

    def __init__(self, rest: Hashable = REST) -> None:
        super().__init__()
        self.rest = rest
        self.now: Counter[Any] = Counter()
        self.peak: Counter[Any] = Counter()
        self._kept: dict[int, tuple[Hashable, int]] = {}

    def name(self, name: Hashable, tensor: Tensor) -> None:
        """Counts `tensor` as `name` from now on."""
        storage = local(tensor).untyped_storage()
        before = self._kept.pop(id(storage), None)
        if before is not None:
            self.now[before[0]] -= before[1]
        else:
            weakref.finalize(storage, self._forget, id(storage)).atexit = False
        self._kept[id(storage)] = (name, storage.nbytes())
        self.now[name] += storage.nbytes()
        if before is None:
            self._look()

    def measure(self, storage: torch.UntypedStorage) -> None:
        """Looks at the size of a storage again: FSDP2 resizes those of the weights that it puts together."""
        if id(storage) in self._kept:
            name, size = self._kept[id(storage)]
            self._kept[id(storage)] = (name, storage.nbytes())
            self.now[name] += storage.nbytes() - size
            self._look()

    def _look(self) -> None:
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def name_gradient(self, name: Hashable, parameter: Tensor) -> None:
        """Counts the gradient of `parameter` as `name` as soon as a backward has left it there."""
        parameter.register_post_accumulate_grad_hook(lambda p: self.name(name, p.grad))  # type: ignore[arg-type]

    def mark(self) -> Counter[Any]:
        """The peak since the last mark; the next one starts from what is alive now."""
        peak, self.peak = self.peak, self.now.copy()
        return peak

    def _forget(self, key: int) -> None:
        name, size = self._kept.pop(key)
        self.now[name] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta and id(local(leaf).untyped_storage()) not in self._kept:
                self.name(self.rest, leaf)
        return result

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
GATHERED = "gathered"
"""the usual name of weights that FSDP2 puts together for a while"""


class LiveBytes(TorchDispatchMode):
    """While entered, every storage that an operator makes is counted once, as `rest`, until it is freed.

    `name` says what tensors are, those made before among them. `now` and `peak` are bytes by name. Of a tensor that is
    sharded its part in this process counts, and one on the meta device does not. Weights that FSDP2 puts together are
    `gathered`.
    """

    def __init__(self, rest: Hashable = REST, gathered: Hashable = GATHERED) -> None:
        super().__init__()
        self.rest, self.gathered = rest, gathered
        self.now: Counter[Any] = Counter()
        self.peak: Counter[Any] = Counter()
        self._kept: dict[int, tuple[Hashable, int]] = {}

    def name(self, name: Hashable, tensor: Tensor) -> None:
        """Counts `tensor` as `name` from now on."""
        self._name(name, local(tensor).untyped_storage())

    def _name(self, name: Hashable, storage: torch.UntypedStorage) -> None:
        before = self._kept.pop(id(storage), None)
        if before is not None:
            self.now[before[0]] -= before[1]
        else:
            weakref.finalize(storage, self._forget, id(storage)).atexit = False
        self._kept[id(storage)] = (name, storage.nbytes())
        self.now[name] += storage.nbytes()
        if before is None or storage.nbytes() > before[1]:
            self._look()

    def __enter__(self) -> LiveBytes:
        # No operator tells when FSDP2 takes and gives back the memory of weights.
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            done = resize(storage, size)
            self._name(self.gathered, storage)
            return done

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
        self._leave = lambda: setattr(torch.UntypedStorage, "resize_", resize)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._leave()
        super().__exit__(*error)

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

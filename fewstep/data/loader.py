"""Batches that are made in threads while the ones before are learned from."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Loader(Generic[T]):
    """`make(0)`, `make(1)`, .. below `count`, each a whole batch, in `workers` threads before they are asked for.

    What is made depends on its number alone, so any number of threads gives the same bytes in the same order. Threads
    are enough because decoders, file systems and torch let go of the interpreter while they work. 0 workers make each
    when it is asked for. An error comes out where its number is asked for.
    """

    def __init__(self, make: Callable[[int], T], workers: int, count: int):
        self.make, self.workers, self.count = make, workers, count
        self._pool = ThreadPoolExecutor(workers, "loader") if workers else None
        self._ahead: dict[int, Future[T]] = {}

    def __call__(self, number: int) -> T:
        if self._pool is None:
            return self.make(number)
        wanted = [number, *range(number + 1, min(number + 1 + self.workers, self.count))]
        self._ahead = {i: self._ahead.get(i) or self._pool.submit(self.make, i) for i in wanted}
        return self._ahead.pop(number).result()

"""The processes of one run, as torchrun or accelerate launch start them; alone, every function here does nothing.

All of them play the same steps, each on its share of every batch, and only the leader (rank 0) writes.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.core.errors import Lost, UserError
from fewstep.train.watch import Watch

T = TypeVar("T")

_patience = timedelta(minutes=10)


@contextmanager
def started(device: torch.device, timeout: float = 600.0) -> Iterator[None]:
    """Joins the processes that the environment tells of (WORLD_SIZE, RANK, ..), by nccl on CUDA and gloo on CPU.

    Raises Lost, which names the process and what has become of it, where one lets the others wait for `timeout` s.
    """
    global _patience
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        yield
        return
    cuda, rank = device.type == "cuda", int(os.environ["RANK"])
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The store of torchrun outlives an attempt that has failed, and what that has written there.
    lent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if lent else None
    watch = Watch(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank, count, timeout, attempt)
    _patience = timedelta(seconds=watch.patience)
    try:
        with watch:
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, timeout=_patience, store=watch.place, rank=rank, world_size=count)
            yield
    finally:
        if dist.is_initialized() and not isinstance(sys.exception(), Lost):
            dist.destroy_process_group()


def hold_to_time(group: Any) -> None:
    """Gives a group of processes the patience of the run: torch gives those of a mesh one of its own."""
    # The public name is newer than the oldest torch that is allowed.
    (getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout)(_patience, group)


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def leads() -> bool:
    """Whether this process is the one that writes and shows."""
    return not dist.is_initialized() or dist.get_rank() == 0


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def together(value: Tensor) -> Tensor:
    """The tensors (N, ...) of all processes, of one shape, one after the other, on each of them."""
    if size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def share(ids: Tensor, unit: int) -> Tensor:
    """This process's part of the samples `ids` (N,), in whole units of so many samples. Raises UserError."""
    count = size()
    if count == 1:
        return ids
    if len(ids) % (count * unit):
        raise UserError(
            f"a batch of {len(ids)} cannot be shared out to {count} processes in units of {unit} "
            f"(micro_batches x the samples of a group): make batch a multiple of {count * unit}"
        )
    return ids.chunk(count)[dist.get_rank()]


def mean(value: Tensor) -> Tensor:
    """The mean of a detached `value` (*S) over all processes, equal to the bit on each of them."""
    if size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / size()


def either(flag: bool) -> bool:
    """Whether `flag` holds in any process."""
    return mean(torch.tensor(float(flag))).item() > 0


def first(found: T | None) -> T | None:
    """What the first process that has found something has found, in all of them."""
    everyone: list[T | None] = [found] * size()
    if size() > 1:
        dist.all_gather_object(everyone, found)
    return next((one for one in everyone if one is not None), None)


def from_leader(decide: Callable[[], T]) -> T:
    """What `decide()` says in the leader; the others do not call it."""
    answer: list[Any] = [decide() if leads() else None]
    if size() > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def wait() -> None:
    """Until all processes are here."""
    either(False)


@contextmanager
def leader_first() -> Iterator[None]:
    """The others enter when the leader has left, and find what it has made."""
    if not leads():
        wait()
    yield
    if leads():
        wait()


def refuse_differences(config: str) -> None:
    """Raises UserError, in all processes alike, where `config` or the source of the package is not the leader's."""
    mine = {"config": _digest(config.encode()), "package source": _source()}
    everyone: list[Mapping[str, str]] = [mine] * size()
    if size() > 1:
        dist.all_gather_object(everyone, mine)
    for what, leaders in everyone[0].items():
        others = [str(rank) for rank, theirs in enumerate(everyone) if theirs[what] != leaders]
        if others:
            raise UserError(
                f"the processes of this run differ in their {what}: {', '.join(others)} from 0; start all of them "
                "with the same config, overrides and version of fewstep"
            )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _source() -> str:
    """The SHA-256 of the package's Python files."""
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    return _digest(b"".join(f"{file.relative_to(package)}\n".encode() + file.read_bytes() for file in files))

"""The faults of storage and of time: what is done to a process before its command begins.

A moment is a phase and a number: the nth call of a Python function, or of a C function from Python, while the phase
lasts. A write site is a call that opens a file for writing, makes, renames or removes something below a folder.
"""

from __future__ import annotations

import atexit
import errno
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PHASES = ("pairs", "step", "evaluation", "checkpoint", "export")


def install(fault: dict[str, Any], counted: Path) -> None:
    """Nothing, {"phase": .., "call": .., "signal": ..}, {"site": .., "root": .., ..} or {"place": .., "value": ..,
    "step": ..}; see below.

    {"source": folder}: the source of the package is taken to lie there.
    """
    if "source" in fault:
        from fewstep.train import processes

        processes.__file__ = str(Path(fault["source"]) / "train" / "processes.py")
    elif "site" in fault:
        Sites(counted, **fault)
    elif "place" in fault:
        spoil(**fault)
    elif fault:
        Calls(counted, **fault)


class Calls:
    """Counts calls phase by phase into the file `counted`; at the call asked for it sends the process a signal.

    `hang`: there it sleeps for so many seconds, and gets no signal.
    """

    def __init__(
        self,
        counted: Path,
        signal: int = 0,
        phase: str = "",
        call: int = -1,
        twice: float | None = None,
        hang: float = 0.0,
    ):
        self.file, self.number, self.wanted, self.call, self.twice = counted, signal, phase, call, twice
        self.hang = hang
        self.phases, self.calls = list[str](), Counter[str]()
        self.place()

    def place(self) -> None:
        """Wraps what a run consists of."""
        from fewstep import finish, made, runner
        from fewstep.train import checkpoint, loop

        for owner, name, phase in (
            (made.Made, "fill", "pairs"),
            (loop, "train_step", "step"),
            (runner.Training, "evaluate", "evaluation"),
            (checkpoint, "save", "checkpoint"),
            (checkpoint, "prune", "checkpoint"),
            (finish, "export", "export"),
        ):
            setattr(owner, name, self.within(phase, getattr(owner, name)))
        atexit.register(self.note)

    def within(self, phase: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*args: Any, **kwargs: Any) -> Any:
            self.phases.append(phase)
            sys.setprofile(self.heard)
            try:
                return inner(*args, **kwargs)
            finally:
                self.phases.pop()
                sys.setprofile(self.heard if self.phases else None)

        return outer

    def note(self, at: Sequence[str] = ()) -> None:
        self.file.write_text(json.dumps({**self.calls, "at": list(at)}))

    def heard(self, frame: Any, event: str, given: Any) -> None:
        if event not in ("call", "c_call") or not self.phases:
            return
        phase = self.phases[-1]
        self.calls[phase] += 1
        if phase == self.wanted and self.calls[phase] == self.call:
            sys.setprofile(None)
            self.note([frame.f_code.co_name, str(given)[:80]])
            if self.hang:
                time.sleep(self.hang)
                return
            os.kill(os.getpid(), self.number)
            if self.twice is not None:
                time.sleep(self.twice)
                os.kill(os.getpid(), self.number)


_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


class Sites:
    """Counts the writes below `root`; the one of number `site`, and all after it, fail with `error`.

    `half`: files open, but take only so many bytes before they fail. `pause`: seconds that every write takes.
    `remove`: at that site the folder is removed instead. -1 as the site only counts; a site may also be given as the
    end of its path, of which the first is meant.
    """

    def __init__(
        self,
        counted: Path,
        site: int | str,
        root: str,
        error: int = errno.ENOSPC,
        half: bool = False,
        pause: float = 0.0,
        remove: str | None = None,
    ):
        self.file, self.root, self.error = counted, root, error
        self.site, self.ending = (site, None) if isinstance(site, int) else (-1, site)
        self.half, self.pause, self.remove = half, pause, remove
        self.seen: list[str] = []
        self.quiet = False
        self.cut: set[str] = set()
        sys.addaudithook(self.heard)
        self.watch_safetensors()
        if half:
            self.watch_files()

    def heard(self, event: str, args: tuple[Any, ...]) -> None:
        if self.quiet:
            return
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, (str, bytes, os.PathLike)):
                self.met(os.fsdecode(path), "open")
        elif event in _WRITES:
            self.met(os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else "", event)

    def met(self, path: str, what: str) -> None:
        """A write of `path` that is about to happen. Room is made by removing, so that removing never fails."""
        if not os.path.abspath(path).startswith(self.root) or what in ("os.remove", "os.rmdir"):
            return
        self.quiet = True
        try:
            self.seen.append(f"{what} {os.path.relpath(path, self.root)}")
            if self.site < 0 and self.ending is not None and path.endswith(self.ending):
                self.site = len(self.seen) - 1
            time.sleep(self.pause)
            if len(self.seen) - 1 == self.site and self.remove:
                import shutil

                shutil.rmtree(self.remove)
            self.file.write_text(json.dumps({"sites": self.seen}))
        finally:
            self.quiet = False
        if 0 <= self.site < len(self.seen) and not self.remove:
            if self.half and what == "open":
                self.cut.add(os.path.abspath(path))
            else:
                raise OSError(self.error, os.strerror(self.error), path)

    def watch_safetensors(self) -> None:
        """Its files are written past Python."""
        import safetensors.torch as safe

        honest = safe.serialize_file

        def write(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
            self.met(os.fspath(filename), "safetensors")
            return honest(tensors, filename, *args, **kwargs)

        safe.serialize_file = write

    def watch_files(self) -> None:
        """Files that open and then take only the first bytes."""
        import builtins

        honest = io.open

        def opened(file: Any, *args: Any, **kwargs: Any) -> Any:
            handle = honest(file, *args, **kwargs)
            if isinstance(file, (str, os.PathLike)) and os.path.abspath(os.fspath(file)) in self.cut:
                return _Cut(handle, self.error)
            return handle

        builtins.open = opened
        io.open = opened


class _Cut:
    """A file that is full after one byte of each write."""

    def __init__(self, inner: Any, error: int):
        self.inner, self.error = inner, error

    def write(self, content: Any) -> int:
        self.inner.write(content[:1])
        self.inner.flush()
        raise OSError(self.error, os.strerror(self.error))

    def __enter__(self) -> _Cut:
        return self

    def __exit__(self, *exc: object) -> None:
        self.inner.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def spoil(place: str, value: str, step: int) -> None:
    """Puts one `value` ("nan", "inf") into a tensor at `place` just before `step` is played, or within it."""
    from fewstep.train import loop

    play, bad = loop.train_step, float(value)

    def spoiled(objective: Any, batches: Any, at: int, players: Any) -> Any:
        if at == step:
            PLACES[place](objective, batches, players, bad)
        return play(objective, batches, at, players)

    loop.train_step = spoiled


def _put(tensor: Any, bad: float) -> None:
    from fewstep.train import parallel

    parallel.local(tensor.detach()).view(-1)[1] = bad


def _first_weight(objective: Any, role: str) -> Any:
    return next(getattr(objective.triad, role).parameters())


def _spoil_data(objective: Any, batches: Any, players: Any, bad: float) -> None:
    _put(batches[0].x0, bad)


def _spoil_weight(role: str) -> Callable[..., None]:
    return lambda objective, batches, players, bad: _put(_first_weight(objective, role), bad)


def _spoil_output(role: str) -> Callable[..., None]:
    def place(objective: Any, batches: Any, players: Any, bad: float) -> None:
        block = next(m.mid_block for m in getattr(objective.triad, role).modules() if hasattr(m, "mid_block"))
        block.register_forward_hook(lambda module, given, output: output * bad)

    return place


def _spoil_gradient(objective: Any, batches: Any, players: Any, bad: float) -> None:
    player = players["fake_score"]
    move = player.move

    def spoiled(step: int) -> float:
        _put(player.parameters[0].grad, bad)
        return float(move(step))

    player.move = spoiled


def _spoil_moment(objective: Any, batches: Any, players: Any, bad: float) -> None:
    player = players["fake_score"]
    _put(player.optimizer.state[player.parameters[0]]["exp_avg"], bad)


def _spoil_follower(objective: Any, batches: Any, players: Any, bad: float) -> None:
    _put(next(players["generator"].followers["ema"].module.parameters()), bad)


PLACES: dict[str, Callable[..., None]] = {
    "data": _spoil_data,
    "teacher": _spoil_weight("real_score"),
    "teacher's output": _spoil_output("real_score"),
    "critic": _spoil_weight("fake_score"),
    "critic's output": _spoil_output("fake_score"),
    "generator": _spoil_weight("generator"),
    "generator's output": _spoil_output("generator"),
    "gradient": _spoil_gradient,
    "moment": _spoil_moment,
    "follower": _spoil_follower,
}

"""SIGTERM and SIGINT end a run in good order: a step is finished and saved, what can be made again is left at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal

from fewstep.train import processes

# A launcher passes on a signal that the terminal has sent to every process already.
_ECHO = 1.0

_current: Interrupts | None = None


class Stopped(KeyboardInterrupt):
    """The run was asked to stop. What it leaves undone is done again when it is resumed."""


class Interrupts:
    """Listens while it is entered. The first signal asks the run to stop, a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._since = 0.0
        self._free: Literal["", "alone", "together"] = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        global _current
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        _current = self
        return self

    def __exit__(self, *exc: object) -> None:
        global _current
        _current = None
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            if processes.size() == 1 or time.monotonic() - self._since > _ECHO:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.asked, self._since = signal.Signals(number).name, time.monotonic()
        if processes.leads():
            # Not print: it may be what was interrupted.
            with suppress(OSError):  # nobody may read along any more
                os.write(2, f"\n{self.asked}: saving, then stopping; a second signal stops at once\n".encode())
        if self._free == "alone" or (self._free == "together" and processes.size() == 1):
            raise Stopped

    @contextmanager
    def leaving(self, alone: bool = False) -> Iterator[None]:
        """What happens inside may be left at any moment, by Stopped.

        Several processes leave it where all of them are, at the next `poll`; one that is `alone` in it at once.
        """
        self._free = "alone" if alone else "together"
        try:
            if self.asked is not None and (alone or processes.size() == 1):
                raise Stopped
            self.poll()
            yield
        finally:
            self._free = ""

    def poll(self) -> None:
        if self._free == "together" and processes.size() > 1 and processes.either(self.asked is not None):
            raise Stopped


def poll() -> None:
    """A place at which all processes are together, and may leave what they make where the run was asked to stop."""
    if _current is not None:
        _current.poll()

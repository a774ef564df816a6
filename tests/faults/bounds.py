"""A case of hostile input: how it ends, with its memory and its time bounded by the system."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fewstep.core.errors import UserError

MORE = 2**30
"""bytes of address space that a case may take beyond what the process has already"""
LONGEST = 30.0
"""seconds of a case"""


def _spaces() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


@contextlib.contextmanager
def bounded(more: int = MORE) -> Iterator[None]:
    """The process may not grow by more than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_spaces() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Late(BaseException):
    """A case that does not end; no reader may catch it."""


@contextlib.contextmanager
def timely(longest: float = LONGEST) -> Iterator[None]:
    """Raises Late in the main thread after so many seconds."""

    def ring(number: int, frame: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, longest)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ending(read: Callable[[], Any]) -> str | BaseException | None:
    """None for what was read, the sentence of a refusal, and whatever else came out."""
    try:
        with timely():
            read()
    except UserError as error:
        return str(error)
    except BaseException as error:
        return error
    return None

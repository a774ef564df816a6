"""A run goes on when nobody reads along any more.

The `tee` of a pipe dies of the same Ctrl-C that asks it to save, a terminal is closed, the disk of a `> log` is full.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Unheard:
    """A stream that falls silent where it cannot be written any more."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._fall_silent()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        """What is still buffered goes the same way, also when the process ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def optional() -> Iterator[None]:
    """What is printed meanwhile may be read by nobody."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unheard(sys.stdout), Unheard(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before

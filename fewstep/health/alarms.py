"""Alarms of a run that trains: the doctor's statistics over the last moves, one word each on the progress line."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from fewstep.health import signs
from fewstep.health.signs import MOVES, Row, Sign

_WATCHED: dict[str, Callable[[Sequence[Row], Sequence[Row]], Sign | None]] = {
    "collapse": signs.spread,
    "saturated": signs.saturation,
}


class Alarms:
    """Watches the last moves of the generator; `on` are the words of the alarms that sound now.

    `before` are the rows that a resumed run has logged already.
    """

    def __init__(self, before: Iterable[Row] = ()):
        self.on: list[str] = []
        self._start: list[Row] = []
        self._window: deque[Row] = deque(maxlen=MOVES)
        for row in before:
            self.hear(row)

    def hear(self, row: Row) -> str:
        """Takes in what one step has logged. Returns what has begun or ended with it, as "collapse begins"."""
        if not signs.moved([row]):
            return ""
        self._start = self._start or [row]
        self._window.append(row)
        was, self.on = self.on, [word for word in _WATCHED if self._sounds(word)]
        begun = [f"{word} begins" for word in self.on if word not in was]
        return ", ".join(begun + [f"{word} ends" for word in was if word not in self.on])

    def _sounds(self, word: str) -> bool:
        if len(self._window) < MOVES:
            return False
        sign = _WATCHED[word](self._window, self._start)
        return sign is not None and sign.ill

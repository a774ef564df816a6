"""Whether the other processes of a run are well: each tells the others of itself, and hears them, once a beat.

A lost process shows in the others as a collective that fails or takes too long, and that does not say whose fault it
is. Here it gets a name: gone, stopped, late, or left with a reason of its own.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fewstep.core.errors import Lost, UserError

_PACKAGE = Path(__file__).parents[1]
_BEATS = 6
"""the beats after which a process that was not heard of is silent"""
_RESUME = "see to that, then continue the run with --resume"


@dataclass
class Heard:
    """What a process has told last, and when that came."""

    told: dict[str, Any]
    when: float


class Watch:
    """The watch of process `rank` of `size`, which meet at `host`:`port`; the first one lends the place there.

    `lent`: the place is there already, and outlives the processes. Raises Lost where some do not come in `timeout` s.
    """

    def __init__(self, host: str, port: int, rank: int, size: int, timeout: float, lent: str | None = None):
        self.rank, self.size, self.timeout, self.lent = rank, size, timeout, lent is not None
        # Every process writes once a beat, and reads what all have written.
        self.beat = min(1.0, timeout / 40) * max(1.0, size / 64)
        self.told: dict[str, Any] = {"beat": 0, "noticed": False, "end": None, "own": True, "at": ""}
        self.main, self.ending = threading.main_thread().ident, threading.Event()
        opens = rank == 0 and not self.lent
        try:
            place = dist.TCPStore(host, port, None, opens, timedelta(seconds=timeout), wait_for_workers=False)
            # Its own connection: another that waits for an answer would hold it up.
            own = dist.TCPStore(host, port, None, False, timedelta(seconds=timeout), wait_for_workers=False)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            reason = f"process {rank} could not reach the others at {host}:{port} within timeout={timeout:g} s ({said})"
            raise Lost(f"{reason}: start all {size} of them") from None
        self.place, self.store = dist.PrefixStore(f"{lent}/group", place), dist.PrefixStore(f"{lent}/watch", own)
        self._meet()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    @property
    def patience(self) -> float:
        """Seconds that a collective may take, so that a lost process has its name before `timeout` is over."""
        return self.timeout - 2 * _BEATS * self.beat

    def _meet(self) -> None:
        self.store.set(str(self.rank), json.dumps(self.told))
        names = [str(rank) for rank in range(self.size)]
        try:
            self.store.wait(names, timedelta(seconds=self.timeout))
        except RuntimeError:
            away = [name for name in names if not self.store.check([name])]
            raise Lost(
                f"of the {self.size} processes of this run {_named(away)} did not come within "
                f"timeout={self.timeout:g} s: look at what they say, and start all of them"
            ) from None
        now = time.monotonic()
        self.heard = {rank: Heard(self.told, now) for rank in range(self.size) if rank != self.rank}
        self.answered = self.awake = now
        self.slept = 0.0

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Tells the others how this one ended. Raises Lost for a collective that another process has let fail."""
        why = self.explain(error) if isinstance(error, RuntimeError) else None
        self.told |= {"end": "" if error is None else why or _reason(error), "own": why is None}
        self.ending.set()
        self.thread.join(2 * self.beat)
        if error is not None and self.rank == 0 and not self.lent:
            self._linger()
        if why is not None:
            raise Lost(why) from None

    def explain(self, error: RuntimeError) -> str | None:
        """Which process has let a collective fail, and how; None for an error that is none of theirs."""
        said = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in said:
            return None
        self.told["noticed"] = True
        late, began = "timed out" in said.lower() or "timeout" in said.lower(), time.monotonic()
        while time.monotonic() - began < _BEATS * self.beat:
            if ended := self.ended():
                return ended
            time.sleep(self.beat / 10)
        if self.slept and time.monotonic() - self.awake < self.timeout:
            return f"process {self.rank} was stopped for {self.slept:.0f} s, and the others did not wait; {_RESUME}"
        return self.silent(late) or (self.absent() if late else None)

    def ended(self) -> str | None:
        """What is said of a process that has ended by an error."""
        for rank, heard in self.heard.items():
            if reason := heard.told["end"]:
                return f"process {rank} has stopped: {reason}" if heard.told["own"] else reason
        return None

    def silent(self, late: bool) -> str | None:
        """What is said of processes that are not heard of any more; noticed `late`, they were awaited."""
        now, longest = time.monotonic(), (_BEATS - 1.5) * self.beat
        quiet = [rank for rank, heard in self.heard.items() if now - heard.when > longest and heard.told["end"] is None]
        who = _named(quiet) if quiet else ""
        if now - self.answered > longest:  # nothing is heard of anyone where the place itself does not answer
            who = "the launcher" if self.lent else _named([0])
        if late and who:
            return f"{who} did not answer for {self.patience:g} s: stopped, or out of reach; {_RESUME}"
        have = "have" if len(quiet) > 1 else "has"
        return f"{who} {have} gone: killed, or cut off; {_RESUME}" if who else None

    def absent(self) -> str | None:
        """What is said of processes that live, but did not come where the others waited."""
        away = [rank for rank, heard in self.heard.items() if not heard.told["noticed"]]
        if not away:
            return None
        where = self.heard[away[0]].told["at"]
        return (
            f"{_named(away)} did not come where the others waited for {self.patience:g} s, but is at {where}: raise "
            f"timeout={self.timeout:g} if that takes so long, or {_RESUME}"
        )

    def _run(self) -> None:
        before = time.monotonic()
        while not self.ending.wait(self.beat):
            gap = time.monotonic() - before
            self._round()
            if gap > _BEATS * self.beat:
                self._awake(gap)
            self._last_resort()
            before = time.monotonic()
        self._round()

    def _round(self) -> None:
        self.told["beat"] += 1
        self.told["at"] = self._place()
        with suppress(RuntimeError):
            self.store.set(str(self.rank), json.dumps(self.told))
            for rank, heard in self.heard.items():
                told = json.loads(self.store.get(str(rank)))
                if told != heard.told:
                    self.heard[rank] = Heard(told, time.monotonic())
            self.answered = time.monotonic()

    def _linger(self) -> None:
        """Leaves the place open until all have heard there how this process ended."""
        began = time.monotonic()
        while time.monotonic() - began < 2.5 * self.beat and any(h.told["end"] is None for h in self.heard.values()):
            time.sleep(self.beat / 10)

    def _awake(self, slept: float) -> None:
        """This process itself was stopped, and heard of nobody meanwhile."""
        self.slept, self.awake = slept, time.monotonic()
        self.answered = now = self.awake
        for heard in self.heard.values():
            heard.when = now

    def _last_resort(self) -> None:
        """Ends this process where it should have noticed long ago that another is lost, but hangs itself."""
        since = [heard.when for heard in self.heard.values() if heard.told["end"] != ""]
        if all(heard.told["end"] == "" for heard in self.heard.values()):
            return  # they have done their part
        if time.monotonic() - min([self.answered, *since]) < self.timeout:
            return
        why = self.ended() or f"the others are gone, and process {self.rank} still is at {self.told['at']}; {_RESUME}"
        me = f" (process {self.rank})" if self.rank else ""
        os.write(2, f"\nfewstep{me}: {why}\n".encode())
        os._exit(2)

    def _place(self) -> str:
        """The file and function of the package that the main thread is in."""
        frame = sys._current_frames().get(self.main or 0)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(_PACKAGE):
                return f"{file.relative_to(_PACKAGE.parent)}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return "an unknown place"


def _named(ranks: list[Any]) -> str:
    return f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _reason(error: BaseException) -> str:
    """How an error is told to the others."""
    if isinstance(error, UserError):
        return str(error)
    return " ".join([type(error).__name__, *str(error).splitlines()[:1]])

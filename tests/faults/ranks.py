"""Runs of several processes of which one is killed, stopped, hangs, or was started with something else."""

from __future__ import annotations

import re
import shutil
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.harness import ROOT, Command, Done, Server, make_teacher
from tests.faults.kills import SMALL

FOREVER = 3600.0


@dataclass(frozen=True)
class Loss:
    """What becomes of one process: a fault of `faults.py`, and what the others have to say of it, {} its number."""

    fault: Mapping[str, Any]
    said: str


def at(phase: str, call: int, **what: Any) -> dict[str, Any]:
    return {"phase": phase, "call": call, **what}


STEP, EVALUATION, SAVING = ("step", 9000), ("evaluation", 2000), ("checkpoint", 2000)
KILLED, SILENT = r"process {} has gone: killed", r"process {} did not answer for [\d.]+ s: stopped"
LATE = r"process {} did not come where the others waited for [\d.]+ s, but is at fewstep/\S+ \w+"


def kinds(phase: tuple[str, int]) -> dict[str, Loss]:
    return {
        "killed": Loss(at(*phase, signal=signal.SIGKILL), KILLED),
        "stopped": Loss(at(*phase, signal=signal.SIGSTOP), SILENT),
        "hung": Loss(at(*phase, hang=FOREVER), LATE),
    }


@dataclass
class Group:
    """The processes of one run, started as a launcher would, but with nobody to end them."""

    commands: list[Command]
    faulty: int
    timeout: float

    def others(self) -> list[Command]:
        return [one for rank, one in enumerate(self.commands) if rank != self.faulty]

    def lost(self) -> Command:
        return self.commands[self.faulty]

    def ends(self) -> tuple[list[Done], float]:
        """How the others ended, and how many seconds after the fault the last of them did."""
        done = [one.done() for one in self.others()]
        at = self.lost().base.with_suffix(".counted").stat().st_mtime
        return done, max(one.base.with_suffix(".status").stat().st_mtime for one in self.others()) - at


def arguments(folder: Path, out: str, timeout: float, *more: str) -> list[str]:
    config, teacher = "configs/scenes/dmd2.yaml", make_teacher(folder / "teacher")
    few = ("steps=40", "evals.samples=0", "batch=12", f"timeout={timeout:g}", "evals.every=4")
    return ["train", config, *SMALL, *few, *more, f"model.teacher={teacher}", f"--out={folder / out}"]


def launch(server: Server, given: Sequence[list[str]], faulty: int, fault: Mapping[str, Any], timeout: float) -> Group:
    """One process for each list of arguments."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    count = str(len(given))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    commands = [
        server.start(own, fault if rank == faulty else None, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, own in enumerate(given)
    ]
    return Group(commands, faulty, timeout)


def start(server: Server, folder: Path, out: str, count: int, faulty: int, loss: Loss, timeout: float) -> Group:
    return launch(server, [arguments(folder, out, timeout)] * count, faulty, loss.fault, timeout)


def judge(group: Group, loss: Loss) -> tuple[list[str], float]:
    """What is wrong with how the others ended, and the seconds they took."""
    wrong = []
    done, seconds = group.ends()
    if seconds > group.timeout:
        wrong.append(f"they took {seconds:.1f} s")
    for one in done:
        wrong += unclear(one, loss.said.format(group.faulty))
    return wrong + left_behind(group), seconds


def unclear(done: Done, pattern: str) -> list[str]:
    try:
        said = done.sentence
    except AssertionError as error:
        return [f"no clear sentence: {error}"]
    return [] if re.search(pattern, said) else [f"another sentence: {said}"]


def left_behind(group: Group) -> list[str]:
    """Wakes what was stopped, which has to end by itself; then processes that are still there, or zombies."""
    lost, wrong = group.lost(), []
    if lost.running and stopped(lost.pid):
        lost.send(signal.SIGCONT)
    try:
        end = lost.done(2.5 * group.timeout)
        if end.code == 0:
            wrong.append("the lost process ended as if nothing had been")
        if end.code > 0:
            wrong += unclear(end, f"process {group.faulty} (was stopped|did not come|still is at)")
    except AssertionError as error:
        wrong.append(f"the lost process hangs: {error}")
    return wrong + [f"{pid} is left of the session {one.pid}" for one in group.commands for pid in session(one.pid)]


def stopped(pid: int) -> bool:
    return status(Path(f"/proc/{pid}/stat"))[0] == "T"


def status(file: Path) -> list[str]:
    """State, parent, group, session, .. of a process."""
    return file.read_text().rpartition(")")[2].split()


def session(leader: int) -> list[str]:
    """The processes of a session, those that nobody has asked after among them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            if status(file)[3] == str(leader):
                found.append(file.parent.name)
        except OSError:
            continue
    return found


def other_source(folder: Path) -> Path:
    """A copy of the package with one more comment in one file."""
    copy = shutil.copytree(ROOT / "fewstep", folder / "fewstep", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "core" / "draw.py").open("a") as file:
        file.write("# changed\n")
    return copy

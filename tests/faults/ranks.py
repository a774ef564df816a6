"""Runs of several processes of which one is killed, stopped, hangs, or was started with something else."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
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
LATE = r"process {} did not come where the others waited for [\d.]+ s, but is at fewstep/\S+ \S+"


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
    port = free_port()
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


def unlike(server: Server, folder: Path, timeout: float) -> dict[str, Group]:
    """Runs of two processes of which the second has another config, other source, or never comes."""
    slower, mistaken = "players.generator.lr=2e-5", "steps=none"
    groups = {}
    for what, more, fault in (
        ("config", [slower], {}),
        ("source", [], {"source": str(other_source(folder))}),
        ("away", [mistaken], {}),
    ):
        own = arguments(folder, what, timeout)
        groups[what] = launch(server, [own, [*own, *more]], 1, fault, timeout)
    return groups


UNLIKE = {
    "config": "the processes of this run differ in their config: 1 from 0",
    "source": "the processes of this run differ in their package source: 1 from 0",
    "away": r"of the 2 processes of this run process 1 did not come within timeout=[\d.]+ s",
}


def refused(group: Group, pattern: str) -> list[str]:
    """What is wrong with how a run ended whose second process should not have been part of it."""
    leader, other = (one.done() for one in group.commands)
    wrong = unclear(leader, pattern) + ([] if other.code == 2 else [f"the other ended with {other.code}"])
    late = leader.seconds > group.timeout + 10  # to start takes a while, too
    return wrong + ([f"it took {leader.seconds:.0f} s"] if late else [])


def full_disk(server: Server, folder: Path, timeout: float) -> list[str]:
    """What is wrong when the leader alone meets a full disk: the other repeats its sentence."""
    fault = {"site": "checkpoints/.0000002.partial/state.safetensors", "root": str(folder / "full")}
    group = launch(server, [arguments(folder, "full", timeout)] * 2, 0, fault, timeout)
    leader, other = (one.done() for one in group.commands)
    said = leader.sentence.partition(": ")[2]
    return unclear(leader, "No space left on device") + unclear(other, f"process 0 has stopped: {re.escape(said)}")


def by_torchrun(folder: Path, number: signal.Signals, rank: int, timeout: float) -> tuple[list[str], float]:
    """What is wrong when a process that torchrun has started is killed or stopped, and the seconds until the end."""
    out = f"torchrun_{number.name}_{rank}"
    asked = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    asked += ["-m", "fewstep.cli", *arguments(folder, out, timeout, "steps=100000")]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / f"{out}.said").open("w") as said:
        agent = subprocess.Popen(asked, cwd=ROOT, env=settings, stdout=said, stderr=said, start_new_session=True)
    started = [str(agent.pid)]
    try:
        await_steps(folder / out, 3)
        started = family(agent.pid)
        victim = next(pid for pid in started if f"\0RANK={rank}\0" in environment(pid))
        began = time.monotonic()
        os.kill(int(victim), number)
        code = agent.wait(timeout + 60)  # torchrun gives the stopped one half a minute
        seconds = time.monotonic() - began
    finally:
        left = [pid for pid in {*started, *family(agent.pid)} if out in arguments_of(pid)]
        for pid in left:
            os.kill(int(pid), signal.SIGKILL)
        agent.wait()
    text = (folder / f"{out}.said").read_text(errors="replace")
    wrong = [f"{pid} is left" for pid in left] + ([] if code else ["torchrun ended as if nothing had been"])
    if not re.search(rf"fewstep[^:\n]*: process {rank} (has gone|did not answer)", text):
        wrong.append(f"no sentence: {text[-2000:]}")
    return wrong, seconds


def family(pid: int) -> list[str]:
    """A process and all below it."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[file.parent.name] = status(file)[1]
    found = [str(pid)]
    for parent in found:  # it grows
        found += [child for child, of in parents.items() if of == parent]
    return found


def arguments_of(pid: str) -> str:
    """What a process was started with; nothing for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def await_steps(out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not any(len(log.read_text().splitlines()) >= count for log in out.glob("*/log.jsonl")):
        assert time.monotonic() < deadline, f"no step in {out}"
        time.sleep(0.1)


def environment(pid: str) -> str:
    try:
        return "\0" + Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


ROUNDS = ((STEP, 0, 2), (EVALUATION, 1, 2), (SAVING, 1, 3))
"""where a process is lost, which one, and of how many"""


def soak(folder: Path, timeout: float = 20.0) -> dict[str, Any]:
    """Every kind of loss in several phases, by itself and by torchrun. Raises AssertionError where one is not met."""
    faults: list[str] = []
    took: dict[str, list[float]] = {}
    with Server() as server:
        for (name, call), faulty, count in ROUNDS:
            losses = kinds((name, call))
            groups = {
                kind: start(server, folder, f"{kind}_{name}_{faulty}_{count}", count, faulty, loss, timeout)
                for kind, loss in losses.items()
            }
            for kind, group in groups.items():
                wrong, seconds = judge(group, losses[kind])
                took.setdefault(kind, []).append(round(seconds, 1))
                faults += [f"{kind} in {name}: {one}" for one in wrong]
                print(
                    f"{kind} in {name}, {faulty} of {count}: {seconds:.1f} s, {wrong or 'as it should be'}", flush=True
                )
        for what, group in unlike(server, folder, timeout).items():
            faults += [f"{what}: {one}" for one in refused(group, UNLIKE[what])]
        faults += [f"full disk: {one}" for one in full_disk(server, folder, timeout)]
    for number, rank in ((signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGKILL, 0)):
        wrong, seconds = by_torchrun(folder, number, rank, timeout)
        took.setdefault(f"torchrun, {number.name}", []).append(round(seconds, 1))
        faults += [f"torchrun, {number.name} of {rank}: {one}" for one in wrong]
        print(f"torchrun, {number.name} of {rank}: {seconds:.1f} s, {wrong or 'as it should be'}", flush=True)
    figures = {
        "timeout": timeout,
        "losses": sum(map(len, took.values())),
        "seconds_until_all_others_have_ended": took,
        "with_something_else": len(UNLIKE) + 1,
        "not_as_promised": len(faults),
    }
    assert not faults, (figures, faults)
    return figures

"""Runs that are killed at seeded random moments and resumed, beside the same runs that were left alone."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fewstep.train import checkpoint
from tests.faults.faults import PHASES
from tests.faults.harness import Done, Server, different, leftovers, make_teacher, resumable, the_run, traces

SMALL = ("batch=4", "evals.samples=24", "evals.baseline=false", "evals.batch=36", "save.every=2", "evals.every=2")


# Measured by a hook whose best checkpoint is kept.
MEASURED = ("evals.hooks.f.metric=frechet", "evals.hooks.f.every=2", "evals.hooks.f.samples=24", "evals.best=f")


@dataclass(frozen=True)
class Scene:
    """A run of a few seconds: its config and overrides, and on how many processes it is played."""

    config: str
    more: tuple[str, ...]
    processes: int = 1

    def arguments(self, teacher: Path, out: Path) -> list[str]:
        return ["train", self.config, *SMALL, *self.more, f"model.teacher={teacher}", f"--out={out}"]

    def play(self, server: Server, arguments: list[str], fault: dict[str, Any] | None = None) -> Done:
        return (server.run if self.processes == 1 else server.run_two)(arguments, fault)


SCENES = {
    "dmd2_gan": Scene("configs/scenes/dmd2.yaml", ("steps=6", "evals.measure_every=3")),
    "phased_dmd": Scene("configs/scenes/phased_dmd_experts.yaml", ("steps=4",)),
    "progressive": Scene("configs/scenes/progressive.yaml", ("steps=3",)),
    "pairs_then_gan": Scene(
        "configs/quickstart.yaml",
        ("pairs.count=24", "pairs.steps=4", "stage_1.steps=3", "stage_1.batch=4", "stage_2.steps=4", *MEASURED),
    ),
    "fsdp2": Scene("configs/scenes/dmd2.yaml", ("steps=5",), processes=2),
}


@dataclass
class Whole:
    """A scene that nobody has disturbed: where it lies, what it left, and how many calls each phase took."""

    scene: Scene
    teacher: Path
    left: dict[str, Any]
    calls: dict[str, int]
    seconds: float


def whole(server: Server, scene: Scene, folder: Path) -> Whole:
    """Plays a scene to its end, counting."""
    teacher = make_teacher(folder / "teacher")
    done = scene.play(server, scene.arguments(teacher, folder / "counted"), {"phase": "none"})
    run = the_run(folder / "counted")
    assert done.code == 0 and run is not None, done.errors[-3000:]
    return Whole(scene, teacher, traces(run), done.counted, done.seconds)


@dataclass
class Moment:
    """When a process is killed: at the nth call of a phase, or so many seconds after its start."""

    phase: str
    call: int = 0
    seconds: float = 0.0


def moments(whole: Whole, seed: int, count: int, phases: tuple[str, ...] = PHASES) -> list[Moment]:
    """Phases in turn, each at a random call; every fifth at a random time of the clock."""
    draw, found = random.Random(seed), []
    there = [phase for phase in phases if whole.calls.get(phase, 0) > 100]
    for i in range(count):
        phase = there[(i - i // 5) % len(there)]
        if i % 5 == 4:
            found.append(Moment("clock", seconds=draw.uniform(0, whole.seconds)))
        else:
            found.append(Moment(phase, call=draw.randint(1, int(0.98 * whole.calls[phase]))))
    return found


@dataclass
class Outcome:
    """What a kill and the resume after it have shown; `faults` is empty where everything is as it should be."""

    moment: Moment
    at: list[str]
    cut: int = 0
    repeated: int = 0
    resumed: bool = False
    faults: list[str] = field(default_factory=list)


def killed(server: Server, whole: Whole, moment: Moment, out: Path) -> Outcome:
    """Kills a run at the moment and resumes it until it ends; a run that had left nothing yet is started again."""
    scene, arguments = whole.scene, whole.scene.arguments(whole.teacher, out)
    if moment.phase == "clock":
        end = killed_by_the_clock(server, scene, arguments, moment.seconds)
    else:
        end = scene.play(server, arguments, {"signal": signal.SIGKILL, "phase": moment.phase, "call": moment.call})
    outcome = Outcome(moment, end.counted.get("at", []))
    if end.code not in (-signal.SIGKILL, 0) or (end.code == 0 and moment.phase != "clock"):
        outcome.faults.append(f"it was not killed but ended with {end.code}: {end.errors[-500:]}")
    run = the_run(out)
    if run is not None and not resumable(run):
        shutil.rmtree(run)
        run = None
    before = logged(run)
    outcome.resumed = run is not None
    again = scene.play(server, [*arguments, *(["--resume", str(run)] if run is not None else [])])
    if again.code != 0:
        outcome.faults.append(f"the resume ended with {again.code}: {again.errors[-1500:]}")
        return outcome
    run = the_run(out)
    assert run is not None
    outcome.faults += [f"{name} differs" for name in different(whole.left, traces(run))]
    outcome.faults += [f"{name} was left behind" for name in leftovers(run)]
    outcome.faults += cuts(run, before, outcome)
    return outcome


def killed_by_the_clock(server: Server, scene: Scene, arguments: list[str], seconds: float) -> Done:
    if scene.processes == 2:
        return server.run_two(arguments, kill_after=seconds)
    command = server.start(arguments)
    time.sleep(seconds)
    if command.running:
        command.send(signal.SIGKILL)
    return command.done()


def logged(run: Path | None) -> dict[str, tuple[int, int, int]]:
    """Stage folder -> the lines of log.jsonl and evals.jsonl beyond its newest checkpoint, and that checkpoint."""
    found = {}
    for place in [] if run is None else [path.parent for path in run.rglob("checkpoints")]:
        saved = checkpoint.available(place / "checkpoints")
        step = int(saved[-1].name) if saved else 0
        beyond = []
        for name in ("log.jsonl", "evals.jsonl"):
            lines = (place / name).read_text().splitlines() if (place / name).exists() else []
            rows = [json.loads(line) for line in lines]
            beyond.append(sum(row["step"] > step for row in rows))
        found[place.name if place != run else ""] = (*beyond, step)
    return found


def cuts(run: Path, before: dict[str, tuple[int, int, int]], outcome: Outcome) -> list[str]:
    """What is wrong with what the log says of its cut, beside the lines that lay beyond the checkpoint."""
    wrong = []
    for name, (log, evals, step) in before.items():
        rows = [json.loads(line) for line in (run / name / "log.jsonl").read_text().splitlines()]
        said = [row for row in rows if "resumed" in row]
        outcome.cut += log + evals
        outcome.repeated += log
        for count, file in ((log, "log.jsonl"), (evals, "evals.jsonl")):
            told = f"{count} line{'s' * (count != 1)} of {file}"
            if count and not any(told in row["resumed"] and row["step"] == step for row in said):
                wrong.append(f"{name or 'the run'}: {told} beyond step {step} went without a word: {said}")
        if any(b["step"] - a["step"] > 1 for a, b in pairwise(rows)):
            wrong.append(f"{name}: the log has a gap")
        if log > 2:  # save.every
            wrong.append(f"{name}: {log} steps were played again though a checkpoint is due every 2")
    return wrong


# How many of the fifty kills each scene takes; two processes are slower.
SHARES = {"dmd2_gan": 12, "phased_dmd": 10, "progressive": 10, "pairs_then_gan": 12, "fsdp2": 6}


def soak(folder: Path, seed: int = 8) -> dict[str, Any]:
    """Fifty kills, and what they have shown. Raises AssertionError where a run did not end as if left alone."""
    outcomes: dict[str, list[Outcome]] = {}
    with Server() as server:
        for number, (name, count) in enumerate(SHARES.items()):
            reference = whole(server, SCENES[name], folder / name)
            outcomes[name] = []
            for i, moment in enumerate(moments(reference, seed + number, count)):
                outcome = killed(server, reference, moment, folder / name / f"killed_{i}")
                shutil.rmtree(folder / name / f"killed_{i}", ignore_errors=not outcome.faults)
                outcomes[name].append(outcome)
                print(f"{name} {i}: {moment} {outcome.at} {'; '.join(outcome.faults) or 'equal'}", flush=True)
    flat = [outcome for found in outcomes.values() for outcome in found]
    bad = [outcome for outcome in flat if outcome.faults]
    kinds = sorted({outcome.moment.phase for outcome in flat})
    figures = {
        "kills": len(flat),
        "by_phase": {kind: sum(outcome.moment.phase == kind for outcome in flat) for kind in kinds},
        "by_run": {name: len(found) for name, found in outcomes.items()},
        "resumed": sum(outcome.resumed for outcome in flat),
        "equal_to_the_bit": len(flat) - len(bad),
        "log_lines_cut": sum(outcome.cut for outcome in flat),
        "most_steps_repeated": max(outcome.repeated for outcome in flat),
    }
    assert not bad, (figures, bad)
    return figures

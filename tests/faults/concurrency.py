"""Two runs in one folder, and readers of a run that is being written: checkpoints come and go, lines are half there."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fewstep import report
from fewstep.evals.grid import save_grid
from fewstep.export import load_run
from fewstep.health import record
from fewstep.hooks import Best
from fewstep.report import found
from fewstep.train import checkpoint, lock
from fewstep.train.rundir import RunDir
from tests.faults.harness import Command, Done, Server, make_teacher, the_run, traces
from tests.faults.kills import MEASURED, SMALL

HELD = r"another run is writing in {} \(process {} on \S+\)"
HANGS = {"phase": "step", "call": 9000, "hang": 3600.0}


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    few = ("steps=6", "evals.samples=0", *MEASURED, *more, f"model.teacher={make_teacher(folder / 'teacher')}")
    return ["train", "configs/scenes/dmd2.yaml", *SMALL, *few, f"--out={folder / out}"]


def hanging(server: Server, given: list[str], out: Path) -> tuple[Command, Path]:
    """A run that has taken its folder and stays in the middle of a step."""
    first, deadline = server.start(given, HANGS), time.monotonic() + 120
    while not first.base.with_suffix(".counted").exists():
        assert first.running and time.monotonic() < deadline, first.printed("err")[-2000:]
        time.sleep(0.02)
    run = the_run(out)
    assert run is not None
    return first, run


def second(server: Server, folder: Path, out: str) -> list[str]:
    """What is wrong when a run is resumed, by one process and by two, while it is played; and when it was killed."""
    given = arguments(folder, out)
    first, run = hanging(server, given, folder / out)
    before, wrong, again = traces(run), [], [*given, "--resume", str(run)]
    pattern = HELD.format(re.escape(str(run)), first.pid)
    for done in (server.run(again), server.run_two(again)):
        wrong += [] if done.code == 2 and re.search(pattern, done.sentence) else [f"not refused: {done}"]
    wrong += [] if traces(run) == before else ["it was changed by the one that was refused"]
    first.send(signal.SIGKILL)
    first.done()
    wrong += [] if (run / lock.NAME).exists() else ["nothing of the lock was there to be left behind"]
    return wrong + ended(server.run(again), run)


def ended(done: Done, run: Path) -> list[str]:
    if done.code:
        return [f"it ended with {done.code}: {done.errors[-1500:]}"]
    return ["the lock is still there"] if (run / lock.NAME).exists() else []


def at_once(server: Server, folder: Path, out: str, count: int) -> list[str]:
    """What is wrong when `count` processes resume one folder at once: one plays, and the others say why not."""
    given = arguments(folder, out)
    first, run = hanging(server, given, folder / out)
    first.send(signal.SIGKILL)
    first.done()
    ends = [one.done() for one in [server.start([*given, "--resume", str(run)]) for _ in range(count)]]
    played = [done for done in ends if done.code == 0]
    # One that comes when the first has ended already finds a finished run, and has nothing left to do.
    wrong = [] if played else ["nobody has played it"]
    steps = [row["step"] for row in RunDir(run).rows("log.jsonl") if "resumed" not in row]
    wrong += [] if steps == list(range(1, 7)) else [f"its log is {steps}"]
    for done in ends:
        if done.code:
            wrong += [] if re.search(r"another run is writing in", done.sentence) else [done.sentence]
    return wrong


@contextmanager
def written(run: Path) -> Iterator[None]:
    """Another process writes and prunes in `run`, as training does, and as fast as it can."""
    writer = multiprocessing.get_context("fork").Process(target=write, args=(run,), daemon=True)
    checkpoints = run / "checkpoints"
    real = checkpoint.available(checkpoints)[-1].name
    writer.start()
    try:
        while not any(path.name > real for path in checkpoint.available(checkpoints)):
            assert writer.is_alive(), "the writer has not begun"
            time.sleep(0.01)
        yield
        assert writer.is_alive(), "the writer has ended"
    finally:
        writer.kill()
        writer.join()


def write(run: Path) -> None:
    """Step by step: a line of the log, an evaluation, every third time a new best one, a checkpoint, and its elders go.

    All numbers of a checkpoint are its step, moves too. Lines are longer than what the system writes at once.
    """
    torch.set_num_threads(1)
    folder, best = RunDir(run), Best.__new__(Best)
    best.name, best.file, best.sign, best.kept = "f", run / "best.json", 1, None
    newest = checkpoint.available(folder.checkpoints)[-1]
    state, moves = load_file(newest / checkpoint.STATE), json.loads((newest / checkpoint.MANIFEST).read_text())["moves"]
    filler = {"note": "long " * 4000}
    for step in itertools.count(int(newest.name) + 1):
        folder.append("log.jsonl", {"step": step, "seconds": 0.1, "images": step, "generator/loss": 1.0, **filler})
        folder.append("evals.jsonl", {"step": step, "f": 1 / step})
        save_grid(torch.zeros(12, 3, 16, 16), folder.samples / f"{step % 30:07d}.png", columns=12)
        best.improved(step, {"f": 1 / step if step % 3 == 0 else 1.0})
        full = {k: torch.full_like(v, step) if v.is_floating_point() else v for k, v in state.items()}
        path = folder.checkpoints / f"{step:07d}"
        checkpoint.write(path, step, dict.fromkeys(moves, step), full)
        checkpoint.prune(path, 1, best.step)


def reads(run: Path, seconds: float, page: Path) -> tuple[dict[str, int], list[str]]:
    """What readers see of `run` while it is written: how often each looked, and what was not as at any one moment."""
    looked = {"newest": 0, "best": 0, "report": 0, "doctor": 0}
    wrong: list[str] = []
    began, steps = time.monotonic(), set[int]()
    while time.monotonic() - began < seconds:
        for which in (None, "best"):
            step, said = loaded(run, which)
            steps.add(step)
            wrong += said
            looked[which or "newest"] += 1
        for _ in range(3):
            seen = found.read(RunDir(run))
            wrong += [note for note in seen.notes if "read" in note] + uneven(seen.log)
            last = seen.log[-1]["step"]
            wrong += [f"evaluated at {row['step']} before {last}" for row in seen.evals if row["step"] > last]
            looked["report"] += 1
            wrong += uneven(record.read(run)[0].rows)
            looked["doctor"] += 1
    report.write_report(RunDir(run), page)
    return {**looked, "checkpoints_seen": len(steps)}, wrong


def loaded(run: Path, which: str | None) -> tuple[int, list[str]]:
    """The step of the checkpoint that is read, and whether all of it is of that step."""
    try:
        opened = load_run(run, which)
    except Exception as error:
        return -1, [f"{which or 'newest'}: {type(error).__name__} {error}"]
    player = opened.players["generator"]
    weights = [*player.modules[0].parameters(), *player.followers["ema"].module.parameters()]
    mixed = {float(value) for weight in weights for value in weight.detach().flatten()[:2]} != {float(player.moves)}
    return player.moves, [f"{which or 'newest'} is of several steps"] if mixed else []


def uneven(rows: list[dict[str, Any]]) -> list[str]:
    steps = [row["step"] for row in rows if "resumed" not in row]
    return [] if steps == list(range(1, len(steps) + 1)) else [f"the log goes {steps[-5:]}"]


def finished(server: Server, folder: Path) -> Path:
    """A run with an average and a best checkpoint, to be written on."""
    done = server.run(arguments(folder, "read", "players.generator.ema=0.9", "save.export=false"))
    run = the_run(folder / "read")
    assert done.code == 0 and run is not None, done.errors[-2000:]
    return run


def real(server: Server, folder: Path, seconds: float) -> tuple[int, list[str]]:
    """Real commands on a run that really trains: how many, and what they had to complain of."""
    given = arguments(folder, "real", "steps=100000", "save.every=1", "save.keep=1", "evals.every=0")
    training, deadline = server.start(given), time.monotonic() + 120
    while not list((folder / "real").glob("*/best.json")):
        assert training.running and time.monotonic() < deadline, training.printed("err")[-2000:]
        time.sleep(0.1)
    time.sleep(1)
    (run,), count, wrong = (folder / "real").iterdir(), 0, list[str]()
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        for asked in (["report", str(run)], ["eval", str(run), "--samples", "36"], ["doctor", str(run)]):
            done = server.run(asked)
            allowed = (0, 1) if asked[0] == "doctor" else (0,)
            wrong += [] if done.code in allowed else [f"{asked[0]} ended with {done.code}: {done.errors[-500:]}"]
            count += 1
    wrong += [] if training.running else ["the run itself has ended"]
    training.send(signal.SIGKILL)
    training.done()
    return count, wrong


def soak(folder: Path) -> dict[str, Any]:
    """Many starts into one folder, and minutes of reading. Raises AssertionError where one is not met as promised."""
    folder.mkdir(exist_ok=True)
    with Server() as server:
        faults = second(server, folder, "second")
        rounds = 10
        for i in range(rounds):
            faults += at_once(server, folder, f"at_once_{i}", 4)
        commands, wrong = real(server, folder, 30)
        faults += wrong
        run = finished(server, folder)
        with written(run):
            looked, wrong = reads(run, 60, folder / "page.html")
        faults += wrong
        written_steps = int(checkpoint.available(run / "checkpoints")[-1].name)
    figures = {
        "refused_while_it_is_played": 2,
        "resumed_after_a_kill": 1 + rounds,
        "started_at_once": 4 * rounds,
        "commands_on_a_run_that_trains": commands,
        "reads": looked,
        "checkpoints_written_meanwhile": written_steps,
        "not_as_promised": len(faults),
    }
    assert not faults, (figures, faults[:20])
    return figures

"""Plays a config from start to finish: stages, logs, sample grids, checkpoints, signals, export, report."""

from __future__ import annotations

import errno
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fewstep import build as building
from fewstep import measure, reading, sharded
from fewstep.build import Run
from fewstep.config import Config, differences, to_yaml
from fewstep.core.errors import SaidOnce, UserError
from fewstep.export import load_run
from fewstep.health.alarms import Alarms
from fewstep.hooks import Best, Hooks
from fewstep.models import hub, loading
from fewstep.objectives import base as objectives
from fewstep.train import checkpoint, processes, soundness
from fewstep.train.checkpoint import write_text
from fewstep.train.interrupts import Interrupts, Stopped
from fewstep.train.loop import Logs, train
from fewstep.train.player import NonFinite
from fewstep.train.rundir import RunDir

# What the progress bar shows, each as last seen: a player that rests at a step logs nothing.
_SHOWN = {
    "generator/loss": "loss",
    "gap": "gap",
    "lag": "lag",
    "generator/grad_norm": "G grad",
    "fake_score/grad_norm": "F grad",
    "x0/mean": "x0 mean",
    "x0/std": "std",
    "x0/saturated": "sat",
    "gan/accuracy": "D acc",
}


class Training:
    """One stage while it trains: what happens after every step."""

    def __init__(self, run: Run, folder: RunDir, done: int, interrupts: Interrupts, hooks: Hooks):
        self.run, self.folder, self.interrupts, self.hooks = run, folder, interrupts, hooks
        self.best = Best(run, folder.root / "best.json", done)
        self.bar = tqdm(
            total=run.config.steps,
            initial=done,
            unit="step",
            desc=run.config.name,
            dynamic_ncols=True,
            disable=not processes.leads(),
        )
        self.images = done * run.config.batch
        self.seen: Logs = {}
        self.alarms = Alarms(folder.rows("log.jsonl"))
        self.started = self.stepped = time.perf_counter()
        self.longest = self.saving = 0.0
        self.warned = False

    def after(self, step: int, logs: Logs) -> bool:
        done, config = step + 1, self.run.config
        self.longest = max(self.longest, time.perf_counter() - self.stepped)
        self.images += config.batch
        moves = {f"{name}/moves": player.moves for name, player in self.run.players.items()}
        rates = {f"{name}/lr": player.learning_rate() for name, player in self.run.players.items()}
        said = self.alarms.hear(logs)
        self.log(done, {**moves, **rates, **logs, **({"alarm": said} if said else {})})
        self.bar.update()
        self.show(logs)
        best = self.evaluate(done)
        due = done % config.save.every == 0 or done == config.steps or best
        # A signal reaches the processes at different steps; they stop at the same one.
        asked = processes.either(self.interrupts.asked is not None)
        if due or asked:
            self.save(done)
            asked = asked or processes.either(self.interrupts.asked is not None)  # while it was saving
        self.stepped = time.perf_counter()
        return asked

    def evaluate(self, done: int) -> bool:
        """What is due to be seen and measured; whether the checkpoint of this step is the best so far.

        Where the run is asked to stop it is left, and made up for when the run is resumed.
        """
        names = self.hooks.due(done)
        if not (names or self.measured(done) or self.looked(done)):
            return False
        soundness.check(self.run.players, done)
        try:
            with self.interrupts.leaving():
                if self.measured(done):
                    self.measure(done)
                if self.looked(done):
                    self.look(done)
                found = self.hooks.measure(names)
        except Stopped:
            return False
        return self.note(done, *found) if names else False

    def measured(self, done: int) -> bool:
        config = self.run.config
        return bool(config.evals.measure_every) and done % config.evals.measure_every == 0 and done < config.steps

    def looked(self, done: int) -> bool:
        config = self.run.config
        return bool(config.evals.every) and (done % config.evals.every == 0 or done == config.steps)

    def make_up(self, done: int) -> None:
        """Evaluates the step that a run is resumed from, where it was stopped before it had done so."""
        rows = sum(row["step"] == done for row in self.folder.rows("evals.jsonl"))
        lacking = rows < self.measured(done) + bool(self.hooks.due(done))
        lacking |= self.looked(done) and not self.grid(done).exists()
        if processes.from_leader(lambda: lacking):
            self.folder.truncate("evals.jsonl", done - 1)
            if self.evaluate(done):
                self.save(done)

    def grid(self, done: int) -> Path:
        return self.folder.samples / f"{done:07d}.png"

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        seconds = round(time.perf_counter() - self.started, 3)
        self.folder.append("log.jsonl", {"step": step, "seconds": seconds, "images": self.images, **row})

    def resumed(self, done: int, cut: Mapping[str, int]) -> None:
        """Notes in the log that the run goes on, and what of it lay beyond the checkpoint it goes on from."""
        lines = " and ".join(f"{count} line{'s' * (count != 1)} of {name}" for name, count in cut.items() if count)
        said = f"goes on from step {done}" + (f"; cut as beyond it: {lines}" if lines else "")
        self.log(done, {"resumed": said})
        if processes.leads():
            self.bar.write(said)

    def stopped(self, reason: str) -> None:
        """Leaves the reason why no further step was played as the last line of the log."""
        self.log(self.bar.n + 1, {"stopped": reason})

    def show(self, logs: Logs) -> None:
        """The alarms come first: a narrow terminal cuts the end off."""
        self.seen |= logs
        shown = [f"{short}={self.seen[k]:.3g}" for k, short in _SHOWN.items() if k in self.seen]
        self.bar.set_postfix_str(", ".join([*(f"! {word}" for word in self.alarms.on), *shown]), refresh=False)

    def look(self, done: int) -> None:
        measure.save_student_grid(self.run, self.grid(done))

    def measure(self, done: int) -> None:
        net, rollout = measure.student(self.run)
        truth = measure.truth_of(self.run.source)
        row = measure.measure("student", self.run, net, rollout, truth, self.run.config.evals.samples)
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        self.folder.append("evals.jsonl", {"step": done, **numbers})

    def note(self, done: int, numbers: Mapping[str, float], protocols: Mapping[str, Any]) -> bool:
        """Writes down what hooks have measured; says whether the checkpoint of this step is the best so far."""
        # First the best: what has a line is not measured again.
        best = self.best.improved(done, numbers)
        self.folder.append("evals.jsonl", {"step": done, **numbers})
        self.folder.note_protocols(protocols)
        if processes.leads():
            self.bar.write(f"step {done}: {', '.join(f'{name} {value:.4g}' for name, value in numbers.items())}")
        return best

    def save(self, done: int) -> Path:
        soundness.check(self.run.players, done)
        began = time.perf_counter()
        self.folder.settle("log.jsonl", "evals.jsonl")
        path = checkpoint.save(self.folder.checkpoints, done, self.run.players, self.run.objective)
        if processes.leads():
            checkpoint.prune(path, self.run.config.save.keep, self.best.step)
        self.saving = max(self.saving, time.perf_counter() - began)
        self.warn_of_grace()
        return path

    def warn_of_grace(self) -> None:
        """Once, where a step and its checkpoint take longer than a run that is asked to stop may take."""
        grace = self.run.config.save.grace
        if self.longest + self.saving > grace and not self.warned and processes.leads():
            self.warned = True
            self.bar.write(
                f"a step has taken {self.longest:.1f} s and a checkpoint {self.saving:.1f} s, together more than "
                f"save.grace={grace:g}: a machine that is taken away sooner loses the work since the last checkpoint"
            )


# What may change when a run is resumed: how long and how it learns, what is looked at, how networks are executed; not
# what is learned.
_EXECUTION = ("model.attention", "model.precision", "model.checkpointing", "model.compile", "model.roles")
_CHANGEABLE = (
    "steps",
    "micro_batches",
    "device",
    "timeout",
    "players.",
    "evals.",
    "save.",
    "data.workers",
    "data.prepared",
    *_EXECUTION,
)


def check_resumed(config: Config, root: Path) -> None:
    """Says what has changed since the run in `root` was started. Raises UserError for what must not."""
    stored = root / "config.yaml"
    if not stored.is_file():
        return
    reading.settings(stored)  # what cannot be read is named
    changed = differences(reading.text(stored), to_yaml(config))
    fixed = _followed(stored, config)
    if wrong := [said for key, said in changed.items() if not key.startswith(_CHANGEABLE) or fixed(key)]:
        raise UserError(
            f"the run in {root} was started with other settings ({'; '.join(wrong)}): resume it with its own, or start "
            "a new run"
        )
    if changed and processes.leads():
        print(f"resumed with changes: {'; '.join(changed.values())}")


def _followed(stored: Path, config: Config) -> Callable[[str], bool]:
    """Whether a key of a player says which tensors a checkpoint has of it: its LoRA, and whether it has an average."""
    before = reading.settings(stored).get("players")

    def fixed(key: str) -> bool:
        room, _, rest = key.partition(".")
        name, _, what = rest.partition(".")
        if room != "players" or what != "ema":
            return room == "players" and what.startswith("lora")
        old = before.get(name, {}) if isinstance(before, dict) else {}
        had = bool(old.get("ema")) if isinstance(old, dict) else False
        return name not in config.players or had != bool(config.players[name].ema)

    return fixed


def check_batch(config: Config) -> None:
    """Raises UserError, in all processes alike, for a batch that they cannot share out."""
    group = objectives.find(config.objective.name).Objective.group  # type: ignore[attr-defined]
    try:
        processes.share(torch.arange(config.batch), config.micro_batches * group)
    except UserError as error:
        raise SaidOnce(str(error)) from None


def play_stage(config: Config, root: Path, previous: Path | None, resume: Path | None, interrupts: Interrupts) -> Run:
    """Trains one stage in the folder `root`, from the checkpoint `resume` where given. Raises Stopped if asked to."""
    check_resumed(config, root)
    for origin in (*sorted(root.parent.glob("stage_*/origin.json")), root / "origin.json"):
        hub.pin_as_recorded(origin)
    with interrupts.leaving():
        run, folder, hooks = set_up(config, root, previous)
        done = 0 if resume is None else checkpoint.load(resume, run.players, run.objective)
    cut = {name: folder.truncate(name, done) for name in ("log.jsonl", "evals.jsonl")}
    folder.write_origin(to_yaml(config), teacher_of(config), walked(run))
    if processes.leads():
        tell_skipped(getattr(run.source, "skipped", {}), root)
    training = Training(run, folder, done, interrupts, hooks)
    if resume is not None or any(cut.values()):
        training.resumed(done, cut)
    try:
        if done:
            training.make_up(done)
        if not processes.either(interrupts.asked is not None):
            train(run.objective, building.batches(run), run.players, range(done, config.steps), training.after)
    except NonFinite as error:
        training.stopped(str(error))
        raise UserError(f"{error}; {_good(folder)}") from None
    finally:
        training.bar.close()
    if processes.either(interrupts.asked is not None):
        raise Stopped
    return run


def set_up(config: Config, root: Path, previous: Path | None) -> tuple[Run, RunDir, Hooks]:
    """A stage with all that it reads, and its folder."""
    run = (building if processes.size() == 1 else sharded).build(config, previous)
    hooks = Hooks(run)
    if processes.leads():
        print("\n".join(building.executed(run)))
    folder = RunDir(root)
    folder.create()
    building.prepare(run, root, previous)
    return run, folder, hooks


def teacher_of(config: Config) -> dict[str, Any]:
    """Where the teacher is from, and of what is on the hub the commit: names there can move."""
    model = config.model
    return {
        "source": model.teacher,
        "revision": model.revision,
        "commit": loading.commit_of(model.teacher, model.revision),
        "lora": model.lora,
        "lora_scale": model.lora_scale,
        "lora_commit": loading.commit_of(model.lora),
        "beside": {source: commit for source in _beside(config) if (commit := loading.commit_of(source))},
    }


def _beside(config: Config) -> list[str]:
    """From where networks other than the teacher start, but for earlier stages."""
    named = [*config.start.values(), getattr(config.objective, "target_teacher", None)]
    return [source for source in named if source and source != "teacher" and not source.startswith("previous.")]


def walked(run: Run) -> dict[str, Any]:
    """How the student walks in training: what `fewstep doctor` holds beside the export."""
    model = run.config.model
    times = [[step.told, step.level] for step in run.rollout.steps]
    return {"steps": model.steps, "shift": model.shift, "transition": model.transition, "times": times}


def tell_skipped(skipped: Mapping[str, list[Path]], root: Path) -> None:
    """Says what of the data is left out and why: the first of each kind here, all of them in `root`/skipped.txt."""
    listed = root / "skipped.txt"
    for why, files in skipped.items():
        more = f" and {len(files) - 5} more, see {listed}" if len(files) > 5 else ""
        print(f"files {why} ({len(files)}): {', '.join(reading.shown(str(p), 300) for p in files[:5])}{more}")
    if skipped:
        write_text(
            listed, "".join(f"{reading.shown(str(file))}: {why}\n" for why, files in skipped.items() for file in files)
        )


def _good(folder: RunDir) -> str:
    sound = checkpoint.newest_sound(folder.checkpoints)
    return f"the last good checkpoint is {sound}" if sound else "no checkpoint had been written yet"


def play(
    configs: list[Config],
    root: Path,
    resume: Path | None,
    finish: Callable[[Run, RunDir], None],
    interrupts: Interrupts | None = None,
) -> None:
    """Plays all stages. `resume` names a checkpoint; stages before its own are taken as done.

    A run of several stages has one sub-folder a stage; `finish` measures and exports the last one's generator and
    leaves table, export and report in the folder of the run. Of several processes the leader alone finishes.
    Raises Stopped where it is asked to stop, UserError where the folder cannot be written.
    """
    try:
        _play(configs, root, resume, finish, interrupts or Interrupts())
    except BrokenPipeError:
        raise
    except checkpoint.Damaged as error:
        if root.is_dir():
            raise
        raise unwritten(OSError(str(error)), root) from None
    except OSError as error:
        raise unwritten(error, root) from None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def unwritten(error: OSError, root: Path) -> UserError:
    """The sentence for a file that could not be written or read while a run went on in `root`."""
    if not root.is_dir():
        return UserError(f"the run folder {root} has gone while the run went on: put it back, or start a new run")
    what, reason = error.filename or root, error.strerror or str(error).splitlines()[0]
    full = error.errno in _FULL
    done, remedy = ("written", "make room") if full else ("written or read", "see to that")
    found = [checkpoint.newest_sound(place / "checkpoints") for place in (root, *stages_in(root))]
    sound = [path for path in found if path is not None]
    good = f"the last good checkpoint is {sound[-1]}" if sound else "no checkpoint had been written yet"
    return UserError(f"{what} could not be {done} ({reason}): {remedy} and continue with --resume {root}; {good}")


def stages_in(root: Path) -> list[Path]:
    """The folders of the stages of a run, in their order."""
    return sorted(root.glob("stage_*"), key=lambda p: (len(p.name), p.name))


def _play(
    configs: list[Config],
    root: Path,
    resume: Path | None,
    finish: Callable[[Run, RunDir], None],
    interrupts: Interrupts,
) -> None:
    processes.refuse_differences("---\n".join(to_yaml(config) for config in configs))
    for config in configs:
        check_batch(config)
    if processes.leads():
        checkpoint.tidy(root)
    torch.manual_seed(configs[0].seed)
    previous: Path | None = None
    run: Run | None = None
    for i, config in enumerate(configs):
        place = root if len(configs) == 1 else root / f"stage_{i + 1}"
        here = resume if resume is not None and resume.parent.parent == place else None
        if here is not None and processes.leads():
            _go_back(here, [root / f"stage_{later}" for later in range(i + 2, len(configs) + 1)])
        finished = checkpoint.available(place / "checkpoints")
        if here is None and finished and int(finished[-1].name) >= config.steps and i + 1 < len(configs):
            previous = place
            continue
        run = None  # the stage before would stay in memory beside this one
        run = play_stage(config, place, previous, here, interrupts)
        previous = place
    if processes.size() > 1:
        run = None  # what finishing needs would not fit beside it
        let_go()
    if processes.leads():
        with interrupts.leaving(alone=True):
            finish(run or load_run(place, last=False), RunDir(root))


def _go_back(here: Path, later: Sequence[Path]) -> None:
    """Removes the checkpoints of the stages after that of `here`, if it is sound: they stand on what it replaces."""
    checkpoint.verify(here)
    for stage in reversed(later):
        for path in reversed(checkpoint.available(stage / "checkpoints")):
            checkpoint.discard(path)


def let_go() -> None:
    """Frees what nobody holds any more: sharded networks point at themselves."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def resume_point(where: Path, name: str) -> tuple[Path, Path | None]:
    """(run folder, checkpoint) for a run folder, a checkpoint, or a folder of runs whose newest `name` is meant.

    The checkpoint is None where a run was stopped before its first one: it begins anew in its folder.
    Raises UserError when there is nothing to resume.
    """
    if where.parent.name == "checkpoints" and where.is_dir():
        root = where.parent.parent
        return (root.parent if root.name.startswith("stage_") else root), where
    stages = [where, *stages_in(where)]
    saved = [checkpoint.available(stage / "checkpoints") for stage in stages]
    if found := [paths[-1] for paths in saved if paths]:
        return where, found[-1]
    if any((stage / "checkpoints").is_dir() for stage in stages):
        return where, None
    runs = sorted((p for p in where.glob(f"*_{name}*") if p.is_dir()), key=lambda p: p.stat().st_mtime)
    if runs:
        return resume_point(runs[-1], name)
    raise UserError(f"there is nothing to resume in {where}: give a run folder, or start without --resume")

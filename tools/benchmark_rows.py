"""One row of a comparison: an objective trained for a number of network passes, then measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fewstep import build, measure
from fewstep.config import Config
from fewstep.core.errors import UserError
from fewstep.models.backbone import Backbone
from fewstep.models.bank import Bank
from fewstep.models.passes import PassCounter, networks_of
from fewstep.rollout import Rollout, TransitionName
from fewstep.train import checkpoint
from fewstep.train.loop import train


def train_stage(stage: Config, budget: int, root: Path, previous: Path | None) -> tuple[build.Run, dict[str, float]]:
    """Trains until `budget` passes are spent, making pairs included; returns the run and what it cost."""
    run = build.build(stage, previous)
    counter = PassCounter(networks_of(run.triad.generator, run.triad.real_score, run.triad.fake_score))
    began = time.process_time()
    build.prepare(run, root, previous)
    spent: dict[str, float] = {"images": 0.0}

    def after(step: int, logs: dict[str, float]) -> bool:
        spent["images"] += stage.batch
        return counter.total >= budget

    train(run.objective, build.batches(run), run.players, range(stage.steps), after)
    checkpoint.save(root / "checkpoints", 1, run.players, run.objective)
    counter.close()
    return run, {**spent, "passes": counter.total, "stopped": counter.stopped, "seconds": time.process_time() - began}


FEWER = 2_500
"""images measured at other numbers of steps than the student's own"""


def train_row(
    name: str, stages: Sequence[Config], passes: int, samples: int, others: Sequence[int] = ()
) -> dict[str, Any]:
    """The measures of the student that `passes`, shared out evenly to the stages, have made; `training` is the cost.

    `by_steps` has some of them at `others` too, numbers of steps that the same student is walked in.
    """
    cost: dict[str, float] = {}
    previous: Path | None = None
    with tempfile.TemporaryDirectory() as temporary:
        for i, stage in enumerate(stages):
            root = Path(temporary) / f"stage_{i + 1}"
            root.mkdir()
            left = passes - cost.get("passes", 0)
            run, spent = train_stage(stage, int(left / (len(stages) - i)), root, previous)
            cost = {k: cost.get(k, 0) + v for k, v in spent.items()}
            previous = root
    net, rollout = measure.student(run)
    row = measure.measure(name, run, net, rollout, measure.truth_of(run.source), samples)
    return {**row, "training": cost, **({"by_steps": by_steps(run, [*others, len(rollout)])} if others else {})}


def by_steps(run: build.Run, numbers: Sequence[int]) -> dict[str, dict[str, float]]:
    """Steps -> Frechet distance and coverage of FEWER images of one student; numbers that it refuses are left out."""
    found, (net, _) = {}, measure.student(run)
    for steps in sorted(numbers):
        with suppress(UserError):
            found[str(steps)] = fewer(run, net, measure.walked(run, steps))
    return found


def fewer(run: build.Run, net: Backbone, rollout: Rollout) -> dict[str, float]:
    row = measure.measure("", run, net, rollout, measure.truth_of(run.source), FEWER)
    return {key: row[key] for key in ("frechet", "coverage")}


def bank_row(name: str, first: Config, parts: Sequence[Config], passes: int, samples: int) -> dict[str, Any]:
    """The measures of a bank: half of `passes` for the stage that all students start from, the rest to its `parts`."""
    students = []
    with tempfile.TemporaryDirectory() as temporary:
        common = Path(temporary) / "common"
        common.mkdir()
        _, cost = train_stage(first, passes // 2, common, None)
        for part in parts:
            root = Path(temporary) / f"part_{part.objective.part}"  # type: ignore[attr-defined]
            root.mkdir()
            run, spent = train_stage(part, passes // 2 // len(parts), root, common)
            cost = {k: cost.get(k, 0) + v for k, v in spent.items()}
            students.append(run.evaluated())
    bank = Bank(students, run.objective.partition)  # type: ignore[attr-defined]
    row = measure.measure(name, run, bank, run.rollout, measure.truth_of(run.source), samples)
    return {**row, "training": cost}


def untrained_row(
    name: str, stage: Config, steps: int, samples: int, how: TransitionName = "ode", others: Sequence[int] = ()
) -> dict[str, Any]:
    """The measures of the teacher of `stage` itself, at `steps` steps, some of them at `others` too."""
    run = build.build(stage)
    net, rollout = measure.teacher(run, steps, how)
    stored = measure.stored_row(run, samples) if steps == measure.TEACHER_STEPS else None
    row = stored or measure.measure(name, run, net, rollout, measure.truth_of(run.source), samples)
    walks = {str(n): measure.teacher(run, n, how)[1] for n in sorted([*others, steps])} if others else {}
    return {**row, **({"by_steps": {n: fewer(run, net, walk) for n, walk in walks.items()}} if walks else {})}

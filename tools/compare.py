"""The five objectives from both built-in teachers, 1 and 4 steps, at equal network passes: table and plot.

    python tools/compare.py [--passes 80000] [--samples 10000] [--teachers scenes-flow] [--only dmd2 ...] [--steps 4]

A pass is one sample through one network, forwards or backwards; making pairs counts, measuring does not. Finished
rows are kept in assets/benchmarks/compare.json, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fewstep import build, config, measure
from fewstep.config import Config
from fewstep.models.passes import PassCounter, networks_of
from fewstep.train import checkpoint
from fewstep.train.loop import train

OBJECTIVES = ("dmd", "dmd2", "phased_dmd", "consistency", "rectified_flow")
TEACHERS = ("scenes-flow", "scenes-vp")
RESULT = Path("assets/benchmarks/compare.json")
COLOURS = {
    "dmd": "#0072B2",
    "dmd2": "#D55E00",
    "phased_dmd": "#009E73",
    "consistency": "#CC79A7",
    "rectified_flow": "#E69F00",
    "undistilled": "#777777",
}


def configs_of(objective: str, teacher: str, steps: int) -> list[Config]:
    """The config of an objective at 1 or 4 steps; only the teacher's line differs between teachers."""
    several = "" if steps == 1 else "_four_steps"
    overrides = [f"model.teacher=assets/teachers/{teacher}", "steps=1000000"]
    return config.load(f"configs/scenes/{objective}{several}.yaml", overrides)


def train_stage(stage: Config, budget: int, root: Path, previous: Path | None) -> tuple[build.Run, dict[str, float]]:
    """Trains until `budget` passes are spent; returns the run and what it cost."""
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


def one(objective: str, teacher: str, steps: int, passes: int, samples: int) -> dict[str, Any]:
    stages = configs_of(objective, teacher, steps)
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
    row = measure.measure(objective, run, net, rollout, measure.truth_of(run.source), samples)
    return {"objective": objective, "teacher": teacher, "steps": steps, **row, "training": cost}


def baselines(teacher: str, steps: int, samples: int) -> dict[str, Any]:
    """The undistilled teacher at the student's step count."""
    run = build.build(configs_of("dmd2", teacher, steps)[0])
    net, rollout = measure.teacher(run, steps)
    row = measure.measure("undistilled", run, net, rollout, measure.truth_of(run.source), samples)
    return {"objective": "undistilled", "teacher": teacher, "steps": steps, **row}


def load() -> dict[str, Any]:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}


def store(row: dict[str, Any], passes: int, samples: int) -> None:
    """Adds one row to what is there by now, so that two comparisons may run side by side."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record = load()
    record |= {"commit": commit, "date": f"{date.today():%Y-%m-%d}", "passes": passes, "samples": samples}
    record["hardware"] = f"CPU, {torch.get_num_threads()} thread(s)"
    record["rows"].append(row)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


def plot(rows: list[dict[str, Any]], samples: int, target: Path) -> None:
    """Quality against diversity: Frechet distance (log) over same-label diversity, one panel a teacher."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(TEACHERS), figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, teacher in zip(axes, TEACHERS, strict=True):
        for row in (r for r in rows if r["teacher"] == teacher):
            name, marker = row["objective"], "o" if row["steps"] == 1 else "s"
            axis.scatter(row["diversity"], row["frechet"], color=COLOURS[name], marker=marker, s=70, alpha=0.85)
        record = json.loads(Path(f"assets/teachers/{teacher}/evals.json").read_text())
        # A teacher without a row at this sample count gets no star: distances of other counts do not compare.
        if many := record["rows"].get(str(samples)):
            axis.scatter(many["diversity"], many["frechet"], color="black", marker="*", s=150)
        axis.set(title=f"assets/teachers/{teacher}", xlabel="same-label diversity (truth = 1)", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("Frechet distance to truth (lower is better)")
    dot = lambda marker, colour: pyplot.Line2D([], [], marker=marker, color=colour, linestyle="", markersize=8)
    kinds = {name: dot("o", colour) for name, colour in COLOURS.items()}
    kinds |= {"1 step": dot("o", "white"), "4 steps": dot("s", "white"), "teacher, 50 steps": dot("*", "black")}
    for name in ("1 step", "4 steps"):
        kinds[name].set_markeredgecolor("black")
    figure.legend(kinds.values(), kinds.keys(), loc="outside right center", frameon=False)
    figure.savefig(target, dpi=130)


def show(rows: list[dict[str, Any]]) -> None:
    keys = ("frechet", "label_accuracy", "coverage", "recall", "law_distance", "diversity")
    heads = [*keys, "rare", "passes", "images", "cpu s"]
    print(f"{'objective':15} {'teacher':12} {'steps':>5} " + " ".join(f"{k:>14}" for k in heads))
    for row in rows:
        cost = row.get("training", {})
        values = [f"{row[k]:14.3f}" for k in keys] + [f"{row['rare_kept']:>14}"]
        values += [f"{cost.get(k, 0):14.0f}" for k in ("passes", "images", "seconds")]
        print(f"{row['objective']:15} {row['teacher']:12} {row['steps']:5} " + " ".join(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--passes", type=int, default=80_000)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--only", nargs="+", choices=("undistilled", *OBJECTIVES), default=["undistilled", *OBJECTIVES])
    parser.add_argument("--steps", nargs="+", type=int, choices=(1, 4), default=[1, 4])
    args = parser.parse_args()
    wanted = [
        (objective, teacher, steps) for steps in args.steps for teacher in args.teachers for objective in args.only
    ]
    for objective, teacher, steps in wanted:
        if any((r["objective"], r["teacher"], r["steps"]) == (objective, teacher, steps) for r in load()["rows"]):
            continue
        if objective == "undistilled":
            row = baselines(teacher, steps, args.samples)
        else:
            row = one(objective, teacher, steps, args.passes, args.samples)
        row.pop("rare", None)
        store(row, args.passes, args.samples)
        show([row])
    rows = load()["rows"]
    show(rows)
    plot(rows, args.samples, RESULT.with_suffix(".png"))


if __name__ == "__main__":
    main()

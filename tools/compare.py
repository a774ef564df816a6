"""The five objectives from the built-in teachers, 1 and 4 steps, at equal network passes: table and plot.

    python tools/compare.py [scenes | t2i] [--passes N] [--samples N] [--teachers scenes-flow] [--only dmd2] [--steps 4]

`scenes` are the two class-conditional teachers of pixels, `t2i` is the text-to-image teacher, with adapters too. A pass
is one sample through one network, forwards or backwards; making pairs counts, measuring does not. Finished rows are
kept under assets/benchmarks, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmark_rows import train_row, untrained_row

from fewstep import config, measure
from fewstep.config import Config

OBJECTIVES = ("dmd", "dmd2", "phased_dmd", "consistency", "rectified_flow")


@dataclass(frozen=True)
class Board:
    """What is compared: the configs in a folder, from some teachers, at a cost, and where the rows are kept."""

    configs: Path
    teachers: tuple[str, ...]
    names: tuple[str, ...]
    passes: int
    samples: int
    diversity: str
    """the column of the plot"""
    shown: tuple[str, ...]
    result: Path


BOARDS = {
    "scenes": Board(
        configs=Path("configs/scenes"),
        teachers=("scenes-flow", "scenes-vp"),
        names=OBJECTIVES,
        passes=80_000,
        samples=10_000,
        diversity="diversity",
        shown=("frechet", "label_accuracy", "coverage", "recall", "law_distance", "diversity"),
        result=Path("assets/benchmarks/compare.json"),
    ),
    "t2i": Board(
        configs=Path("configs/t2i"),
        teachers=("scenes-t2i",),
        names=(*OBJECTIVES, "dmd2_lora", "consistency_lora"),
        passes=30_000,
        samples=1_000,
        diversity="prompt_diversity",
        shown=("frechet", "caption_accuracy", "one_object", "two_objects", "coverage", "prompt_diversity"),
        result=Path("assets/benchmarks/compare_t2i.json"),
    ),
}
COLOURS = {
    "dmd": "#0072B2",
    "dmd2": "#D55E00",
    "phased_dmd": "#009E73",
    "consistency": "#CC79A7",
    "rectified_flow": "#E69F00",
    "dmd2_lora": "#F0B48C",
    "consistency_lora": "#E8C4DA",
    "undistilled": "#777777",
    "teacher": "#000000",
}


def configs_of(board: Board, name: str, teacher: str, steps: int) -> list[Config]:
    """The config of a name at 1 or 4 steps; only the teacher's line differs between teachers."""
    several = "" if steps == 1 else "_four_steps"
    overrides = [f"model.teacher=assets/teachers/{teacher}", "steps=1000000"]
    return config.load(board.configs / f"{name}{several}.yaml", overrides)


def one(board: Board, name: str, teacher: str, steps: int, passes: int, samples: int) -> dict[str, Any]:
    row = train_row(name, configs_of(board, name, teacher, steps), passes, samples)
    return {"objective": name, "teacher": teacher, "steps": steps, **row}


def undistilled(board: Board, name: str, teacher: str, steps: int, samples: int) -> dict[str, Any]:
    """The teacher itself, at the student's step count or at many."""
    row = untrained_row(name, configs_of(board, "dmd2", teacher, 1)[0], steps, samples)
    return {"objective": name, "teacher": teacher, "steps": steps, **row}


def load(result: Path) -> dict[str, Any]:
    return json.loads(result.read_text()) if result.exists() else {"rows": []}


def store(result: Path, row: dict[str, Any], passes: int, samples: int) -> None:
    """Adds one row to what is there by now, so that two comparisons may run side by side; it knows its commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record = load(result)
    record |= {"passes": passes, "samples": samples, "hardware": f"CPU, {torch.get_num_threads()} thread(s)"}
    record["rows"].append({**row, "commit": commit, "date": f"{date.today():%Y-%m-%d}"})
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(record, indent=1) + "\n")


def plot(board: Board, rows: list[dict[str, Any]]) -> None:
    """Quality against diversity: Frechet distance (log) over same-condition diversity, one panel a teacher."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(board.teachers)
    figure, grid = pyplot.subplots(
        1, count, figsize=(3 + 4 * count, 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    markers = {1: "o", 4: "s", measure.TEACHER_STEPS: "*"}
    for axis, teacher in zip(grid[0], board.teachers, strict=True):
        for row in (r for r in rows if r["teacher"] == teacher):
            style = {"color": COLOURS[row["objective"]], "marker": markers[row["steps"]], "s": 80, "alpha": 0.85}
            axis.scatter(row[board.diversity], row["frechet"], **style)
        label = f"{board.diversity.replace('_', ' ')} (truth = 1)"
        axis.set(title=f"assets/teachers/{teacher}", xlabel=label, yscale="log")
        axis.grid(alpha=0.3)
    grid[0, 0].set_ylabel("Frechet distance to truth (lower is better)")
    dot = lambda marker, colour: pyplot.Line2D([], [], marker=marker, color=colour, linestyle="", markersize=8)
    kinds = {name: dot("o", COLOURS[name]) for name in (*board.names, "undistilled")}
    kinds |= {"1 step": dot("o", "white"), "4 steps": dot("s", "white"), "teacher, 50 steps": dot("*", "black")}
    for name in ("1 step", "4 steps"):
        kinds[name].set_markeredgecolor("black")
    figure.legend(kinds.values(), kinds.keys(), loc="outside right center", frameon=False)
    figure.savefig(board.result.with_suffix(".png"), dpi=130)


def show(board: Board, rows: list[dict[str, Any]]) -> None:
    heads = [*board.shown, "passes", "images", "cpu s"]
    print(f"{'objective':16} {'teacher':12} {'steps':>5} " + " ".join(f"{k:>16}" for k in heads))
    for row in rows:
        cost = row.get("training", {})
        values = [f"{row[k]:16.3f}" for k in board.shown]
        values += [f"{cost.get(k, 0):16.0f}" for k in ("passes", "images", "seconds")]
        print(f"{row['objective']:16} {row['teacher']:12} {row['steps']:5} " + " ".join(values))


def wanted(board: Board, only: list[str], teachers: list[str], steps: list[int]) -> list[tuple[str, str, int]]:
    """Name, teacher and steps of every row; the teacher's own has many."""
    chosen = [t for t in board.teachers if t in teachers] if teachers else list(board.teachers)
    names = [n for n in ("undistilled", *board.names) if not only or n in only]
    many = [("teacher", t, measure.TEACHER_STEPS) for t in chosen if not only or "teacher" in only]
    return [*many, *((name, teacher, count) for count in steps for teacher in chosen for name in names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("board", nargs="?", choices=tuple(BOARDS), default="scenes")
    parser.add_argument("--passes", type=int, help="the budget of a row; default: the board's")
    parser.add_argument("--samples", type=int, help="images measured for a row; default: the board's")
    names = {"teacher", "undistilled"} | {name for board in BOARDS.values() for name in board.names}
    parser.add_argument(
        "--teachers", nargs="+", default=[], choices=sorted(t for b in BOARDS.values() for t in b.teachers)
    )
    parser.add_argument("--only", nargs="+", default=[], choices=sorted(names))
    parser.add_argument("--steps", nargs="+", type=int, choices=(1, 4), default=[1, 4])
    args = parser.parse_args()
    board = BOARDS[args.board]
    passes, samples = args.passes or board.passes, args.samples or board.samples
    for name, teacher, steps in wanted(board, args.only, args.teachers, args.steps):
        done = load(board.result)["rows"]
        if any((r["objective"], r["teacher"], r["steps"]) == (name, teacher, steps) for r in done):
            continue
        if name in ("teacher", "undistilled"):
            row = undistilled(board, name, teacher, steps, samples)
        else:
            row = one(board, name, teacher, steps, passes, samples)
        row.pop("rare", None)
        store(board.result, row, passes, samples)
        show(board, [row])
    rows = load(board.result)["rows"]
    show(board, rows)
    plot(board, rows)


if __name__ == "__main__":
    main()

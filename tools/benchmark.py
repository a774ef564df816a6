"""Any set of objectives from one teacher, one start, one budget of network passes and the same seeds: table and plots.

    python tools/benchmark.py BOARD [--only NAME ...] [--configs FILE ...] [--seeds 0 1 2] [--jobs 2] [--again]

A board is a folder under assets/benchmarks: rows.jsonl, a line for each row and seed, table.md and plots. A row takes
a few minutes of one core and is kept under two hashes, of its config with the budget and of the code of its objective,
as soon as it is measured: the same command goes on with what is missing, and with `--again` also with rows of other
code. `--show` only draws again. A pass is one sample through one network, forwards or backwards; making pairs counts,
measuring does not.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import benchmark_plots
import torch
from benchmark_rows import bank_row, train_row, untrained_row
from tqdm import tqdm

from fewstep import config, measure
from fewstep.core.errors import UserError
from fewstep.rollout import TransitionName

RESULTS = Path("assets/benchmarks")
PASSES, SAMPLES = 80_000, 10_000
METHODS = (
    "dmd",
    "dmd2",
    "phased_dmd",
    "diff_instruct",
    "swiftbrush",
    "snoopi",
    "sid",
    "sida",
    "f_distill",
    "decoupled_dmd",
    "re_dmd",
    "uni_dad",
    "msd",
    "flash_dmd",
    "disback",
    "ac_dmd",
    "twinflow",
    "ladd",
    "tdm",
    "tmd",
)
MAPS = (
    "consistency",
    "ict",
    "ect",
    "tcm",
    "lcm",
    "lcm_lora",
    "tcd",
    "tscd",
    "pcm",
    "ctm",
    "scm",
    "rcm",
    "sana_sprint",
    "tbcm",
    "meanflow",
    "align_your_flow",
    "shortcut",
    "freeflow",
    "boot",
    "imm",
    "mdt_dist",
    "rectified_flow",
    "instaflow",
    "rf_plus_plus",
    "slimflow",
    "perflow",
    "progressive",
    "arcflow",
)
"""Methods that learn the teacher's trajectory; those of several steps are also measured at 1, 2 and 8."""
BOARDS = {"scenes": tuple(f"configs/scenes/{name}.yaml" for name in (*METHODS, *MAPS))}
"""Board -> the configs of its rows; a config of four steps lies beside that of one where the method has several."""
OTHERS = (1, 2, 8)
"""numbers of steps in which students of four, and the generator they began as, are walked too"""
BASELINES: dict[str, tuple[int, TransitionName]] = {
    "teacher": (measure.TEACHER_STEPS, "ode"),
    "undistilled": (1, "ode"),
    "undistilled_four_steps": (4, "ode"),
    "undistilled_four_steps_renoise": (4, "renoise"),
}
"""Rows without training: steps and what leads from one to the next. Students that renoise start from the last one."""


Budget = tuple[int, int]
"""Network passes of the training, and images measured."""


@dataclass(frozen=True)
class Entry:
    """A row that is wanted: a config file, or one of BASELINES, and a seed."""

    name: str
    file: str | None
    seed: int

    def stages(self, *overrides: str) -> list[config.Config]:
        told = [f"seed={self.seed}", "steps=1000000", *overrides]
        return config.load(self.file or "configs/scenes/dmd2.yaml", told)

    def settings(self, budget: Budget) -> str:
        """The hash of the config, the seed and the budget."""
        stages = [asdict(stage) for stage in self.stages()]
        return digest([self.name, self.seed, stages, budget])

    def code(self) -> str:
        """The hash of the code of its objectives."""
        names = {stage.objective.name for stage in self.stages()}  # type: ignore[attr-defined]
        return digest(sorted(code_of(f"fewstep.objectives.{name}") for name in names))

    def row(self, passes: int, samples: int) -> dict[str, Any]:
        stages = self.stages()
        if self.file is None:
            steps, how = BASELINES[self.name]
            others = OTHERS if steps == 4 else ()
            return {"steps": steps, **untrained_row(self.name, stages[0], steps, samples, how, others)}
        steps, parts = stages[-1].model.steps, getattr(stages[-1].objective, "parts", 1)
        if parts > 1:
            bank = [self.stages(f"stage_2.objective.part={part + 1}")[1] for part in range(parts)]
            return {"steps": steps, **bank_row(self.name, stages[0], bank, passes, samples)}
        others = OTHERS if self.name.removesuffix("_four_steps") in MAPS and steps > 1 else ()
        return {"steps": steps, **train_row(self.name, stages, passes, samples, others)}


def digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def code_of(module: str) -> str:
    """The hash of a module's source and of all that it imports from fewstep, directly or not."""
    seen: dict[str, str] = {}

    def look(name: str) -> None:
        spec = importlib.util.find_spec(name) if name not in seen else None
        if spec is None or spec.origin is None:
            return
        tree = ast.parse(Path(spec.origin).read_text())
        seen[name] = digest(ast.dump(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fewstep"):
                package = importlib.util.find_spec(node.module or "")
                look(node.module or "")
                for alias in node.names if package and package.submodule_search_locations else ():
                    look(f"{node.module}.{alias.name}")

    look(module)
    return digest(sorted(seen.items()))


def entries(board: str, files: list[str], only: list[str], seeds: list[int]) -> list[Entry]:
    """The baselines once, then every config for every seed, all of one seed first."""
    found = []
    for file in files or BOARDS.get(board, ()):
        several = Path(file).with_name(f"{Path(file).stem}_four_steps.yaml")
        found += [file, str(several)] if not files and several.exists() else [file]
    if not found:
        raise UserError(f"the board {board} has no configs of its own: name them by --configs")
    named = [(name, None, 0) for name in BASELINES]
    named += [(Path(file).stem, file, seed) for seed in seeds for file in found]
    return [Entry(*one) for one in named if not only or one[0] in only]


def load(folder: Path) -> list[dict[str, Any]]:
    file = folder / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def keep(folder: Path, entry: Entry, row: dict[str, Any], budget: Budget) -> None:
    """Adds a line; an older one of the same name and seed, of other code or settings, gives way to it."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    row = {**row, "name": entry.name, "seed": entry.seed, "budget": budget[0], "commit": commit}
    row |= {"settings": entry.settings(budget), "code": entry.code()}
    row |= {"date": f"{date.today():%Y-%m-%d}", "hardware": f"CPU, {torch.get_num_threads()} thread(s)"}
    row.pop("rare", None)
    folder.mkdir(parents=True, exist_ok=True)
    others = [old for old in load(folder) if (old["name"], old["seed"]) != (entry.name, entry.seed)]
    aside = folder / "rows.jsonl.partial"
    aside.write_text("".join(json.dumps(line) + "\n" for line in [*others, row]))
    os.replace(aside, folder / "rows.jsonl")


def alone(board: str, entry: Entry, budget: Budget) -> subprocess.CompletedProcess[str]:
    """The row by a process of its own with one thread; its last line is the row."""
    command = [sys.executable, __file__, board, "--row", json.dumps([*asdict(entry).values(), *budget])]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def missing(folder: Path, wanted: list[Entry], budget: Budget, again: bool) -> list[Entry]:
    """Those that have no row yet; with `again` also those whose row was made by other code."""
    known = {row["settings"]: row["code"] for row in load(folder)}
    found = {entry: known.get(entry.settings(budget)) for entry in wanted}
    older = [entry for entry, code in found.items() if code not in (None, entry.code())]
    left = [entry for entry, code in found.items() if code is None or (again and entry in older)]
    told = f", {len(older)} of them by other code (--again makes them again)" if older and not again else ""
    print(f"{len(wanted) - len(left)} of {len(wanted)} rows are there{told}", flush=True)
    return left


def run_all(board: str, left: list[Entry], budget: Budget, jobs: int, commit: bool) -> None:
    """Makes the rows, `jobs` at a time. Raises UserError for those that could not be made, at the end."""
    folder, failed = RESULTS / board, []
    with ThreadPoolExecutor(jobs) as pool:
        at_work = {pool.submit(alone, board, entry, budget): entry for entry in left}
        for made in tqdm(as_completed(at_work), total=len(left), unit="row", dynamic_ncols=True):
            entry, done = at_work[made], made.result()
            if done.returncode:
                failed.append(f"{entry.name}, seed {entry.seed} ({done.stderr.splitlines()[-1]})")
                continue
            keep(folder, entry, json.loads(done.stdout.splitlines()[-1]), budget)
            if commit:
                said = f"Benchmark {board}: {entry.name}, seed {entry.seed}"
                subprocess.run(["git", "add", str(folder)], check=True)
                subprocess.run(["git", "commit", "-qm", said, str(folder)], check=True)
    if failed:
        raise UserError(f"no row came of {'; '.join(failed)}: the others are kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("board", help=f"a folder under {RESULTS}: {', '.join(BOARDS)}, or a new one with --configs")
    parser.add_argument("--configs", nargs="+", default=[], help="config files; default: those of the board")
    parser.add_argument("--only", nargs="+", default=[], help="names of rows; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--passes", type=int, default=PASSES, help="the budget of a row")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="images measured for a row")
    parser.add_argument("--jobs", type=int, default=1, help="rows made at once, each on one core")
    parser.add_argument("--commit", action="store_true", help="commit every row as it is finished")
    parser.add_argument("--again", action="store_true", help="also rows that other code has made")
    parser.add_argument("--show", action="store_true", help="draw table and plots again, train nothing")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        name, file, seed, passes, samples = json.loads(args.row)
        torch.set_num_threads(1)
        print(json.dumps(Entry(name, file, seed).row(passes, samples)))
        return
    try:
        if not args.show:
            wanted = entries(args.board, args.configs, args.only, args.seeds)
            budget = (args.passes, args.samples)
            left = missing(RESULTS / args.board, wanted, budget, args.again)
            run_all(args.board, left, budget, args.jobs, args.commit)
    except UserError as error:
        sys.exit(f"benchmark: {error}")
    finally:
        if rows := load(RESULTS / args.board):
            benchmark_plots.write(RESULTS / args.board, rows)


if __name__ == "__main__":
    main()

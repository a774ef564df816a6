"""The table of families: what has been seen to hold for each, with the number that says how well.

    python tools/family_table.py [--only sdxl wan] [--out assets/benchmarks/families.json]

Tiny random networks, offline, on one thread; the cells are tests/family_cells.py. With --only the other rows of the
file stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from tests.family_cells import CELLS, SHARDED, Bench, two_processes
from tests.family_runs import FAMILIES


def row(bench: Bench) -> dict[str, str]:
    """Column -> figure; a cell that fails says why."""
    found = {}
    for name, cell in {**CELLS, **SHARDED}.items():
        torch.manual_seed(0)
        try:
            found[name] = cell(bench)
        except Exception as error:
            found[name] = f"FAILED: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        print(f"{bench.family}: {name}: {found[name]}", file=sys.stderr)
    return found


def markdown(rows: dict[str, dict[str, str]]) -> str:
    """One line a cell, one column a family: there are more cells than families."""
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(row.get(name, "") for row in rows.values()) + " |"
        for name in next(iter(rows.values()))
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks/families.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        two_processes(Path(folder), args.only)
        made = {family: row(Bench(family, Path(folder))) for family in args.only}
    stamp = {
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "date": f"{date.today():%Y-%m-%d}",
    }
    known = json.loads(args.out.read_text())["families"] if args.out.exists() else {}
    rows = {family: {**stamp, "cells": made[family]} if family in made else known.get(family) for family in FAMILIES}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"families": {k: v for k, v in rows.items() if v}}, indent=1) + "\n")
    print(markdown(made))
    return int(any(figure.startswith("FAILED") for cells in made.values() for figure in cells.values()))


if __name__ == "__main__":
    sys.exit(main())

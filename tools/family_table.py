"""The table of families: what has been seen to hold for each, with the number that says how well.

    python tools/family_table.py [--only sdxl wan] [--out assets/benchmarks/families.json]

Tiny random networks, offline, on one thread; the cells are tests/family_cells.py. With --only the other rows of the
file stay as they are; `--only` alone measures nothing. assets/families/README.md is written from it, and from what
`fewstep families` prints.
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
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from fewstep import families
from tests.family_cells import CELLS, SHARDED, Bench, two_processes
from tests.family_runs import FAMILIES

PAGE = Path("assets/families/README.md")
ON_GPU = ("attention flash", "attention xformers", "attention flex")
EXPLAINED = {name: cell for name, cell in {**CELLS, **SHARDED}.items() if not name.startswith("attention")}


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
    """One line a family, one column a cell; a kernel that only a GPU can show is left out."""
    columns = [name for name in [*CELLS, *SHARDED] if name not in ON_GPU]
    lines = ["| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| `{family}` | " + " | ".join(row.get(c, "") for c in columns) + " |" for family, row in rows.items()]
    return "\n".join(lines)


def page(stored: dict[str, dict[str, Any]]) -> str:
    """What stands, and what was measured of it."""
    known = [one.row() for one in families.known()]
    head = ["| " + " | ".join(known[0]) + " |", "|---" * len(known[0]) + "|"]
    body = ["| " + " | ".join(row.values()) + " |" for row in known]
    meanings = [f"- {column}: {said}" for column, said in families.MEANINGS.items()]
    cells = [f"- {name}: {' '.join((cell.__doc__ or '').split())}" for name, cell in EXPLAINED.items()]
    measured = markdown({family: row["cells"] for family, row in stored.items()})
    parts = [
        "# Families",
        "What `fewstep families` prints:",
        "\n".join(head + body),
        "\n".join(meanings),
        "## Measured",
        "Relative distances on tiny random pipelines, as `python tools/family_table.py` measures them: "
        "0 is to the last bit, and every bound is asserted by `tests/models/test_family_table.py`. "
        "Flash, xformers and flex attention want a GPU: here they are refused in a sentence.",
        measured,
        "\n".join(cells),
        "Not among them: [how to bring a family](bring_a_family.md).",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks/families.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.only:
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
    PAGE.write_text(page({family: row for family, row in rows.items() if row}))
    print(markdown(made))
    return int(any(figure.startswith("FAILED") for cells in made.values() for figure in cells.values()))


if __name__ == "__main__":
    sys.exit(main())

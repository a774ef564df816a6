"""The long part of the fault harness: `python tools/soak.py SUBJECT`, figures in assets/benchmarks/soak/SUBJECT.json.

A subject is a module of tests/faults with a function `soak(folder)`: it raises where a promise is not kept, and returns
what was tried and what was caught.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "assets" / "benchmarks" / "soak"


def subjects() -> list[str]:
    """The modules of tests/faults that have a long part."""
    files = sorted((ROOT / "tests" / "faults").glob("*.py"))
    return [file.stem for file in files if "\ndef soak(" in file.read_text()]


def commit() -> str:
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subject", choices=subjects())
    subject = parser.parse_args().subject
    sys.path.insert(0, str(ROOT))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        figures = importlib.import_module(f"tests.faults.{subject}").soak(Path(folder))
    said = {
        "commit": commit(),
        "date": f"{date.today():%Y-%m-%d}",
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / f"{subject}.json").write_text(json.dumps({**said, **figures}, indent=1) + "\n")
    print(json.dumps({**said, **figures}, indent=1))


if __name__ == "__main__":
    main()

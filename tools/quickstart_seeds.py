"""The quickstart at three seeds: mean and spread of the student beside its teacher.

    python tools/quickstart_seeds.py [--seeds 0 1 2] [--out runs/seeds]

A seed whose run folder already holds a table is not trained again. Writes assets/benchmarks/quickstart.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

SHOWN = ("frechet", "label_accuracy", "coverage", "recall", "law_distance", "diversity")
TARGETS = {"frechet": (0.025, 0.01), "label_accuracy": (0.8, 0.9), "coverage": (0.5, 0.7)}


def run_of(seed: int, out: Path) -> Path:
    """The run folder of a seed, trained now where it is not there."""
    found = sorted(out.glob(f"*_quickstart_seed{seed}*/table.json"))
    if not found:
        command = ["train", "configs/quickstart.yaml", f"seed={seed}", f"name=quickstart_seed{seed}", f"--out={out}"]
        subprocess.run([sys.executable, "-m", "fewstep.cli", *command], check=True)
        found = sorted(out.glob(f"*_quickstart_seed{seed}*/table.json"))
    return found[-1].parent


def ratios(table: dict[str, Any]) -> dict[str, float]:
    """Frechet distance over the undistilled teacher's; label accuracy and coverage over the 50-step teacher's."""
    many, few, student = table["rows"]
    against = {"frechet": few, "label_accuracy": many, "coverage": many}
    return {name: student[name] / row[name] for name, row in against.items()}


def seconds_of(run: Path) -> float:
    """Seconds of training in both stages, without making the pairs and without the measuring at the end."""
    logs = sorted(run.glob("stage_*/log.jsonl"))
    return sum(json.loads(log.read_text().splitlines()[-1])["seconds"] for log in logs)


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": round(statistics.mean(values), 4), "spread": round(max(values) - min(values), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    args = parser.parse_args()
    runs = [run_of(seed, args.out) for seed in args.seeds]
    tables = [json.loads((run / "table.json").read_text()) for run in runs]
    origin = json.loads((runs[0] / "stage_2" / "origin.json").read_text())
    result: dict[str, Any] = {
        "commit": origin["commit"],
        "date": f"{date.today():%Y-%m-%d}",
        "hardware": origin["hardware"],
        "seeds": args.seeds,
        "training_seconds": [round(seconds_of(run)) for run in runs],
        "protocol": tables[0]["protocol"],
        "teacher": {name: tables[0]["rows"][0][name] for name in SHOWN},
        "undistilled": {name: tables[0]["rows"][1][name] for name in SHOWN},
        "student": {name: spread([table["rows"][2][name] for table in tables]) for name in SHOWN},
        "ratios": {name: spread([ratios(table)[name] for table in tables]) for name in TARGETS},
    }
    target = Path("assets/benchmarks/quickstart.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("teacher", "undistilled", "student", "ratios")}, indent=1))
    for name, (must, aim) in TARGETS.items():
        print(f"{name}: {result['ratios'][name]['mean']:.3f} of the teacher's (must {must}, aim {aim})")


if __name__ == "__main__":
    main()

"""How straight paths become, round by round of reflow, and whether what they lead to is kept.

    python tools/reflow.py [--steps 600] [--samples 2000]

The stages of configs/scenes/reflow_rounds.yaml, one after the other. After each: straightness, the mean over time of
E |(z - x) - v(x_t, t)|^2 a value along the student's own paths from noise z to their end x, in 20 Euler steps; the cost
E |z - x|^2 of the transport; and the Frechet distance of its samples in 20 steps and in one.
assets/benchmarks/reflow.json has the numbers, reflow.png the curves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import trange

from fewstep import build, config, measure
from fewstep.core.draw import Draw
from fewstep.core.times import Step
from fewstep.models.backbone import Backbone
from fewstep.objectives.pieces.flow import as_flow
from fewstep.rollout import Rollout, ode
from fewstep.train import checkpoint
from fewstep.train.loop import train

RESULT = Path("assets/benchmarks/reflow.json")
CONFIG = "configs/scenes/reflow_rounds.yaml"
EULER = 20
WALK = [Step(1 - i / EULER, 1 - i / EULER) for i in range(EULER)]


@torch.no_grad()
def straightness(run: build.Run, net: Backbone, count: int = 512) -> tuple[float, float]:
    """E |(z - x) - v|^2 a value along the paths, and E |z - x|^2 a value."""
    flow, rows = as_flow(net), torch.arange(count)
    draw = Draw(5, 0, rows)
    z, cond = draw.normal("noise", run.shape), run.conditions.asked(rows)
    velocities, x = [], z
    for step in WALK:
        v = flow(x, torch.full((count,), step.level), cond).velocity
        velocities.append(v)
        x = x - v / EULER
    line = z - x
    bent = torch.stack([(line - v).square().mean() for v in velocities]).mean()
    return bent.item(), line.square().mean().item()


def looked_at(name: str, run: build.Run, net: Backbone, samples: int) -> dict[str, Any]:
    bent, cost = straightness(run, net)
    truth = measure.truth_of(run.source)
    row: dict[str, Any] = {"name": name, "straightness": bent, "transport": cost}
    for steps in (EULER, 1):
        walk = Rollout(WALK[:: EULER // steps], ode)
        row[f"frechet_{steps}"] = measure.measure(name, run, net, walk, truth, samples)["frechet"]
    print(row, flush=True)
    return row


def drawn(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rounds = range(len(rows))
    axes[0].plot(rounds, [row["straightness"] for row in rows], marker="o", label="straightness")
    axes[0].plot(
        rounds, [row["transport"] - rows[0]["transport"] for row in rows], marker="s", label="transport - first"
    )
    axes[1].plot(rounds, [row["frechet_1"] for row in rows], marker="o", label="one step")
    axes[1].plot(rounds, [row[f"frechet_{EULER}"] for row in rows], marker="s", label=f"{EULER} steps")
    axes[1].set_yscale("log")
    for axis, what in zip(axes, ("squared, a value", "Frechet distance to truth"), strict=True):
        axis.set(xlabel="rounds of reflow", ylabel=what, xticks=list(rounds))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(RESULT.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of each round")
    parser.add_argument("--samples", type=int, default=2000, help="images measured after each round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, previous = [], None
    with tempfile.TemporaryDirectory() as temporary:
        for number, stage in enumerate(config.load(CONFIG, [f"steps={args.steps}"]), 1):
            run = build.build(stage, previous)
            if previous is None:
                rows.append(looked_at("teacher", run, run.guided(), args.samples))
            root = Path(temporary) / f"stage_{number}"
            root.mkdir()
            build.prepare(run, root, previous)
            train(
                run.objective,
                build.batches(run),
                run.players,
                trange(stage.steps, leave=False),
                lambda step, logs: False,
            )
            checkpoint.save(root / "checkpoints", 1, run.players, run.objective)
            rows.append(looked_at(f"round {number}", run, run.evaluated(), args.samples))
            previous = root
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    told = {"command": "python tools/reflow.py", "date": f"{date.today():%Y-%m-%d}", "commit": commit}
    RESULT.write_text(json.dumps({**told, "steps": args.steps, "samples": args.samples, "rows": rows}, indent=1) + "\n")
    drawn(rows)


if __name__ == "__main__":
    main()

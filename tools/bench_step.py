"""Cost of a training cycle over the network passes it cannot do without.

    python tools/bench_step.py [--rounds 9] [--batch 32] [--out assets/benchmarks/step.json]

A cycle is one generator move and its critic moves of the quickstart's DMD2. The bare side runs the forwards and
backwards that the mathematics needs, on the same networks at the same shapes, and nothing else: no draws, no data,
no losses, no optimizer. Both sides run in turn; the median of the ratios of process CPU time counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from bare_passes import Bare, cycle_of

from fewstep import build, config
from fewstep.build import Run
from fewstep.models.passes import PassCounter, networks_of
from fewstep.train.player import Player


class Standing(Player):
    """A player that clears its gradients instead of moving: the cycle without optimizer and followers."""

    def move(self, step: int) -> float:
        self.clear()
        return 0.0


def ratios(cycle: Callable[[], None], bare: Callable[[], None], rounds: int) -> list[float]:
    """CPU time of `cycle` over that of `bare`, in turn."""
    result = []
    for _ in range(rounds):
        began = time.process_time()
        cycle()
        between = time.process_time()
        bare()
        result.append((between - began) / (time.process_time() - between))
    return result


def naive_passes(run: Run) -> int:
    """Forwards and backwards a cycle takes when every loss runs its own networks, as published trainers do.

    Generator turn: G forward and backward, two teacher forwards under guidance, F for the score, F again for the
    features with a backward. Each critic turn: a new G rollout, F for denoising, F for the fake and for the real
    logits, each forward and backward.
    """
    size, ratio = run.config.batch, run.config.objective.ratio  # type: ignore[attr-defined]
    teacher = 2 if run.config.model.guidance != 1 else 1
    return size * (2 + teacher + 1 + 2 + ratio * (1 + 2 + 2 + 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks/step.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    last = config.load("configs/quickstart.yaml", [f"batch={args.batch}"])[-1]
    run = build.build(replace(last, start={}))  # from the teacher, for there is no first stage: the cost is the same
    cycle, bare = cycle_of(run), Bare(run).cycle
    counter = PassCounter(networks_of(run.triad.generator, run.triad.real_score, run.triad.fake_score))
    cycle()
    counter.close()
    bare()
    complete = ratios(cycle, bare, args.rounds)
    for name, player in run.players.items():
        run.players[name] = Standing(name, player.modules, player.config)
    alone = ratios(cycle, bare, args.rounds)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "commit": commit,
        "date": f"{date.today():%Y-%m-%d}",
        "hardware": "CPU, 1 thread",
        "batch": args.batch,
        "rounds": args.rounds,
        "ratio_without_optimizer": round(statistics.median(alone), 4),
        "ratio_with_optimizer_and_followers": round(statistics.median(complete), 4),
        "full_passes_a_cycle": counter.total,
        "stopped_forwards_a_cycle": counter.stopped,
        "naive_passes_a_cycle": naive_passes(run),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

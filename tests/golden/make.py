"""Records the loss curves that the golden test compares with. After a change that is meant:

python -m tests.golden.make
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))

from tiny import CASES, batches, make

from fewstep.train.loop import train_step
from fewstep.train.player import PlayerConfig

FILE = Path(__file__).with_name("losses.json")
STEPS = 10
PLAYER = PlayerConfig(lr=1e-2, betas=[0.9, 0.99], eps=1e-2, clip=1.0, warmup=2, decay=12)
"""A large eps keeps Adam's first moves from following the sign of rounding errors."""

Curves = dict[str, list[float]]


def curves(case: str) -> Curves:
    """Every player's loss and gradient norm, by step, over ten steps of four samples."""
    tiny, result = make(case, PLAYER), {}
    for step in range(STEPS):
        logs = train_step(tiny.objective, batches(tiny, step, 4), step, tiny.players)
        for name, value in logs.items():
            if name.endswith(("/loss", "/grad_norm")):
                result.setdefault(name, []).append(float(f"{value:.7g}"))
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    recorded = {case: curves(case) for case in CASES}
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{len(recorded)} curves written to {FILE.name}")

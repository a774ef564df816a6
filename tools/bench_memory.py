"""Live bytes at the peak of a step: three full copies, an adapter as critic, adapters for both on one network.

    python tools/bench_memory.py [--batch 2] [--out assets/benchmarks/memory.json]

Real steps of DMD2 without GAN on a UNet of 96 million random weights at 16x16, with an evaluation average of the
generator: every storage is counted once while it is alive (`fewstep.train.live_bytes`), so allocators and kernels'
workspaces do not matter. The plan of the same steps on fake tensors stands beside what was measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch

from fewstep import build, config, plan
from fewstep.memory import KINDS, account
from fewstep.models import schedulers

UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": [192, 384, 576],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 64,
    "num_class_embeds": 13,
}
LORA: dict[str, Any] = {"lora": {"rank": 16}}
CASES: dict[str, dict[str, dict]] = {
    "three full copies": {"generator": {}, "fake_score": {}},
    "LoRA critic": {"generator": {}, "fake_score": LORA},
    "LoRA generator and critic": {"generator": LORA, "fake_score": LORA},
}
FULL = next(iter(CASES))
CONFIG = """
name: memory
device: cpu
model: {steps: 1}
objective: {name: dmd2, ratio: 1, gan_weight: 0.0}
players: {generator: {lr: 1.0e-5, ema: 0.999}, fake_score: {lr: 1.0e-5}}
"""


def measured(where: Path, batch: int, roles: dict[str, dict]) -> dict[str, Any]:
    """The parts of the peak in MB, as two real steps had them and as the plan has them."""
    settings = [f"model.teacher={where / 'teacher'}", f"batch={batch}"]
    settings += [f"players.{role}.{key}={value}" for role, more in roles.items() for key, value in more.items()]
    chosen = config.load(where / "memory.yaml", settings)[0]
    planned, _ = plan.foresee(plan.Setting(chosen))
    real = account(build.build(chosen), range(2))
    parts = {kind: round(real.of_kind(kind) / 2**20, 1) for kind in KINDS if real.of_kind(kind)}
    return {"peak": round(real.peak / 2**20, 1), "planned": round(planned.peak / 2**20, 1), **parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks/memory.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        (where / "memory.yaml").write_text(CONFIG)
        net = diffusers.UNet2DModel(**UNET)
        parameters = sum(p.numel() for p in net.parameters())
        scheduler = schedulers.flow_scheduler()
        diffusers.ConsistencyModelPipeline(unet=net, scheduler=scheduler).save_pretrained(where / "teacher")
        del net
        rows = {name: measured(where, args.batch, roles) for name, roles in CASES.items()}
    for row in rows.values():
        row["of_full"] = round(row["peak"] / rows[FULL]["peak"], 3)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "commit": commit,
        "date": f"{date.today():%Y-%m-%d}",
        "hardware": f"CPU, {torch.get_num_threads()} thread(s)",
        "parameters": parameters,
        "batch": args.batch,
        "unit": "MB",
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [[name, *(str(row.get(key, "-")) for key in columns)] for name, row in rows.items()]
    print(f"{parameters:,} parameters, batch {args.batch}, MB")
    print("\n".join(plan.aligned([["", *columns], *cells])))


if __name__ == "__main__":
    main()

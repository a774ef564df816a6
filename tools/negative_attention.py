"""Leading a one-step student away from a prompt: inside its attention, or by guidance in its output?

    python tools/negative_attention.py [--passes 30000] [--count 600]

A one-step student of the text-to-image teacher is trained first. Then it draws captions P, each to be led away from
another caption N from the same noise: by negative attention, Z+ - a Z-, and by guidance of its output,
G(P) + a (G(P) - G(N)). Each row says how far the pixels went, how much of G(N) shows in them (the coefficient of G(N)
where the picture is fitted by G(P) and G(N)), and what a reader makes of it: precision, and whether P is still right.
assets/benchmarks/negative_attention.json has the rows, negative_attention.png the pictures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmark_rows import train_stage
from torch import Tensor

from fewstep import config, measure
from fewstep.build import Run
from fewstep.data.captioned import rows_of
from fewstep.evals.captions import caption_accuracy
from fewstep.evals.grid import save_grid
from fewstep.evals.neighbours import neighbours
from fewstep.models.negative import NegativeAttention

RESULT = Path("assets/benchmarks/negative_attention.json")
CONFIG = "configs/t2i/dmd.yaml"
SCALES = (0.1, 0.2, 0.5, 1.0)
AWAY = 7
"""image i is led away from the caption of image i + AWAY"""


def drawn(run: Run, count: int, scale: float = 0.0, turn: int = 0) -> Tensor:
    """Images (N, 3, H, W) of captions `turn`, `turn` + 1, .., led away inside the attention by `scale`."""
    net, rollout = measure.student(run)
    parts = []
    for rows in torch.arange(count).split(1 if scale else 100):
        asked = lambda ids, rows=rows: run.conditions.asked(rows + turn)
        away = run.conditions.asked(rows + AWAY).inputs["encoder_hidden_states"][:1]
        one = NegativeAttention(net, scale, away) if scale else net
        draw = measure.Draw(measure.SAMPLE_SEED, 0, rows)
        with torch.no_grad():
            noise = draw.normal("noise", run.shape)
            parts.append(run.decode(rollout(one, noise, asked(rows), draw).x0))
    return torch.cat(parts)


def trace(images: Tensor, wanted: Tensor, other: Tensor) -> float:
    """The mean coefficient of `other` where each image is fitted by `wanted` and `other`, all (N, ..)."""
    basis = torch.stack([wanted.flatten(1), other.flatten(1)], 2)
    fitted = torch.linalg.lstsq(basis, images.flatten(1).unsqueeze(2)).solution
    return fitted[:, 1, 0].mean().item()


def row(how: str, scale: float, images: Tensor, wanted: Tensor, other: Tensor, run: Run) -> dict[str, Any]:
    truth, reader = measure.truth_of(run.source), measure.reader_of(run.source)
    said = rows_of(run.conditions.names(torch.arange(len(images))))
    seen = images.clamp(-1, 1)
    return {
        "how": how,
        "scale": scale,
        "moved": (images - wanted).abs().mean().item(),
        "trace": trace(images, wanted, other),
        "out_of_range": (images.abs() > 1.05).float().mean().item(),
        "precision": asdict(neighbours(truth.features[: len(seen)], reader.read(seen)[1]))["precision"],
        "caption_accuracy": caption_accuracy(reader, seen, said).all,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--passes", type=int, default=30_000, help="the budget of the student's training")
    parser.add_argument("--count", type=int, default=600, help="images of a row")
    args = parser.parse_args()
    stage = config.load(CONFIG, ["steps=1000000"])[0]
    with tempfile.TemporaryDirectory() as temporary:
        run, _ = train_stage(stage, args.passes, Path(temporary), None)
    wanted, other = drawn(run, args.count), drawn(run, args.count, turn=AWAY)
    pictures, rows = {"P": wanted, "N": other}, [row("none", 0.0, wanted, wanted, other, run)]
    for scale in SCALES:
        for how in ("attention", "output"):
            images = drawn(run, args.count, scale) if how == "attention" else wanted + scale * (wanted - other)
            pictures[f"{how} {scale:g}"] = images
            rows.append(row(how, scale, images, wanted, other, run))
            print(rows[-1], flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    told = {"command": "python tools/negative_attention.py", "date": f"{date.today():%Y-%m-%d}", "commit": commit}
    RESULT.write_text(json.dumps({**told, "passes": args.passes, "count": args.count, "rows": rows}, indent=1) + "\n")
    shown = torch.cat([images[:12].clamp(-1, 1) for images in pictures.values()])
    save_grid(shown, RESULT.with_suffix(".png"), columns=12, scale=2, row_labels=list(pictures))


if __name__ == "__main__":
    main()

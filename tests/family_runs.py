"""A run of every family on its tiny pipeline, played by one process or by two: what the table of families looks at.

torchrun --nproc-per-node 2 tests/family_runs.py FOLDER FAMILY [FAMILY ...]   plays `SHARDED` on two processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch
from torch import Tensor

from fewstep import build, config
from fewstep import sharded as from_shards
from fewstep.build import Run
from fewstep.core.batch import Batch, Pair
from fewstep.core.draw import Draw
from fewstep.data.source import PromptSource
from fewstep.models import schedulers, tiny
from fewstep.models.codecs import codec_of
from fewstep.train import checkpoint, processes
from fewstep.train.loop import train_step

FAMILIES = ("unet2d", *tiny.MAKERS)
BATCH = 4
FRAMES = 9
PLAYER = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-2, "ema": 0.9}
"""A large eps keeps Adam's first moves from following the sign of rounding errors."""
DMD2 = {"name": "dmd2", "ratio": 2, "gan_weight": 0.5, "gan_critic_weight": 0.5}
SCORES = ("generator", "fake_score")


def unet2d() -> Any:
    net = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=[8, 8],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=13,
    )
    pipeline = diffusers.ConsistencyModelPipeline(unet=net.eval(), scheduler=schedulers.flow_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make(family: str) -> Any:
    """The tiny pipeline of a family, the same weights every time."""
    if family != "unet2d":
        return tiny.make(family)
    torch.manual_seed(0)
    return unet2d()


def teacher(family: str, folder: Path) -> Path:
    """The folder of that pipeline, written once."""
    place = folder / family
    if not (place / "model_index.json").exists():
        make(family).save_pretrained(place)
    return place


def build_run(
    family: str, folder: Path, objective: dict[str, Any], players: dict[str, dict] | None = None, **model: Any
) -> Run:
    """A run of a family; `players` are changes to those that learn, by default a generator and a critic."""
    with processes.leader_first():
        (one,) = config.load(write(family, folder, objective, players, **model))
    with patch.object(PromptSource, "has_images", True):  # `batch` makes them
        return build.build(one) if processes.size() == 1 else from_shards.build(one)


def write(family: str, folder: Path, objective: dict[str, Any], players: dict[str, dict] | None, **model: Any) -> Path:
    """The config of that run, with what it reads."""
    _put(folder / "prompts.txt", "a disc\ntwo rings\na red one\n")
    changes = players or {name: {} for name in SCORES}
    file = folder / "cell.yaml"
    codec = None if family == "unet2d" else codec_of(make(family))
    what: dict[str, Any] = {} if codec is not None and codec.PROMPTED else {"source": "scenes"}
    null = {"null_label": 1000} if codec is not None and not codec.PROMPTED else {}
    side = max(16, 1 if codec is None else codec.MULTIPLE)
    if codec is not None and codec.VIDEOS:
        what = {"frames": FRAMES}
    node = {
        "name": "cell",
        "batch": BATCH,
        "model": {"teacher": str(teacher(family, folder)), "steps": 2, "guidance": 3.0, **null, **model},
        "objective": objective,
        "players": {name: PLAYER | change for name, change in changes.items()},
        "data": {"source": str(folder / "prompts.txt"), "resolution": side, **what},
    }
    _put(file, json.dumps(node))
    return file


def _put(file: Path, text: str) -> None:
    """Writes what is not there yet: of two processes the first may read meanwhile."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def batch(run: Run, step: int, ids: Tensor) -> Batch:
    """Noise in place of data too, so that every family can be asked for everything."""
    draw, cond = Draw(5, step, ids), run.conditions.of(ids - ids % run.objective.group)
    noise = lambda name: draw.normal(name, run.shape)
    pair = Pair(noise("stored"), 0.5 * noise("made"), cond)
    return Batch(noise("noise"), cond, draw, x0=0.5 * noise("data"), pair=pair)


def play(run: Run, steps: range, parts: int = 1) -> list[dict[str, float]]:
    """The losses and gradient norms of every step; `parts` micro-batches a process."""
    curves = []
    for step in steps:
        ids = processes.share(torch.arange(step * BATCH, (step + 1) * BATCH), parts)
        logs = train_step(run.objective, [batch(run, step, part) for part in ids.chunk(parts)], step, run.players)
        curves.append({k: v for k, v in logs.items() if k.endswith(("/loss", "/grad_norm"))})
    return curves


def save(run: Run, folder: Path, step: int) -> Path:
    return checkpoint.save(folder, step, run.players, run.objective)


def load(run: Run, path: Path) -> int:
    return checkpoint.load(path, run.players, run.objective)


def sharded(family: str, folder: Path) -> list[dict[str, float]]:
    """Three steps on all processes there are, with a checkpoint after two and at the end."""
    run = build_run(family, folder, DMD2)
    curves = play(run, range(2))
    save(run, folder / f"{family}_by_two", 2)
    curves += play(run, range(2, 3))
    save(run, folder / f"{family}_by_two", 3)
    return curves


def main(folder: Path, families: list[str]) -> None:
    torch.set_num_threads(1)
    with processes.started(torch.device("cpu")):
        for family in families:
            curves = sharded(family, folder)
            if processes.leads():
                (folder / f"{family}_by_two.json").write_text(json.dumps(curves))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""What the ranks of test_startup.py do: they build each config of a folder and say what they then hold.

torchrun --nproc-per-node 2 tests/train/startup_ranks.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep import config, sharded
from fewstep.build import Run
from fewstep.models.passes import networks_of
from fewstep.train import checkpoint, parallel, processes
from fewstep.train.live_bytes import LiveBytes


def tensors_of(run: Run) -> dict[str, Tensor]:
    """All that a run holds: what its checkpoints have, and each weight and buffer of its networks."""
    nets = networks_of(*vars(run.triad).values())
    inside = {f"{i}/{k}": v for i, net in enumerate(nets) for k, v in (*net.named_parameters(), *net.named_buffers())}
    return {k: v.detach() for k, v in {**checkpoint.collect(run.players, run.objective), **inside}.items()}


def whole(run: Run) -> dict[str, Tensor]:
    """The same, put together, each in memory of its own."""
    return {k: parallel.full(v).clone(memory_format=torch.contiguous_format) for k, v in tensors_of(run).items()}


def held(run: Run) -> int:
    """Bytes of all that, each storage once."""
    parts = (parallel.local(v).untyped_storage() for v in tensors_of(run).values())
    return sum({part.data_ptr(): part.nbytes() for part in parts}.values())


def start(file: Path) -> dict[str, Any]:
    """Builds a config; the peak of live bytes meanwhile, what is held afterwards, and the largest whole tensor."""
    (stage,) = config.load(file)
    with LiveBytes() as live:
        run = sharded.build(stage)
    largest = max(v.numel() * v.element_size() for v in tensors_of(run).values())
    found = {"peak": live.peak.total(), "held": held(run), "largest": largest}
    everything = whole(run)
    if processes.leads():
        save_file(everything, file.with_suffix(".safetensors"))
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with processes.started(torch.device("cpu")):
        results = {file.stem: start(file) for file in sorted(folder.glob("*.yaml"))}
        (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

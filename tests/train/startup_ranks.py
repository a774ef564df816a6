"""What the ranks of test_startup.py do: they build each config of a folder and say what they then hold.

torchrun --nproc-per-node 2 tests/train/startup_ranks.py FOLDER
"""

from __future__ import annotations

import json
import math
import os
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep import build, config, memory, runner, sharded
from fewstep.build import Run
from fewstep.memory import Account
from fewstep.models.passes import networks_of
from fewstep.train import checkpoint, parallel, processes
from fewstep.train.live_bytes import GATHERED, REST, LiveBytes

PASSING = (GATHERED, REST)


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


@torch.no_grad()
def answer(run: Run) -> Tensor:
    """What the teacher says of two states of this run."""
    x = torch.linspace(-1, 1, 2 * math.prod(run.shape)).reshape(2, *run.shape)
    return run.guided()(x, torch.tensor([0.9, 0.4]), run.conditions.of(torch.arange(2))).value.contiguous()


def pairs(run: Run, folder: Path) -> Tensor:
    """The teacher's samples, made by all processes and read by each."""
    with processes.leader_first():
        folder.mkdir(exist_ok=True)
    build.prepare(run, folder, None)
    made = run.pairs
    assert made is not None
    again = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    build.prepare(run, folder, None)
    assert len(again) == 3 and again == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    return made.x0


class Held(LiveBytes):
    """Its peak is that of what a run holds; activations, and what else comes and goes, may be more at other times."""

    def _look(self) -> None:
        if self._held(self.now) > self._held(self.peak):
            self.peak = self.now.copy()

    def _held(self, sizes: Counter[Any]) -> int:
        return sizes.total() - sizes[self.rest]


def parts_of(found: Account) -> dict[str, int]:
    """The most that each role ever had of each kind, without what passes."""
    most: Counter[str] = Counter()
    for part, size in found.most.items():
        if part.kind not in PASSING:
            most[f"{part.role}/{part.kind}"] += size
    return dict(+most)


def train(run: Run) -> dict[str, dict[str, int]]:
    """Bytes of each part and role, and of each kind at the peak of each turn, in four steps."""
    memory.LiveBytes = Held
    found = memory.account(run, range(4))
    kinds = [kind for kind in memory.KINDS if kind != REST]
    return {"parts": parts_of(found)} | {
        turn: {kind: found.of_kind(kind, turn) for kind in kinds} for turn in found.turns
    }


def start(file: Path) -> dict[str, Any]:
    """Builds a config; the peak of live bytes meanwhile, what is held afterwards, and the largest whole tensor.

    The large one is also trained, and let go.
    """
    (stage,) = config.load(file)
    with LiveBytes() as live:
        run = sharded.build(stage)
    largest = max(v.numel() * v.element_size() for v in tensors_of(run).values())
    found = {"peak": live.peak.total(), "held": held(run), "largest": largest}
    everything = whole(run)
    if file.stem.startswith("low"):
        everything["answer"] = answer(run)
    if file.stem == "pairs":
        everything["answer"] = pairs(run, file.parent / "pairs")
    if processes.leads():
        save_file(everything, file.with_suffix(".safetensors"))
    del everything
    if file.stem == "large":
        found |= train(run)
        kept = [weakref.ref(p) for net in networks_of(*vars(run.triad).values()) for p in net.parameters()]
        del run
        runner.let_go()
        found["left"] = sum(p() is not None for p in kept)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with processes.started(torch.device("cpu")):
        results = {file.stem: start(file) for file in sorted(folder.glob("*.yaml"))}
        (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What the ranks of test_parallel.py do. The same scenes are played by one process in the test itself.

torchrun --nproc-per-node 2 tests/train/ranks.py FOLDER
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))

import diffusers
import tiny
import torch
from torch import nn

from fewstep.train import checkpoint, parallel, processes
from fewstep.train.loop import train_step
from fewstep.train.player import PlayerConfig

PLAYER = PlayerConfig(lr=1e-2, betas=[0.9, 0.99], eps=1e-2, clip=1.0, warmup=2, decay=30, ema=0.9)
"""A large eps keeps Adam's first moves from following the sign of rounding errors."""
BATCH = 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scene:
    """A case of tiny.py; `parts` micro-batches a process; `inside` is how many processes a copy is sharded over."""

    case: str
    steps: int = 20
    parts: int = 1
    dit: bool = False
    learn: tiny.Roles = "full"
    checkpointed: bool = False
    inside: int = 2


# Its own distance, of curvature 1000 near zero, makes 1e-4 of rounding errors in 20 steps, in one process as in two.
tiny.VARIANTS["consistency"]["l2"] = {"distance": "l2"}

SCENES = {
    "dmd2": Scene("dmd2/flow"),
    "phased_dmd": Scene("phased_dmd/flow"),
    "consistency": Scene("consistency-l2/flow"),
    "dit": Scene("dmd2/flow", steps=4, dit=True),
    "micro_batches": Scene("dmd2/flow", steps=3, parts=2),
    "features_of_the_teacher": Scene("dmd2-teacher/flow", steps=3),
    "voices": Scene("dmd2-teacher/flow", steps=3, learn="shared"),
    "checkpointed": Scene("dmd2/flow", steps=2, checkpointed=True),
    "replicated": Scene("dmd2/flow", steps=3, parts=2, inside=1),
    "derivative": Scene("scm/flow", steps=3),
    "second_time": Scene("meanflow/flow", steps=3),
    "told": Scene("lcm/flow", steps=3),
}


def dit(seed: int, shape: tuple[int, int, int], channels: int) -> nn.Module:
    torch.manual_seed(seed)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=shape[0],
        out_channels=shape[0],
        num_layers=3,
        sample_size=shape[1],
        patch_size=2,
        num_embeds_ada_norm=tiny.LABELS,
    ).eval()


def make(scene: Scene) -> tiny.Tiny:
    """The run of a scene, over all processes there are."""
    networks = tiny.unet
    os.environ["LOCAL_WORLD_SIZE"] = str(scene.inside)
    try:
        tiny.unet = dit if scene.dit else networks
        one = tiny.make(scene.case, PLAYER, scene.checkpointed, learn=scene.learn)
    finally:
        tiny.unet = networks
    parallel.distribute(one.objective, one.players, CPU)
    return one


def play(one: tiny.Tiny, scene: Scene, steps: range) -> list[dict[str, float]]:
    """The losses and gradient norms of every step."""
    curves = []
    for step in steps:
        ids = processes.share(torch.arange(step * BATCH, (step + 1) * BATCH), scene.parts)
        parts = [tiny.batch(one, step, part) for part in ids.chunk(scene.parts)]
        logs = train_step(one.objective, parts, step, one.players)
        curves.append({k: v for k, v in logs.items() if k.endswith(("/loss", "/grad_norm"))})
    return curves


def save(one: tiny.Tiny, folder: Path, step: int) -> Path:
    return checkpoint.save(folder, step, one.players, one.objective)


def load(one: tiny.Tiny, path: Path) -> int:
    return checkpoint.load(path, one.players, one.objective)


def held(one: tiny.Tiny) -> int:
    """The bytes of the generator's player in this process: parameters, optimizer and followers."""
    player = one.players["generator"]
    parallel.reshard(player.modules)
    networks = [player.modules[0], *(follower.module for follower in player.followers.values())]
    tensors = [p for net in networks for p in net.parameters()]
    tensors += [moment for moments in player.optimizer.state.values() for moment in moments.values()]
    return sum(parallel.local(t).numel() * t.element_size() for t in tensors)


def largest_block(one: tiny.Tiny) -> int:
    """Bytes of the largest sharded block of one network."""
    blocks = parallel.blocks_of(one.objective.triad.generator.net)
    return max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks)


def message(act: Callable[[], Any]) -> str:
    """What an error says."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def scenes(folder: Path) -> Iterator[tuple[str, Any]]:
    for name, scene in SCENES.items():
        one = make(scene)
        yield name, play(one, scene, range(scene.steps))
        save(one, folder / name, scene.steps)


def checkpoints(folder: Path) -> Iterator[tuple[str, Any]]:
    """Leaves a checkpoint, and takes up the one that a single process has left."""
    scene = SCENES["dmd2"]
    one, other = make(scene), make(scene)
    play(one, scene, range(3))
    save(one, folder / "by_two", 3)
    yield "after_by_two", play(one, scene, range(3, 5))
    load(other, folder / "by_one" / "0000003")
    save(other, folder / "by_one_again", 3)
    yield "after_by_one", play(other, scene, range(3, 5))
    yield "held", held(other)


def mishaps(last: bool) -> Iterator[tuple[str, str]]:
    """What goes wrong on the last rank alone."""
    scene = SCENES["phased_dmd"]
    one = make(scene)
    play(one, scene, range(2))
    player = one.players["generator"]
    before = [parallel.local(p).clone() for p in player.parameters]
    for parameter in player.parameters:
        parameter.grad = torch.full_like(parameter, math.nan if last else 1.0)
    yield "bad_gradient", message(lambda: player.move(17))
    same = all(torch.equal(parallel.local(p), b) for p, b in zip(player.parameters, before, strict=True))
    yield "untouched", str(same)
    batch = tiny.batch(one, 2, torch.arange(2))
    clean = batch.noise.clone()
    if last:
        batch.noise.fill_(math.nan)
    yield "bad_data", message(lambda: train_step(one.objective, [batch], 2, one.players))
    batch.noise.copy_(clean)
    if last:
        next(iter(player.optimizer.state.values()))["exp_avg"].fill_(math.nan)
    yield "bad_moment", message(lambda: train_step(one.objective, [batch], 2, one.players))
    if last:
        next(iter(player.optimizer.state.values()))["exp_avg"].zero_()
        parallel.local(next(one.objective.triad.real_score.parameters()).detach()).fill_(math.nan)
    yield "bad_teacher", message(lambda: train_step(one.objective, [batch], 2, one.players))
    yield "other_config", message(lambda: processes.refuse_differences("b" if last else "a"))
    yield "same_config", message(lambda: processes.refuse_differences("a"))
    own = processes._source
    processes._source = lambda: own() + "x" * last
    yield "other_code", message(lambda: processes.refuse_differences("a"))
    processes._source = own
    yield "uneven", message(lambda: processes.share(torch.arange(6), 2))


def low_precision() -> float:
    """How far a sharded network in bfloat16 is from itself in float32, relative."""
    exact, rough = tiny.unet(0, *tiny.SMALL), tiny.unet(0, *tiny.SMALL)
    parallel.shard(rough, parallel.mesh(CPU), torch.bfloat16)
    x, t = torch.linspace(-1, 1, 2 * 192).reshape(2, 3, 8, 8), torch.tensor([999.0, 998.0])
    labels = torch.tensor([0, 1])
    expected, found = (net(x, t, labels, return_dict=False)[0] for net in (exact, rough))
    found.square().mean().backward()
    assert found.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in rough.parameters())
    return ((found - expected).norm() / expected.norm()).item()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with processes.started(CPU):
        rank = torch.distributed.get_rank()
        results = dict(scenes(folder)) | dict(checkpoints(folder)) | dict(mishaps(last=rank == 1))
        results["low_precision"] = low_precision()
        (folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

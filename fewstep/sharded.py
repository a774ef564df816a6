"""A run over several processes: its networks are shaped, sharded, and only then filled, tensor by tensor.

A process holds its shards, and for a moment one whole tensor: a network is never put together anywhere. Three cases
need the teacher whole in the leader's host memory for a while, and only there: a new network, model.lora, and a file
in which tensors have other names than in the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep import build as building
from fewstep.build import Run, Teacher
from fewstep.config import Config
from fewstep.data.source import open_source
from fewstep.models import loading, shaped
from fewstep.models.passes import networks_of
from fewstep.train import parallel, processes, stored
from fewstep.train.stored import Stored


def build(config: Config, previous: Path | None = None) -> Run:
    """`fewstep.build.build`, shared out to all processes. Raises UserError for everything a config can get wrong."""
    device = building.pick_device(config.device)
    source = open_source(config.data.source, config.data.resolution, config.data.seed)
    torch.manual_seed(config.seed)
    teacher, weights = _teacher(config, len(source.labels))
    if teacher.codec is not None:
        teacher.codec.to(device)
    run = building.assemble(config, device, source, teacher, previous)
    # A teacher that is in no role is asked for pairs, or for nothing.
    asked = [teacher.backbone()] if "pair" in run.objective.reads else []
    roles = [net for net in vars(run.triad).values() if net is not None]
    parallel.distribute(run.objective, run.players, device, asked)
    fill(networks_of(*roles, *asked), weights)
    building.start(config, run.triad, previous)
    for player in run.players.values():
        for follower in player.followers.values():
            follower.begin()
    return run


def _teacher(config: Config, labels: int) -> tuple[Teacher, Stored]:
    """The teacher with weights that are only shaped, and what they are to be filled with."""
    model = config.model
    whole = model.network is not None or model.lora is not None
    teacher = building.build_teacher(config, labels, weights=whole and processes.leads(), buffers=True)
    if not whole:
        return teacher, weights_of(str(model.teacher), model.revision, teacher.net)
    state = teacher.net.state_dict() if processes.leads() else None
    shaped.empty(teacher.net)
    if teacher.codec is not None:
        parallel.broadcast([teacher.codec.encoders])  # they wear model.lora too, in the leader
        teacher.unconditional = processes.from_leader(lambda: teacher.unconditional)
    return teacher, stored.from_leader(state)


def weights_of(source: str, revision: str | None, net: nn.Module) -> Stored:
    """The denoiser of `source`, a network such as `net`; each process reads it, if the names in its file are such."""
    files = loading.weight_files(source, revision)
    kept = stored.joined(stored.files(paths).within(before) for before, paths in files.items())
    if set(kept) == set(net.state_dict()):
        return kept
    # Loading draws numbers that a run on one process does not draw here.
    with torch.random.fork_rng(devices=[]):
        whole = loading.load(source, revision).net.state_dict() if processes.leads() else None
    return stored.from_leader(whole)


@torch.no_grad()
def fill(nets: Sequence[nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Copies each of the teacher's `weights` into all networks that were made of it; adapters are not the teacher's."""
    tables = [_teachers(net) for net in nets]
    for name in tables[0]:
        whole = weights[name]
        for table in tables:
            parallel.put(whole, table[name])


def _teachers(net: nn.Module) -> dict[str, Tensor]:
    """The tensors of `net` that it has of the teacher, by the teacher's names."""
    return {name.replace(".base_layer.", "."): t for name, t in net.state_dict().items() if ".lora_" not in name}

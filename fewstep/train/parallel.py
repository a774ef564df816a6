"""Networks over several processes: torch's FSDP2 over a (replicate x shard) mesh, small modules replicated.

Sharded are the plain diffusers networks inside the backbones, block by block; FSDP2's hooks run on `forward` alone.
Everything else (heads, dials) is whole in every process: equal at the start, its gradients averaged once a move.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.models.experts import models_of
from fewstep.models.families import family_of
from fewstep.models.passes import networks_of
from fewstep.models.precision import cast_inputs, dtype_of, stays_float32
from fewstep.objectives.base import Objective
from fewstep.train import processes

if TYPE_CHECKING:
    from fewstep.train.player import Player


def mesh(device: torch.device) -> Any:
    """The mesh of all processes: sharded inside a machine, replicated over machines."""
    inside = int(os.environ.get("LOCAL_WORLD_SIZE", processes.size()))
    shape = (processes.size() // inside, inside)
    made = dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for name in ("replicate", "shard"):
        processes.hold_to_time(made.get_group(name))
    return made


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a diffusers network, children before the blocks that hold them.

    They are those that diffusers names, or else those of its row. One whose time embedding is read from outside of it,
    as DiT's forward does, stays whole with the root.
    """
    family = family_of(net)
    kinds = getattr(net, "_no_split_modules", None) or (family.blocks if family else ())
    inside = family.time_embedding if family else ""
    named = [pair for model in models_of(net) for pair in reversed(list(model.named_modules()))]
    return [block for name, block in named if type(block).__name__ in kinds and not inside.startswith(f"{name}.")]


def shard(net: nn.Module, over: Any, dtype: torch.dtype = torch.float32) -> None:
    """Leaves of every parameter of `net` the shard of this process, a DTensor, put together for each forward.

    Blocks compute in `dtype`; parameters, reduced gradients and outputs stay float32. What the class of `net` keeps in
    float32 then is left whole in every process: norms and tables are too small to be worth a group of their own.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a second that one process need not wait

    low = dtype if dtype != torch.float32 else None
    # Times are inputs too and stay as they are: inputs are cast below, all but the vectors.
    inner = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
    outer = MixedPrecisionPolicy(low, torch.float32, torch.float32, cast_forward_inputs=False)
    exact = set() if low is None else {p for name, p in net.named_parameters() if stays_float32(net, name)}
    for module, policy in [*((block, inner) for block in blocks_of(net)), (net, outer)]:
        fully_shard(module, mesh=over, mp_policy=policy, ignored_params=exact)
        if low is not None:
            module.register_forward_pre_hook(cast_inputs(low), with_kwargs=True)


def distribute(
    objective: Objective, players: Mapping[str, Player], device: torch.device, beside: Sequence[nn.Module] = ()
) -> None:
    """Shards the networks of all roles, of followers and of `beside`; replicates the rest; optimizers start anew.

    What is only shaped gets memory on `device` for its shards, and no values yet.
    """
    if processes.size() == 1:
        return
    followers = [follower.module for player in players.values() for follower in player.followers.values()]
    modules = [*(net for net in vars(objective.triad).values() if net is not None), *followers, *beside, objective]
    networks, over = networks_of(*modules), mesh(device)
    broadcast([*networks, *modules])
    for net in networks:
        shard(net, over, dtype_of(net))
        net._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    for player in players.values():
        player.enlist()


def broadcast(modules: Iterable[nn.Module]) -> None:
    """Gives all processes the leader's parameters and buffers, where they have memory."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    for tensor in tensors.values():
        if not tensor.is_meta:
            dist.broadcast(tensor.detach(), 0)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`: its shard, in the same memory, or all of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[operator]


def full(tensor: Tensor) -> Tensor:
    """All of `tensor`. Every process has to ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[operator]


def like(whole: Tensor, reference: Tensor) -> Tensor:
    """`whole`, or where `reference` is sharded this process's part of it, without asking the others."""
    if not is_sharded(reference) or whole.shape != reference.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, reference.device_mesh, reference.placements, src_data_rank=None)  # type: ignore[attr-defined]


def put(whole: Tensor, place: Tensor) -> None:
    """Copies `whole` into `place`, or where that is sharded this process's part of it."""
    local(place).copy_(local(like(whole, place)))


def reshard(modules: Iterable[nn.Module]) -> None:
    """Lets go of what forwards left put together; the next one would not see what is done to the shards.

    The roots stay put together until a backward: a loss on the features of a block reaches them unannounced.
    """
    for part in _sharded_parts(modules):
        part.reshard()


def synchronise(modules: Iterable[nn.Module], now: bool) -> None:
    """Whether the coming backward adds up the gradients of sharded `modules` over processes, or keeps them here."""
    for part in _sharded_parts(modules):
        part.set_requires_gradient_sync(now, recurse=False)


def _sharded_parts(modules: Iterable[nn.Module]) -> list[Any]:
    """The networks of `modules`, those below voices among them, and their blocks."""
    if processes.size() == 1:
        return []
    parts = (part for net in networks_of(*modules) for part in net.modules())
    return [part for part in parts if hasattr(part, "set_requires_gradient_sync")]


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Averages the gradients of the replicated ones over processes; those of shards were averaged by backward."""
    gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
    if processes.size() == 1 or not gradients:
        return
    together = processes.mean(torch.cat([g.flatten() for g in gradients]))
    for gradient, averaged in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))


def clip(parameters: Sequence[Tensor], limit: float) -> float:
    """Scales the gradients down to a norm of `limit` over all processes. Returns the norm before, equal on all.

    A shard counts in each of its replicas, a replicated parameter in every process: each by its part. Gradients whose
    norm is not finite are left as they are.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if processes.size() == 1:
        total = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if math.isfinite(norm := total.item()):
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, total, foreach=True)
        return norm
    copies = [_copies(p) for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients)).double()
    squares = norms.square() / norms.new_tensor(copies)
    norm = (processes.mean(squares.sum()) * processes.size()).sqrt().item()
    if math.isfinite(norm):
        torch._foreach_mul_(gradients, min(1.0, limit / (norm + 1e-6)))
    return norm


def _copies(parameter: Tensor) -> int:
    """How many processes hold the same part of `parameter`."""
    return parameter.device_mesh.size(0) if is_sharded(parameter) else processes.size()  # type: ignore[attr-defined]


def zero_of(tensors: Iterable[Tensor]) -> Tensor:
    """Zero () where all values of this process are finite, otherwise NaN, without asking the device for it.

    NaN too where a tensor's absolute values add up to more than a float holds.
    """
    parts = [local(tensor.detach()) for tensor in tensors]
    parts = [part for part in parts if part.numel() and part.is_floating_point()]
    if not parts:
        return torch.zeros(())
    # Sums, for squares of large values overflow, and largest values take a CPU four times as long.
    sums = torch._foreach_norm([part.float() if part.dtype == torch.float16 else part for part in parts], ord=1)
    return (torch.stack([value.to(sums[0].device, torch.float32) for value in sums]) * 0).sum()

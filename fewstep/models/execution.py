"""How a network is executed: attention kernel, precision, gradient checkpointing, compilation, place of its weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewstep.models import attention, precision
from fewstep.models.attention import Attention
from fewstep.models.experts import models_of
from fewstep.models.families import family_of
from fewstep.models.offload import is_offloaded, offload
from fewstep.models.precision import DTYPES, Precision

COMPILER = "inductor"
_VARIANTS = 64  # shapes, gradient modes and voices that one kind of block may be compiled for; torch stops at 8


@dataclass(frozen=True)
class Execution:
    """The choices for one network; the keys of the config say what each means."""

    attention: Attention = "sdpa"
    precision: Precision = "fp32"
    checkpointing: bool = False
    compile: bool = False
    offload: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def execute(net: nn.Module, how: Execution, frozen: bool, device: torch.device) -> nn.Module:
    """Makes `net`, a plain diffusers network with float32 weights, run as `how` says; returns it. So will its copies.

    A `frozen` network in low precision has low weights; one that learns keeps float32 ones. The names of its weights
    stay what they are.
    """
    attention.use(net, how.attention)
    if how.checkpointing:
        net.enable_gradient_checkpointing()
    if how.compile:
        compile_blocks(net)
    if how.dtype != torch.float32:
        (precision.lower if frozen else precision.compute_in)(net, how.dtype)
    if how.offload:
        offload(net, repeated_blocks(net), device)
    return net


def repeated_blocks(net: nn.Module) -> Iterator[nn.Module]:
    """The blocks that make up most of a network, without the one that holds its time embedding.

    That one is reached from outside: by the hooks of dials, and by DiT's own forward.
    """
    family = family_of(net)
    assert family is not None
    for model in models_of(net):
        for name, block in model.named_modules():
            if type(block).__name__ in family.blocks and not family.time_embedding.startswith(f"{name}."):
                yield block


def compile_blocks(net: nn.Module) -> None:
    """Compiles the forwards of the repeated blocks, each kind once for its shapes, when they are first called."""
    import torch._dynamo  # seconds, which a run without it need not wait

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for block in repeated_blocks(net):
        block.__class__ = _compiled(type(block), COMPILER)  # type: ignore[arg-type]


@functools.cache
def _compiled(kind: Any, compiler: str) -> type:
    """The class `kind`, under the same name, with a compiled forward.

    A class, since a compiled module would lose its compilation in copies, and compile its hooks: every tap brings a new
    one, and would compile the block again.
    """
    forward = torch.compile(kind.forward, backend=compiler)
    return type(kind.__name__, (kind,), {"forward": forward, "is_compiled": True})


def describe(net: nn.Module) -> str:
    """How `net` really is executed, in one line."""
    compiled = sum(getattr(type(module), "is_compiled", False) for module in net.modules())
    weights = {str(p.dtype).removeprefix("torch.") for name, p in net.named_parameters() if ".lora_" not in name}
    computes = str(precision.dtype_of(net)).removeprefix("torch.")
    parts = [
        attention.describe(net, precision.dtype_of(net)),
        f"computes in {computes} with {' and '.join(sorted(weights))} weights",
        "checkpointing" if getattr(net, "is_gradient_checkpointing", False) else "",
        f"{compiled} blocks compiled" if compiled else "",
        "weights in host memory" if is_offloaded(net) else "",
    ]
    return ", ".join(part for part in parts if part)

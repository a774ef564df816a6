"""A frozen network whose weights lie in host memory and visit the device for its forwards, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models import shaped

_AWAY = "weights_stay_away"  # the name of the mark that `offload` leaves on a network


def offload(net: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Weights of `net` are on `device` only while the part that holds them runs: one of `blocks`, or a single layer.

    The network has to lie in host memory, and stays there; its inputs are on `device`. What autograd keeps of a
    forward is on `device` and goes with its graph.
    """
    blocks = list(blocks)
    inside = {id(part) for block in blocks for part in block.modules()}
    layers = [module for module in net.modules() if id(module) not in inside and _tensors(module)]
    _pin(net, device)
    for unit, holders in [*((block, list(block.modules())) for block in blocks), *((one, [one]) for one in layers)]:
        visit = _Visit([holder for holder in holders if _tensors(holder)], device)
        unit.register_forward_pre_hook(visit.begin, with_kwargs=True)
        unit.register_forward_hook(visit.end, always_call=True)
    setattr(net, _AWAY, True)


def is_offloaded(net: nn.Module) -> bool:
    return getattr(net, _AWAY, False)


def place(module: nn.Module, device: torch.device) -> None:
    """Moves `module` to `device`, unless the network in it stays in host memory."""
    if not any(is_offloaded(part) for part in module.modules()):
        shaped.place(module, device)


def _pin(net: nn.Module, device: torch.device) -> None:
    """Makes copies to a GPU quick; the program does not wait for them."""
    for tensor in (*net.parameters(), *net.buffers()):
        if device.type == "cuda":
            tensor.data = tensor.data.cpu().pin_memory()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that `module` itself holds."""
    return {k: v for k, v in {**module._parameters, **module._buffers}.items() if v is not None}


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, non_blocking=True)


class _Visit:
    """Swaps the tensors of `holders` for copies where the inputs are, and back; parameters themselves never change.

    Without inputs the copies are on `device`.
    """

    def __init__(self, holders: list[nn.Module], device: torch.device):
        self.holders, self.device = holders, device
        self.home: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        device = next((v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), self.device)
        tables = [table for holder in self.holders for table in (holder._parameters, holder._buffers)]
        away = [{k: v if v is None else _copied(v, device) for k, v in table.items()} for table in tables]
        self.home = [(table, dict(table)) for table in tables]
        for table, there in zip(tables, away, strict=True):
            table.update(there)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        for table, here in self.home:
            table.update(here)
        self.home = []

"""Networks whose weights are only shaped, on the meta device, to be filled when they lie where they belong.

Their buffers are real from the start: most of them are computed and stand in no file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

META = torch.device("meta")


def is_shaped(*modules: nn.Module) -> bool:
    """Whether a weight of `modules` is still without memory."""
    return any(weight.is_meta for module in modules for weight in module.parameters())


def is_unknown(tensor: Tensor) -> bool:
    """Whether `tensor` has a shape alone, and no values to be asked for."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def empty(net: nn.Module) -> None:
    """Lets go of the weights of `net`, and keeps their shapes."""
    for part in net.modules():
        part._parameters.update({name: _shape(p) for name, p in part._parameters.items() if p is not None})  # type: ignore


def copy_of(net: nn.Module) -> nn.Module:
    """A copy of `net` that is only shaped, its buffers too."""
    with _standing_in([net], _shape):
        return copy.deepcopy(net)


def place(module: nn.Module, device: torch.device) -> None:
    """Moves `module` to `device`, all but the weights that are only shaped."""
    if is_shaped(module) and device.type != "meta":
        module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    else:
        module.to(device)


@contextmanager
def shapes_of(modules: Iterable[nn.Module], device: torch.device) -> Iterator[torch.device]:
    """Gives the device on which forwards of `modules` run meanwhile: their own, or meta where one is only shaped."""
    modules = list(modules)
    if not is_shaped(*modules):
        yield device
        return
    with _standing_in(modules, _shape):
        yield META


@contextmanager
def hollow(net: nn.Module) -> Iterator[None]:
    """Meanwhile weights that are only shaped say that they lie on the CPU, so that what is put beside them is real."""
    with _standing_in([net], lambda t: nn.Parameter(t.new_zeros((), device="cpu").expand_as(t)) if t.is_meta else t):
        yield


@contextmanager
def _standing_in(modules: Iterable[nn.Module], stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Meanwhile each tensor of `modules` is `stand_in` of it; the tensors themselves do not change."""
    parts = {part: None for module in modules for part in module.modules()}
    tables = [table for part in parts for table in (part._parameters, part._buffers)]
    before = [{name: tensor for name, tensor in table.items() if tensor is not None} for table in tables]
    try:
        for table, own in zip(tables, before, strict=True):
            table.update({name: stand_in(tensor) for name, tensor in own.items()})  # type: ignore[arg-type]
        yield
    finally:
        for table, own in zip(tables, before, strict=True):
            table.update(own)  # type: ignore[arg-type]


def _shape(tensor: Tensor) -> Tensor:
    shape = tensor.detach().to(META)
    return nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape

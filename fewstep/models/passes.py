"""Counting network passes: the cost of a method that does not depend on the machine."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fewstep.models.backbone import Backbone


class PassCounter:
    """Counts samples that go through `nets` while it is on: `forwards`, and `backwards` to them.

    A pass is one sample through one network once; a forward that stops at a tapped block does not return and is
    counted in `stopped` instead.
    """

    def __init__(self, nets: Iterable[nn.Module]):
        self.forwards = self.backwards = self.stopped = 0
        self._handles = []
        for net in nets:
            self._handles.append(net.register_forward_pre_hook(self._begin))
            self._handles.append(net.register_forward_hook(self._end))

    @property
    def total(self) -> int:
        return self.forwards + self.backwards

    def _begin(self, module: nn.Module, args: tuple) -> None:
        self.stopped += len(args[0])

    def _end(self, module: nn.Module, args: tuple, output: object) -> None:
        self.stopped -= len(args[0])
        self.forwards += len(args[0])
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def networks_of(*modules: nn.Module | None) -> list[nn.Module]:
    """The plain diffusers networks inside backbones and their composites, each once."""
    found: dict[int, nn.Module] = {}
    for module in modules:
        for part in module.modules() if module is not None else ():
            if isinstance(part, Backbone) and isinstance(net := getattr(part, "net", None), nn.Module):
                found[id(net)] = net
    return list(found.values())

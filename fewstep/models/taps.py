"""Features of named blocks by forward hooks, and forwards that end as soon as the last one is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Stopped(Exception):
    """Raised by the hook of the last tapped block; exact under autograd, checkpointing, compile and FSDP2."""


def first(block: nn.Module, output: Any) -> Tensor:
    """The output of a block, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def tapped(
    net: nn.Module, taps: Sequence[str], stop: bool, feature: Callable[[nn.Module, Any], Tensor] = first
) -> Iterator[dict[str, Tensor]]:
    """Collects `feature(block, output)` of the blocks `taps` of `net` while inside.

    Raises ValueError for an unknown block.
    """
    features: dict[str, Tensor] = {}
    handles = []

    def hook(name: str):
        def keep(module: nn.Module, args: object, output: object) -> None:
            features[name] = feature(module, output)
            if stop and len(features) == len(taps):
                raise Stopped

        return keep

    try:
        for name in taps:
            try:
                block = net.get_submodule(name)
            except AttributeError:
                blocks = ", ".join(n for n, _ in net.named_children())
                raise ValueError(f"no block '{name}' in {type(net).__name__}: its blocks are {blocks}") from None
            handles.append(block.register_forward_hook(hook(name)))
        yield features
    finally:
        for handle in handles:
            handle.remove()

"""Networks that have shapes and storages but no memory: what a step would allocate can be counted beforehand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class Answers(TorchDispatchMode):
    """Answers what is asked of a value that is not there: numbers are finite, two tensors are equal.

    Integers are -1, the last of whatever they count: the longest rollout, the last expert.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else -1
        if func is torch.ops.aten.equal.default:
            return True
        return func(*args, **(kwargs or {}))


def become_fake(modules: Iterable[nn.Module], mode: FakeTensorMode, device: torch.device) -> None:
    """Replaces every parameter and buffer of `modules` by one of `mode` on `device`; what is shared stays shared."""
    made: dict[Tensor, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in made:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            # A parameter of fake data is a fake tensor that says it is a parameter.
            learns = isinstance(tensor, nn.Parameter)
            made[tensor] = nn.Parameter(empty, tensor.requires_grad) if learns else empty
        return made[tensor]

    for part in {part: None for module in modules for part in module.modules()}:
        for table in (part._parameters, part._buffers):
            table.update({name: fake(tensor) for name, tensor in table.items() if tensor is not None})  # type: ignore

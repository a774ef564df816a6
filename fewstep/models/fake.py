"""Networks that have shapes and storages but no memory: what a step would allocate can be counted beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


class Fake(FakeTensorMode):
    """Tensors that are made while entered have shapes alone; what is asked of their values gets a fixed answer.

    Numbers are 1 and so finite, two tensors are equal, and integers are -1, the last of whatever they count: the
    longest rollout, the last expert. What is picked by values is all there is: none is zero, none is there twice.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else -1
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten.unique_consecutive.default:
            return tuple(args[0].new_empty(shape) for shape in (args[0].shape, 0, 0))
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        return super().dispatch(func, types, args, kwargs or {})


def become_fake(modules: Iterable[nn.Module], mode: Fake, device: torch.device) -> None:
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

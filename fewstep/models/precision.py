"""What a network computes in. Learned weights stay float32; a network that only answers may keep low ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_COMPUTES = "computes_in"  # the name of the mark that `compute_in` leaves on a network and its copies


def compute_in(net: nn.Module, dtype: torch.dtype) -> None:
    """Forwards of `net` in `dtype` by autocast, weights and gradients float32 as before: for one that learns."""
    setattr(net, _COMPUTES, dtype)


def computing(net: nn.Module, device: str) -> AbstractContextManager[Any]:
    """The context that a forward of `net` on a `device` such as cuda needs."""
    dtype = getattr(net, _COMPUTES, None)
    # The meta device computes nothing, and autocast does not know it.
    return nullcontext() if dtype is None or device == "meta" else torch.autocast(device, dtype)


def lower(net: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights of `net` to `dtype`, all but those that its class keeps in float32, and the inputs with them.

    Buffers are left as they are: they are small, and positions in bfloat16 would be wrong.
    """
    for name, weight in net.named_parameters():
        if not stays_float32(net, name):
            weight.data = weight.data.to(dtype)
    net.register_forward_pre_hook(_cast_to_weights, with_kwargs=True)


def stays_float32(net: nn.Module, name: str) -> bool:
    """Whether the class of `net` wants the weight of that name in float32 in any case."""
    return bool(set(getattr(net, "_keep_in_fp32_modules", None) or ()) & set(name.split(".")))


def dtype_of(net: nn.Module) -> torch.dtype:
    """What `net` computes in."""
    low = (weight.dtype for weight in net.parameters() if weight.dtype != torch.float32)
    return getattr(net, _COMPUTES, None) or next(low, torch.float32)


def cast_inputs(dtype: torch.dtype) -> Callable[..., Any]:
    """A forward pre-hook that casts a module's inputs to `dtype`, all but the vectors: 999 is 1000 in bfloat16."""

    def cast(value: Any) -> Any:
        if isinstance(value, list):  # some networks are given their images one by one
            return [cast(part) for part in value]
        lower = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        return value.to(dtype) if lower else value

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return tuple(cast(value) for value in args), {name: cast(value) for name, value in kwargs.items()}

    return hook


def _cast_to_weights(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return cast_inputs(net.dtype)(net, args, kwargs)  # type: ignore[arg-type]


def joint(value: Tensor) -> Tensor:
    """What leaves a network: float32, or more where it was more."""
    return value.to(torch.promote_types(value.dtype, torch.float32))

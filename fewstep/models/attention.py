"""Which kernel computes the attention of a network. Nothing global is set, so the networks of a run may differ.

diffusers' own switch is no help: half of the families ignore it, and it sets a default of the whole process. But every
processor of the table below ends in torch's `scaled_dot_product_attention`. A torch function mode, on only while the
processor runs, sends that one call to the kernel that was asked for; it holds under autograd, forward-mode derivatives,
gradient checkpointing and torch.compile.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.core.errors import UserError
from fewstep.models.families import FAMILIES

Attention = Literal["sdpa", "math", "flash", "xformers", "flex"]

PROCESSORS = frozenset(name for family in FAMILIES.values() for name in family.processors)
"""The attention processors that end in the function that is redirected."""


LINEAR = frozenset(name for family in FAMILIES.values() for name in family.linear)
"""Those without a softmax, for which there is nothing to choose."""


def _math(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, **given)


def _flash(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    _refuse_mask("flash", given)
    query, key = query.to(value.dtype), key.to(value.dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, **given)


def _xformers(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    import xformers.ops

    _refuse_mask("xformers", given)
    # Heads come second in torch, third in xformers.
    query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
    dropout, scale = given.get("dropout_p", 0.0), given.get("scale")
    return xformers.ops.memory_efficient_attention(query, key, value, p=dropout, scale=scale).transpose(1, 2)


def _flex(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    _refuse_mask("flex", given)
    return _flex_attention()(query.to(value.dtype), key.to(value.dtype), value, scale=given.get("scale"))


@functools.cache
def _flex_attention() -> Callable[..., Any]:
    """Compiled by itself: uncompiled, it writes all scores down."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _refuse_mask(kernel: str, given: dict[str, Any]) -> None:
    if given.get("attn_mask") is not None or given.get("is_causal"):
        raise UserError(f"attention {kernel} takes no mask, and this network sets one: use sdpa or math")


KERNELS: dict[str, Callable[..., Tensor]] = {"math": _math, "flash": _flash, "xformers": _xformers, "flex": _flex}
"""(query, key, value) (B, heads, L, D) and the keywords of torch's function -> (B, heads, L, D)."""


class _Redirected(TorchFunctionMode):
    """Calls of torch's `scaled_dot_product_attention` inside go to a kernel."""

    def __init__(self, kernel: str):
        super().__init__()
        self.kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        # A network on the meta device has shapes alone, for which there is no kernel.
        return func(**given) if given["query"].is_meta else KERNELS[self.kernel](**given)


@functools.cache
def _switched(kind: Any, kernel: str) -> type:
    """The processor class `kind`, under the same name, with attention by `kernel`."""

    @functools.wraps(kind.__call__)  # diffusers reads the signature
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Redirected(kernel):
            return kind.__call__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "kernel": kernel, "plain": kind})


def _modules(net: nn.Module) -> list[Any]:
    attending = [module for module in net.modules() if hasattr(module, "processor")]
    return [module for module in attending if type(module.processor).__name__ not in LINEAR]


def use(net: nn.Module, kernel: Attention) -> None:
    """All attention of `net`, and of its copies, by `kernel`; sdpa leaves the choice to torch, call by call."""
    for module in _modules(net):
        processor = copy.copy(module.processor)
        plain: Any = getattr(type(processor), "plain", type(processor))
        processor.__class__ = plain if kernel == "sdpa" else _switched(plain, kernel)
        if hasattr(processor, "_attention_backend"):
            # Said aloud, or somebody's process-wide default would reach these processors.
            processor._attention_backend = "native"
        module.processor = processor


@contextmanager
def exact(net: nn.Module) -> Iterator[None]:
    """Plain matrix products for all attention of `net` inside: they alone have forward-mode derivatives."""
    before = [(module, module.processor) for module in _modules(net)]
    use(net, "math")
    try:
        yield
    finally:
        for module, processor in before:
            module.processor = processor


def refuse(net: nn.Module, kernel: Attention, device: str, dtype: torch.dtype, what: str) -> None:
    """Raises UserError when `kernel` cannot compute the attention of `net` on `device` (cpu or cuda) in `dtype`.

    `what` opens the sentence, such as "model.attention=flash".
    """
    kinds = {type(module.processor).__name__ for module in _modules(net)} - PROCESSORS
    sizes = {module.inner_dim // module.heads for module in _modules(net)}
    if kernel == "sdpa":
        return
    if device == "cpu" and kernel != "math":
        raise UserError(f"{what} needs a GPU, but this run is on the CPU: use sdpa or math")
    if kinds:
        raise UserError(f"{what} does not reach the {min(kinds)} of this {type(net).__name__}: use sdpa")
    if kernel == "flash" and dtype == torch.float32:
        raise UserError(f"{what} computes in half precision alone: set precision=bf16 beside it, or use sdpa or math")
    if wrong := [size for size in sizes if not _fits(kernel, size)]:
        raise UserError(f"{what} cannot do heads of {wrong[0]} channels ({_LIMITS[kernel]}): use sdpa or math")


def try_out(net: nn.Module, kernel: Attention, device: torch.device, dtype: torch.dtype, what: str) -> None:
    """Runs `kernel` once on a few tokens of `net`'s heads, forwards and backwards. Raises UserError where it fails."""
    for size in {module.inner_dim // module.heads for module in _modules(net)} if kernel in KERNELS else ():
        tokens = torch.randn(1, 2, 16, size, device=device, dtype=dtype, requires_grad=True)
        try:
            KERNELS[kernel](tokens, tokens, tokens).sum().backward()
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")
            raise UserError(f"{what} does not run here with heads of {size} channels ({reason}): use sdpa") from None


_PICKED = {"flash": "flash", "efficient": "efficient", "cudnn": "cudnn", "_math": "math"}


class _Seen(TorchDispatchMode):
    """Notes the attention operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def picked(size: int, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that torch takes by itself for heads of `size` channels: flash, efficient, cudnn or math."""
    tokens = torch.randn(1, 2, 16, size, device=device, dtype=dtype, requires_grad=True)
    with _Seen() as seen:
        F.scaled_dot_product_attention(tokens, tokens, tokens)
    operators = [name for name in seen.names if "scaled_dot_product" in name]
    return next((kind for mark, kind in _PICKED.items() if any(mark in name for name in operators)), "math")


_LIMITS = {"flash": "at most 256", "xformers": "a multiple of 8", "flex": "at least 16"}


def _fits(kernel: str, size: int) -> bool:
    return {"flash": size <= 256, "xformers": size % 8 == 0, "flex": size >= 16}.get(kernel, True)


def describe(net: nn.Module, dtype: torch.dtype) -> str:
    """The kernels that compute the attention of `net` in `dtype`, and in how many modules; of sdpa what torch takes."""
    device = next(net.parameters()).device
    kernels: Counter[str] = Counter()
    for module in _modules(net):
        kernel = getattr(module.processor, "kernel", "sdpa")
        taken = "" if kernel != "sdpa" or device.type == "meta" else _taken(module, device, dtype)
        kernels[kernel + taken] += 1
    return ", ".join(f"attention {name} in {count} modules" for name, count in kernels.items()) or "no attention"


def _taken(module: Any, device: torch.device, dtype: torch.dtype) -> str:
    return f" ({picked(module.inner_dim // module.heads, device, dtype)})" if hasattr(module, "inner_dim") else ""

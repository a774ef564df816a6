"""Negative-away steer attention (NASA; Nguyen et al. 2024, arXiv:2412.02687): what an image shall not show.

In every cross-attention Z = Z+ - a Z-: Z+ attends to the prompt and Z- to a negative one, by the same projections.
A student of one step has no guidance to lead it away from anything; this acts inside of its features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.models.backbone import Backbone, Composite
from fewstep.models.passes import networks_of

_PROCESSOR = "AttnProcessor2_0"
_TOLD = "encoder_hidden_states"


class NegativeAttention(Composite):
    """`inner`, whose cross-attention loses `scale` times what it finds of `negative`, encoded tokens (1, L, D).

    Raises UserError for networks without a cross-attention to such tokens.
    """

    def __init__(self, inner: Backbone, scale: float, negative: Tensor):
        super().__init__(inner)
        self.scale = scale
        self.register_buffer("negative", negative, persistent=False)
        self.layers = [layer for net in networks_of(inner) for layer in cross_attention(net, negative.shape[-1])]

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        with subtracted(self.layers, self.scale, self.negative):
            return self.inner(x_t, t, cond, to=to, taps=taps, stop=stop)


def cross_attention(net: nn.Module, width: int) -> list[Any]:
    """The attention modules of `net` that read tokens of that width. Raises UserError where there are none."""
    found = [
        module
        for module in net.modules()
        if getattr(module, "is_cross_attention", False)
        and type(module.processor).__name__ == _PROCESSOR
        and module.to_k.in_features == width
        and not module.residual_connection
    ]
    if not found:
        raise UserError(
            f"negative attention needs layers in which the image alone reads the prompt, and this {type(net).__name__} "
            "has none: use it with networks such as UNet2DConditionModel, or leave it out"
        )
    return found


@contextmanager
def subtracted(layers: Sequence[Any], scale: float, negative: Tensor) -> Iterator[None]:
    """Inside, each of `layers` gives to_out(Z+ - scale Z-)."""

    def steer(layer: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        tokens = negative.to(output).expand(len(output), -1, -1)
        away = layer.forward(*args, **{**kwargs, _TOLD: tokens})
        # to_out is affine and has been used twice: its bias belongs to Z = 0.
        bias = layer.to_out[0].bias
        return output - scale * (away if bias is None else away - bias.to(output.dtype))

    handles = [layer.register_forward_hook(steer, with_kwargs=True) for layer in layers if scale]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

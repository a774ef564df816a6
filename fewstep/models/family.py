"""What the wrapper has to know of one diffusers class: a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models.taps import first


def no_classes(net: nn.Module) -> None:
    """A network that is told prompts has no label embeddings."""


def in_channels(net: nn.Module) -> int:
    return net.config.in_channels


def linearly(unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance u + w (c - u)."""
    return unconditional + scale * (conditional - unconditional)


def middle(blocks: str) -> Callable[[nn.Module], str]:
    """The block in the middle of the list that is called `blocks`."""
    return lambda net: f"{blocks}.{len(net.get_submodule(blocks)) // 2}"


def image_stream(block: nn.Module, output: Any) -> Tensor:
    """Of a joint block that returns its text first, and perhaps no text at all, the image."""
    return output[1] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Family:
    """How one diffusers class is called.

    `call(net, x, timestep, cond)` returns the raw output (B, *S) for x (B, *S), where `timestep` (B,) is the index of a
    VP process and 1000 t of a flow; `tap` is the usual block for a discriminator; `time_embedding` names the module
    whose output is the time embedding; `blocks` are the classes of its repeated blocks, which are compiled;
    `processors` those of its attention that end in torch's `scaled_dot_product_attention`, `linear` those without a
    softmax, which no kernel computes; `classes` counts the label
    embeddings; `feature(block, output)` is the tensor that a tap of `block` gives; `reads` is the argument of its
    config that says how wide the texts are, None where it reads no prompts; `channels` counts those of its latents;
    `guide(u, c, w)` is its pipeline's guidance.
    """

    call: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    tap: Callable[[nn.Module], str]
    time_embedding: str
    blocks: tuple[str, ...]
    processors: tuple[str, ...]
    linear: tuple[str, ...] = ()
    classes: Callable[[nn.Module], int | None] = no_classes
    feature: Callable[[nn.Module, Any], Tensor] = first
    reads: str | None = None
    channels: Callable[[nn.Module], int] = in_channels
    guide: Callable[[Tensor, Tensor, float | Tensor], Tensor] = linearly

    @property
    def prompts(self) -> bool:
        """Whether it reads prompts."""
        return self.reads is not None


def named_inputs(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    """The call of a network whose arguments have the names of the inputs."""
    return net(x, timestep=timestep, return_dict=False, **cond.inputs)[0]

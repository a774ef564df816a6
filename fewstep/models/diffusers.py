"""Any diffusers denoiser as a Backbone: one row of `FAMILIES` each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import VP, NoiseSchedule
from fewstep.models.backbone import Backbone
from fewstep.models.embedders import TimeEmbedder
from fewstep.models.taps import Stopped, tapped


@dataclass(frozen=True)
class Family:
    """How one diffusers class is called.

    `call(net, x, timestep, cond)` returns the raw output; `tap` is the usual block for a discriminator;
    `time_embedding` names the module whose output is the time embedding; `classes` counts the label embeddings.
    """

    call: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    tap: Callable[[nn.Module], str]
    time_embedding: str
    classes: Callable[[nn.Module], int | None]


def _unet2d(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    return net(x, timestep, class_labels=cond.inputs.get("class_labels"), return_dict=False)[0]


def _dit(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    output = net(x, timestep=timestep, class_labels=cond.inputs["class_labels"], return_dict=False)[0]
    # DiT may learn its variance: the first half of the channels is the prediction.
    return output[:, : x.shape[1]]


FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family(
        call=_unet2d,
        tap=lambda net: "mid_block",
        time_embedding="time_embedding",
        classes=lambda net: net.config.num_class_embeds,
    ),
    "DiTTransformer2DModel": Family(
        call=_dit,
        tap=lambda net: f"transformer_blocks.{len(net.transformer_blocks) // 2}",
        time_embedding="transformer_blocks.0.norm1.emb",
        classes=lambda net: net.config.num_embeds_ada_norm + 1,
    ),
}


SECOND_TIME = "second_time"  # key of the dial `to`: a ModuleDict has a method of that name


def network_time(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The timestep (B,) float32 a diffusers network is told: index T t - 1 for VP, 1000 t otherwise."""
    if isinstance(schedule, VP):
        return (t.double() * schedule.steps - 1).clamp(min=0).float()
    return (t.double() * 1000).float()


class DiffusersBackbone(Backbone):
    """`net` is the plain diffusers module; nothing of its forward is rewritten.

    `null_label` is the class that means "no class". Dials (further per-sample scalars, and the second time `to`)
    enter through zero-initialised embedders added to the time embedding: see `add_dial`.
    Raises ValueError for a class without a row in FAMILIES.
    """

    def __init__(self, net: nn.Module, schedule: NoiseSchedule, kind: Kind, null_label: int | None = None):
        super().__init__()
        name = type(net).__name__
        if name not in FAMILIES:
            raise ValueError(f"no row for {name} in the table of families: it has {', '.join(sorted(FAMILIES))}")
        self.net, self.schedule, self.kind, self.null_label = net, schedule, kind, null_label
        self.family = FAMILIES[name]
        self.dials = nn.ModuleDict()

    def fused(self) -> DiffusersBackbone:
        """This network without adapters: itself, unless it is a voice."""
        return self

    @property
    def tap(self) -> str:
        """The block a discriminator reads by default."""
        return self.family.tap(self.net)

    def add_dial(self, name: str) -> None:
        """Feeds the dial `name`, or the second time `to`, to the network. Starts without any effect."""
        self.dials[SECOND_TIME if name == "to" else name] = TimeEmbedder(self._embedding_width())

    def _embedding_width(self) -> int:
        linears = [m for m in self.net.get_submodule(self.family.time_embedding).modules() if isinstance(m, nn.Linear)]
        return linears[-1].out_features

    def null(self, cond: Condition) -> Condition:
        if self.null_label is None:
            return super().null(cond)
        return cond.with_inputs(class_labels=torch.full_like(cond.inputs["class_labels"], self.null_label))

    def _refuse_unheard(self, cond: Condition, to: Tensor | None) -> None:
        """A scalar the network has no input for would be ignored without a word."""
        unheard = [name for name in cond.dials if name not in self.dials]
        unheard += ["to"] if to is not None and SECOND_TIME not in self.dials else []
        inside = self.family.time_embedding.startswith("transformer_blocks")
        if inside and (cond.dials or to is not None) and self._recomputes():
            raise ValueError("the dials of this family are lost when a checkpointed block is recomputed: switch it off")
        if unheard:
            raise ValueError(f"this network has no dial for {', '.join(unheard)}: call add_dial first")

    def _recomputes(self) -> bool:
        """Whether blocks will run a second time, after the hook that feeds the dials has gone."""
        return torch.is_grad_enabled() and bool(getattr(self.net, "is_gradient_checkpointing", False))

    def _embedding_hook(self, cond: Condition, to: Tensor | None):
        values = {**cond.dials, **({} if to is None else {SECOND_TIME: to})}
        extra = sum(self.dials[name](value) for name, value in values.items())

        def add(module: nn.Module, args: object, output: Tensor) -> Tensor:
            return output + extra

        return self.net.get_submodule(self.family.time_embedding).register_forward_hook(add)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        *,
        to: Tensor | None = None,
        taps: Sequence[str] = (),
        stop: bool = False,
    ) -> Prediction:
        self._refuse_unheard(cond, to)
        timestep = network_time(self.schedule, t)
        handle = self._embedding_hook(cond, to) if cond.dials or to is not None else None
        value = x_t.new_empty(0)
        try:
            with tapped(self.net, taps, stop) as features, suppress(Stopped):
                value = self.family.call(self.net, x_t, timestep, cond)
        finally:
            if handle is not None:
                handle.remove()
        return Prediction(value, self.kind, x_t, t, self.schedule, features)

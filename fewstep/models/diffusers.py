"""Any diffusers denoiser as a Backbone, by its row in the table of families."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import VP, NoiseSchedule
from fewstep.models.backbone import Backbone
from fewstep.models.embedders import TimeEmbedder
from fewstep.models.experts import TimeExperts, model_of, models_of
from fewstep.models.families import FAMILIES, family_of
from fewstep.models.precision import computing, joint
from fewstep.models.taps import Stopped, tapped

SECOND_TIME = "second_time"  # key of the dial `to`: a ModuleDict has a method of that name


def network_time(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The timestep (B,) float32 a diffusers network is told: index T t - 1 for VP, 1000 t otherwise."""
    if isinstance(schedule, VP):
        return (t.double() * schedule.steps - 1).clamp(min=0).float()
    return (t.double() * 1000).float()


def _last_linear(embedding: nn.Module) -> nn.Linear:
    """Whose output, of the time embedding, a dial is added to."""
    return [module for module in embedding.modules() if isinstance(module, nn.Linear)][-1]


class DiffusersBackbone(Backbone):
    """`net` is the plain diffusers module; nothing of its forward is rewritten.

    `null_label` is the class that means "no class". `unconditional` is one row of the inputs that mean "no prompt", or
    a negative one; inputs that it does not name, such as sizes, stay what they are. Dials (further per-sample scalars,
    and the second time `to`) enter through zero-initialised embedders added to the time embedding: see `add_dial`.
    Raises ValueError for a class without a row in FAMILIES.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: NoiseSchedule,
        kind: Kind,
        null_label: int | None = None,
        unconditional: Condition | None = None,
    ):
        super().__init__()
        family = family_of(net)
        if family is None:
            name = type(net).__name__
            raise ValueError(f"no row for {name} in the table of families: it has {', '.join(sorted(FAMILIES))}")
        self.net, self.schedule, self.kind = net, schedule, kind
        self.null_label, self.unconditional = null_label, unconditional
        self.family = family
        self.dials = nn.ModuleDict()

    def fused(self) -> DiffusersBackbone:
        """This network without adapters: itself, unless it is a voice."""
        return self

    @property
    def tap(self) -> str:
        """The block a discriminator reads by default."""
        return self.family.tap(model_of(self.net))

    @property
    def embedding(self) -> nn.Module:
        """Whose output is the time embedding; of several experts, that of the one that speaks."""
        return self.net.get_submodule(self._within(self.family.time_embedding))

    def _within(self, name: str) -> str:
        """What a part of the network is called in `net`."""
        return f"experts.{self.net.speaking}.{name}" if isinstance(self.net, TimeExperts) else name

    def add_dial(self, name: str) -> None:
        """Feeds the dial `name`, or the second time `to`, to the network. Starts without any effect."""
        self.dials[SECOND_TIME if name == "to" else name] = TimeEmbedder(self._embedding_width())

    @torch.no_grad()
    def folded(self, name: str, told: float) -> DiffusersBackbone:
        """A network that says what this one says when the dial `name`, or `to`, is `told`: it becomes a bias."""
        alone = copy.deepcopy(self)
        embedder = alone.dials.pop(SECOND_TIME if name == "to" else name)
        for model in models_of(alone.net):
            last = _last_linear(model.get_submodule(self.family.time_embedding))
            second = embedder(last.weight.new_full((1,), told))[0]
            last.bias = nn.Parameter(second if last.bias is None else last.bias + second.to(last.bias.dtype))
        return alone

    def _embedding_width(self) -> int:
        return _last_linear(self.embedding).out_features

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
        """As the pipeline of the family guides."""
        return self.family.guide(unconditional, conditional, scale)

    def null(self, cond: Condition) -> Condition:
        if self.unconditional is not None:
            return self._without_prompt(cond, self.unconditional)
        if self.null_label is None:
            return super().null(cond)
        return cond.with_inputs(class_labels=torch.full_like(cond.inputs["class_labels"], self.null_label))

    def _without_prompt(self, cond: Condition, unconditional: Condition) -> Condition:
        # Kept where the conditions are, for a copy of every batch would stall the device.
        here = unconditional.to(next(iter(cond.inputs.values())).device)
        self.unconditional = here
        return cond.with_inputs(**{name: row.expand_as(cond.inputs[name]) for name, row in here.inputs.items()})

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
            between = [1] * (output.ndim - 2)  # some embed a row of times for every sample
            return output + extra.to(output.dtype).view(len(extra), *between, -1)

        return self.embedding.register_forward_hook(add)

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
        if not isinstance(self.net, TimeExperts):
            return self._speak(x_t, t, cond, to, taps, stop)

        def speak(rows: Tensor) -> Prediction:
            return self._speak(x_t[rows], t[rows], cond[rows], None if to is None else to[rows], taps, stop)

        return self.net.shared_out(t, speak)

    def _speak(
        self, x_t: Tensor, t: Tensor, cond: Condition, to: Tensor | None, taps: Sequence[str], stop: bool
    ) -> Prediction:
        timestep = network_time(self.schedule, t)
        handle = self._embedding_hook(cond, to) if cond.dials or to is not None else None
        value = x_t.new_empty(0)
        try:
            with (
                computing(self.net, x_t.device.type),
                tapped(self.net, [self._within(name) for name in taps], stop, self.family.feature) as features,
                suppress(Stopped),
            ):
                value = self.family.call(self.net, x_t, timestep, cond)
        finally:
            if handle is not None:
                handle.remove()
        features = {name: joint(features[self._within(name)]) for name in taps}
        return Prediction(joint(value), self.kind, x_t, t, self.schedule, features)

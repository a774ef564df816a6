"""Several voices of one network: its own frozen weights, and LoRA adapters that speak through it in turn."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.core.errors import UserError
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.lora import LoraSpec
from fewstep.models.shaped import hollow


class Shared(nn.Module):
    """One network for several roles: frozen, in evaluation mode, with one LoRA adapter for each of `voices`.

    `as_(name)` is a voice, `as_(None)` the bare network. The layers of `backbone.net` are replaced in place; while
    no voice speaks the network says what it said before. Cast the network before and move `Shared` itself: adapters
    are float32, and a voice has no other tensors. Raises UserError for a name or targets that cannot be.
    """

    def __init__(self, backbone: DiffusersBackbone, voices: Mapping[str, LoraSpec]):
        super().__init__()
        net = backbone.net
        if _lora_layers(net):
            raise ValueError("this network is shared already: ask its Shared for the voices")
        names = {voice: _targets(net, voice, spec) for voice, spec in voices.items()}
        for voice, spec in voices.items():
            _inject(net, voice, spec, names[voice])
        self.backbone = backbone.eval().requires_grad_(False)
        self.layers: dict[str, Any] = _lora_layers(net)
        # Every layer holds this very list, so that one assignment changes the voice of all of them. peft's own
        # switches flip requires_grad, and backward, which comes later, would then skip the adapter without a word.
        self._speaking: list[str] = []
        for layer in self.layers.values():
            layer._active_adapter = self._speaking
        self.dials = nn.ModuleDict({voice: copy.deepcopy(backbone.dials).requires_grad_() for voice in voices})
        self._halves = {voice: self._halves_of(voice) for voice in voices}
        for half in itertools.chain(*self._halves.values()):
            half.float().weight.requires_grad_()
            half.__class__ = _following(type(half))  # type: ignore[arg-type]
        for layer in self.layers.values():
            layer.cast_input_dtype_enabled = False  # to float32, as the adapter's weights are

    @property
    def voices(self) -> tuple[str, ...]:
        """The names of the voices, copies included."""
        return tuple(self.dials)

    def as_(self, voice: str | None) -> Voice:
        """The voice of that name; None is the bare network. Raises ValueError for a name it does not have."""
        if voice is not None and voice not in self.dials:
            raise ValueError(f"this network has no voice '{voice}': it has {', '.join(self.voices) or 'none'}")
        return Voice(self, voice)

    @contextmanager
    def speaking(self, voice: str | None) -> Iterator[None]:
        """Forwards of the network inside are those of `voice`; the one that spoke before speaks after."""
        before = list(self._speaking)
        self._speaking[:] = [] if voice is None else [voice]
        try:
            yield
        finally:
            self._speaking[:] = before

    def enable_gradient_checkpointing(self) -> None:
        """For every voice. What is recomputed speaks with the voice of its forward, frozen if it was frozen then."""
        self.backbone.net.enable_gradient_checkpointing(self._checkpoint)

    def _checkpoint(self, block: Callable, *args: Any, **kwargs: Any) -> Any:
        voice = self._speaking[0] if self._speaking else None
        trained = self._trained(voice)
        told = tuple(self._embedding()._forward_hooks.values())

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), _Reusable(lambda: self._again(voice, trained, told))

        return checkpoint(block, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    @contextmanager
    def _again(self, voice: str | None, trained: list[bool], told: Sequence[Callable]) -> Iterator[None]:
        """The state of an earlier forward: its voice, which of its weights were trained, what its dials said."""
        now, embedding = self._trained(voice), self._embedding()
        # The time embedding of a DiT lies in a block, which is recomputed when the hooks of its dials are gone.
        gone = [hook for hook in told if hook not in embedding._forward_hooks.values()]
        handles = [embedding.register_forward_hook(hook) for hook in gone]
        try:
            self._train(voice, now, trained)
            with self.speaking(voice):
                yield
        finally:
            self._train(voice, trained, now)
            for handle in handles:
                handle.remove()

    def _embedding(self) -> nn.Module:
        return self.backbone.embedding

    def _halves_of(self, voice: str) -> list[nn.Module]:
        """A and B of every layer that `voice` has."""
        spoken = [layer for layer in self.layers.values() if voice in layer.lora_A]
        return [half for layer in spoken for half in (layer.lora_A[voice], layer.lora_B[voice])]

    def _trained(self, voice: str | None) -> list[bool]:
        return [half.weight.requires_grad for half in self._halves[voice]] if voice is not None else []

    def _train(self, voice: str | None, now: list[bool], then: list[bool]) -> None:
        if voice is not None and now != then:
            for half, trained in zip(self._halves[voice], then, strict=True):
                half.weight.requires_grad_(trained)

    def _twin(self, voice: str) -> str:
        """Another voice that says the same, under a name of its own; draws no random number."""
        twin = next(name for n in itertools.count(2) if (name := f"{voice}_{n}") not in self.dials)
        self.dials[twin] = copy.deepcopy(self.dials[voice])
        for layer in self.layers.values():
            for label in (*layer.adapter_layer_names, *layer.other_param_names):
                table = getattr(layer, label)
                if voice in table:
                    table[twin] = copy.deepcopy(table[voice])
        self._halves[twin] = self._halves_of(twin)
        return twin


class Voice(DiffusersBackbone):
    """One voice of a `Shared` network, None being the bare one; its dials are its own from the start.

    Parameters, state, `to` and `train` concern the adapter and the dials alone: the network belongs to all. A copy
    (a follower) is another adapter in the same network, so it costs the adapter and nothing of the network.
    """

    shared: Shared

    def __init__(self, shared: Shared, voice: str | None):
        backbone = shared.backbone
        super().__init__(backbone.net, backbone.schedule, backbone.kind, backbone.null_label, backbone.unconditional)
        # Past nn.Module's bookkeeping: registered modules would be among the parameters of the voice.
        object.__setattr__(self, "net", self._modules.pop("net"))
        object.__setattr__(self, "shared", shared)
        self.voice = voice
        self.dials = backbone.dials if voice is None else shared.dials[voice]
        self.adapter = _tree(shared.layers, voice)

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        with self.shared.speaking(self.voice):
            return super().forward(x_t, t, cond, to=to, taps=taps, stop=stop)

    def _recomputes(self) -> bool:
        """Never without the dials: `Shared` hangs their hook up again for the recomputation."""
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Voice:
        twin = None if self.voice is None else self.shared._twin(self.voice)
        return self.shared.as_(twin).train(self.training)

    @torch.no_grad()
    def fused(self) -> DiffusersBackbone:
        """A float32 network of its own, without adapters, whose weights W + (alpha / rank) B A say the same."""
        net = copy.deepcopy(self.net).float()
        net.disable_gradient_checkpointing()
        for name, layer in _lora_layers(net).items():
            if self.voice in layer.lora_A:
                layer.base_layer.weight += layer.get_delta_weight(self.voice)
            net.set_submodule(name, layer.base_layer)
        backbone = DiffusersBackbone(net, self.schedule, self.kind, self.null_label, self.unconditional)
        backbone.dials = copy.deepcopy(self.dials)
        return backbone.eval()


@functools.cache
def _following(kind: Any) -> type:
    """The layer class `kind`, under the same name, which computes in the precision of its input."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight) if issubclass(kind, nn.Linear) else self._conv_forward(x, weight, None)

    return type(kind.__name__, (kind,), {"forward": forward})


class _Reusable:
    """A context that can be entered again: torch does so at every backward through a graph that is kept."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]):
        self.make = make

    def __enter__(self) -> None:
        self.entered = self.make()
        self.entered.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.entered.__exit__(*error)


def _lora_layers(net: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in net.named_modules() if isinstance(module, LoraLayer)}


def _targets(net: nn.Module, voice: str, spec: LoraSpec) -> list[str]:
    """The full names of the layers that `spec` means. Raises UserError for a target without any."""
    if not voice.isidentifier() or hasattr(nn.ModuleDict(), voice):
        raise UserError(f"a voice is named by a word such as critic, but '{voice}' was given")
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [name for name, module in net.named_modules() if isinstance(module, kinds)]
    found = {t: [n for n in names if fnmatchcase(n, t) or fnmatchcase(n, f"*.{t}")] for t in spec.targets}
    for target in (target for target, matches in found.items() if not matches):
        ends = sorted({re.sub(r".*\.(?=[^.\d])", "", name) for name in names})
        raise UserError(
            f"voice {voice}: no linear or convolution layer of this {type(net).__name__} has a name that ends in "
            f"'{target}': use {', '.join(ends)}"
        )
    return [name for name in names if any(name in matches for matches in found.values())]


def _inject(net: nn.Module, voice: str, spec: LoraSpec, names: Sequence[str]) -> None:
    pattern = "|".join(re.escape(name) for name in names)  # peft takes a list for the ends of names
    with hollow(net):  # peft puts an adapter where its layer is
        inject_adapter_in_model(LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=pattern), net, voice)
    del net.peft_config  # the next injection would warn of it


def _tree(layers: Mapping[str, Any], voice: str | None) -> nn.Module:
    """The adapter of `voice` as modules nested like those of the network: a.b.lora_A and a.b.lora_B."""
    root = nn.Module()
    for name, layer in layers.items():
        if voice not in layer.lora_A:
            continue
        place = root
        for part in name.split("."):
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.lora_A, place.lora_B = layer.lora_A[voice], layer.lora_B[voice]
    return root

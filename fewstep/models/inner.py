"""A network whose trunk runs once a step and whose last blocks, the head, several times (TMD, arXiv:2601.09881).

What the network says of x_t is a velocity y, and there are many that fit. The head walks to one of them: from noise y_1
in N steps y_r = y_s - (s - r) (y_1 - head(y_s, s, r)), while the trunk's blocks answer from memory. The head is told
y_s by a convolution after the trunk and s and r by dials, all of them silent at the start: then it says what the
network says, and so does the walk, whatever N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Prediction
from fewstep.core.schedule import Flow, expand
from fewstep.models.backbone import Backbone, Composite
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.taps import Stopped

NOISE, FROM, TO = "inner_noise", "inner_from", "inner_to"
Memory = dict[str, Any]
"""Block -> its output, in the order in which they ran."""


class Headed(Composite):
    """`inner` walks `steps` inner steps; `split` names the last block of the trunk, by default the family's middle one.

    `x` (B, *S) and `cond` are inputs such as it will see: their features say how large the convolution is.
    Raises UserError for a network that is no flow, and for a block that is not there or has no place for y.
    """

    inner: DiffusersBackbone

    def __init__(self, inner: DiffusersBackbone, steps: int, split: str, x: Tensor, cond: Condition):
        super().__init__(inner)
        if not isinstance(inner.schedule, Flow) or inner.kind != "flow_prediction":
            raise UserError("a head that runs several times walks in velocities: take a flow teacher")
        self.steps, self.split = steps, split or inner.tap
        x, cond = x.to(inner.net.device), cond.to(inner.net.device)
        try:
            with torch.no_grad():
                seen = inner(x, x.new_full((len(x),), 0.5), cond, taps=(self.split,), stop=True).features
        except ValueError as error:
            raise UserError(f"objective.split: {error}") from None
        self.embed = _Embed(x, seen[self.split]).to(x.device)
        for dial in (FROM, TO):
            inner.add_dial(dial)

    @property
    def cost(self) -> float:
        """Of a prediction, in passes of the whole network, counted in weights: 1 + (N - 1) head / all."""
        whole = sum(p.numel() for p in self.inner.net.parameters())
        trunk = sum(p.numel() for name in self.trunk() for p in self.inner.net.get_submodule(name).parameters())
        return 1 + (self.steps - 1) * (whole - trunk) / whole

    def trunk(self) -> list[str]:
        """The blocks up to `split`, in the order of the network's definition."""
        names = _blocks(self.inner.net, self.split)
        return names[: names.index(self.split) + 1]

    def randomness(self, cond: Condition, draw: Draw, purpose: str, shape: tuple[int, ...]) -> Condition:
        return cond.with_inputs(**{NOISE: draw.normal(f"{purpose}.inner", shape)})

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        if taps or stop or to is not None:
            raise ValueError("a network with an inner walk has no features and no second time of its own")
        noise = cond.inputs[NOISE]
        plain = Condition({k: v for k, v in cond.inputs.items() if k != NOISE}, cond.dials)
        moment, y = self.moment(x_t, t, plain), noise
        for i in range(self.steps):
            s, r = (y.new_full((len(y),), 1 - k / self.steps, dtype=torch.float32) for k in (i, i + 1))
            y = y - expand(s - r, y) * (noise - moment(y, s, plain, to=r).value.float())
        return Prediction(y, self.kind, x_t, t, self.schedule)

    def moment(self, x_t: Tensor, t: Tensor, cond: Condition) -> Moment:
        """Runs the trunk at x_t; the head can then be asked for any y_s, s and r."""
        if torch.is_grad_enabled() and getattr(self.inner.net, "is_gradient_checkpointing", False):
            raise UserError(
                "blocks that answer from memory cannot be recomputed: set gradient_checkpointing of the generator to "
                "false"
            )
        memory: Memory = {}
        with _listening(self.inner.net, self.trunk(), memory), suppress(Stopped):
            self.inner(x_t, t, cond, taps=(self.split,), stop=True)
        return Moment(self, memory, x_t, t)


class Moment(Backbone):
    """The head at one x_t: y_s (B, *S), s and `to` = r (B,) -> its answer, whose `value` is meant."""

    def __init__(self, of: Headed, memory: Memory, x_t: Tensor, t: Tensor):
        super().__init__()
        self.schedule, self.kind = of.schedule, of.kind
        self.__dict__["of"] = of  # not a part: its weights are the network's
        self.memory, self.x_t, self.t = memory, x_t, t

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        of = self.of
        memory = {**self.memory, of.split: self._joined(self.memory[of.split], of.embed(x_t))}
        told = Condition(cond.inputs, {**cond.dials, FROM: t, TO: to})
        with _remembering(of.inner.net, memory):
            prediction = of.inner(self.x_t, self.t, told)
        return replace(prediction, x_t=x_t, t=t)

    def _joined(self, output: Any, y: Tensor) -> Any:
        """The split's output with y added to its image stream."""
        if isinstance(output, Tensor):
            return output + y.to(output.dtype)
        stream = self.of.inner.family.feature(self.of.inner.net.get_submodule(self.of.split), output)
        return tuple(part + y.to(part.dtype) if part is stream else part for part in output)


class _Embed(nn.Module):
    """y (B, C, H, W) -> like `feature`, a map (B, D, h, w) or tokens (B, h w, D); zero at the start."""

    def __init__(self, y: Tensor, feature: Tensor):
        super().__init__()
        self.tokens = feature.ndim == 3
        width = feature.shape[2 if self.tokens else 1]
        places = feature[0].numel() // width
        patch = round((y[0, 0].numel() / places) ** 0.5)
        if y.ndim != 4 or patch < 1 or y[0, 0].numel() != places * patch**2:
            raise UserError("a head that runs several times is for images whose blocks see them in square patches")
        self.layer = nn.Conv2d(y.shape[1], width, patch, patch)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, y: Tensor) -> Tensor:
        out = self.layer(y.to(self.layer.weight.dtype))
        return out.flatten(2).transpose(1, 2) if self.tokens else out


def _blocks(net: nn.Module, split: str) -> list[str]:
    """The entries of the network's own lists of blocks, and `split` itself, in the order of definition."""
    lists = [name for name, child in net.named_children() if isinstance(child, nn.ModuleList)]
    inside = [f"{name}.{i}" for name in lists for i in range(len(net.get_submodule(name)))]  # type: ignore[arg-type]
    if split in inside:
        return inside
    # A UNet's middle block stands alone, after the blocks that lead down to it.
    before = [name for name in inside if name.startswith("down_blocks")]
    return [*before, split, *(name for name in inside if name not in before)]


@contextmanager
def _listening(net: nn.Module, names: list[str], memory: Memory) -> Iterator[None]:
    """Keeps the whole output of the blocks `names` while inside; before taps, whose last one ends the forward."""

    def keeper(name: str) -> Callable[..., None]:
        return lambda module, args, output: memory.__setitem__(name, output)

    handles = [net.get_submodule(name).register_forward_hook(keeper(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _remembering(net: nn.Module, memory: Memory) -> Iterator[None]:
    """The blocks of `memory` answer from it while inside."""
    blocks = [net.get_submodule(name) for name in memory]
    for block, output in zip(blocks, memory.values(), strict=True):
        block.__dict__["forward"] = lambda *args, _said=output, **kwargs: _said
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward")

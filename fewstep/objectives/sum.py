"""A weighted sum of objectives that look at the same sample.

A sample that ends at a level s > 0, as a phase of phased DMD does, is x_s to the terms that know such states and its
x0 to the others. By renoising x_s = alpha x0 + sigma z, so both are about one law; an ODE step leaves another one
behind x_s, between which the critic would be torn, and is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.objectives import base
from fewstep.objectives.base import Logs
from fewstep.rollout import Sample, renoise


@dataclass
class Config:
    name: str = "sum"
    terms: list[Any] = field(default_factory=list)
    """each a node like `objective:`, with an optional `scale`; the first one draws the sample"""

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError("objective.terms is empty: name at least one objective")
        for number, node in enumerate(self.terms, 1):
            try:
                _term(node)
            except UserError as error:
                raise UserError(f"objective.terms, term {number} of {len(self.terms)}: {error}") from None


def _term(node: Any) -> tuple[type[base.Objective], Any, float]:
    """Class, config and scale of a term. Raises UserError for a node that is none."""
    if not isinstance(node, dict):
        raise UserError(f"a term has keys of its own: write {{name: {node}}}")
    node = dict(node)
    scale = node.pop("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UserError(f"scale is a number, but {scale} was given")
    if "name" not in node:
        raise UserError(f"name is missing: use one of {', '.join(base.names())}")
    kind = base.find(node["name"]).Objective
    if kind.turns is not base.Objective.turns:
        raise UserError(f"the objective '{node['name']}' plays turns of its own and cannot be a term of a sum")
    if kind.dials:
        raise UserError(f"the objective '{node['name']}' tells its generator more than the time: make it the objective")
    return kind, base.typed(node), float(scale)


class Objective(base.Objective):
    @classmethod
    def needs(cls, config: Config) -> tuple[str, ...]:
        needed = {role for node in config.terms for role in _needs(node)}
        return tuple(role.name for role in fields(base.Triad) if role.name in needed)

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        parts = [_term(node) for node in config.terms]
        self.terms = nn.ModuleList(kind(own, triad, rollout) for kind, own, _ in parts)
        self.scales = [scale for _, _, scale in parts]
        self.partial = all(term.partial for term in self.terms)
        if self.terms[0].partial and not self.partial and rollout.step is not renoise:
            raise UserError(
                "the first of objective.terms makes samples that are not clean yet, and another one compares clean "
                "ones: the two have one law with fresh noise alone, so set model.transition=renoise"
            )
        if any(not term.generates(0) for term in self.terms[1:]) and self.terms[0].generates(0):
            raise UserError(
                "one of objective.terms keeps the generator waiting at first, as disback does while it records: name "
                "it first, because the first term says when the generator moves"
            )
        self.reads = tuple({field for term in self.terms for field in term.reads})
        self.group = math.lcm(*(term.group for term in self.terms))

    def attach(self, x: Tensor, cond: Any) -> None:
        for term in self.terms:
            term.attach(x, cond)

    def learns(self) -> dict[str, list[nn.Module]]:
        joined: dict[str, list[nn.Module]] = {}
        for term in self.terms:
            for player, modules in term.learns().items():
                joined.setdefault(player, []).extend(modules)
        return joined

    def drawn(self) -> dict[str, float]:
        return {role: decay for term in self.terms for role, decay in term.drawn().items()}

    def generates(self, step: int) -> bool:
        return self.terms[0].generates(step)

    def criticises(self, step: int) -> bool:
        return any(term.criticises(step) for term in self.terms)

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        return self.terms[0].sample(batch, step, grad)

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        scaled = zip(self.scales, self.terms, strict=True)
        return _add([(scale, *term.generator_loss(batch, _seen(term, sample), step)) for scale, term in scaled])

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        scaled = zip(self.scales, self.terms, strict=True)
        critics = [(scale, term) for scale, term in scaled if "fake_score" in term.needs(term.config)]
        return _add([(scale, *term.critic_loss(batch, _seen(term, sample), step)) for scale, term in critics])


def _seen(term: nn.Module, sample: Sample) -> Sample:
    """What a term looks at: the state as it is, or the clean sample behind it."""
    return sample if term.partial else sample.clean()


def _add(parts: list[tuple[float, Tensor, Logs]]) -> tuple[Tensor, Logs]:
    """The first term logs under its own names; a later one that logs the same thing has its number behind it."""
    loss = torch.stack([scale * part for scale, part, _ in parts]).sum()
    joined: Logs = {}
    for number, (_, _, logs) in enumerate(parts, 1):
        joined |= {f"{name}/{number}" if name in joined else name: value for name, value in logs.items()}
    return loss, joined


def _needs(node: dict[str, Any]) -> tuple[str, ...]:
    kind, config, _ = _term(node)
    return kind.needs(config)

"""A weighted sum of objectives that look at the same sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from fewstep.core.batch import Batch
from fewstep.core.errors import UserError
from fewstep.objectives import base
from fewstep.objectives.base import Logs
from fewstep.rollout import Sample


@dataclass
class Config:
    name: str = "sum"
    terms: list[Any] = field(default_factory=list)
    """each a node like `objective:`, with an optional `scale`; the first one draws the sample"""

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError("objective.terms is empty: name at least one objective")


def _term(node: dict[str, Any]) -> tuple[type[base.Objective], Any, float]:
    node = dict(node)
    scale = float(node.pop("scale", 1.0))
    module = base.find(node.get("name", "?"))
    kind = module.Objective
    if kind.turns is not base.Objective.turns:
        raise UserError(f"the objective '{node['name']}' plays turns of its own and cannot be a term of a sum")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(module.Config), node))
    return kind, config, scale


class Objective(base.Objective):
    @classmethod
    def needs(cls, config: Config) -> tuple[str, ...]:
        needed = {role for node in config.terms for role in _needs(node)}
        return tuple(role for role in ("generator", "real_score", "fake_score") if role in needed)

    def __init__(self, config, triad, rollout):
        super().__init__(config, triad, rollout)
        parts = [_term(node) for node in config.terms]
        self.terms = nn.ModuleList(kind(own, triad, rollout) for kind, own, _ in parts)
        self.scales = [scale for _, _, scale in parts]
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

    def generates(self, step: int) -> bool:
        return self.terms[0].generates(step)

    def criticises(self, step: int) -> bool:
        return any(term.criticises(step) for term in self.terms)

    def sample(self, batch: Batch, step: int, grad: bool) -> Sample:
        return self.terms[0].sample(batch, step, grad)

    def generator_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        scaled = zip(self.scales, self.terms, strict=True)
        return _add([(scale, *term.generator_loss(batch, sample, step)) for scale, term in scaled])

    def critic_loss(self, batch: Batch, sample: Sample, step: int) -> tuple[Tensor, Logs]:
        scaled = zip(self.scales, self.terms, strict=True)
        critics = [(scale, term) for scale, term in scaled if "fake_score" in term.needs(term.config)]
        return _add([(scale, *term.critic_loss(batch, sample, step)) for scale, term in critics])


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

"""Phases with a frozen first expert: the second is trained on what the first hands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import Batch
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Routed
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.objectives.base import Objective, Triad, Turn
from fewstep.rollout import Rollout, Step, ode


class SecondPhase(Objective):
    """Regresses the clean end on the mean of the label, whatever the first phase made."""

    reads = ("x0",)

    def turns(self, batch: Batch, step: int):
        exit = 2 + batch.draw.shared_integer("exit", 2)
        sample = self.rollout(self.triad.generator, batch.noise, batch.cond, batch.draw, exit=exit, grad=4)
        yield Turn("generator", (sample.x0 - batch.x0).square().mean(), {"exit": torch.tensor(float(sample.index))})


def test_the_first_expert_is_left_alone(
    tiny_unet: Callable[..., nn.Module], stage: Any, images: Any, weights: Callable[[nn.Module], Tensor]
) -> None:
    experts = [DiffusersBackbone(tiny_unet(seed), Flow(), "flow_prediction") for seed in (0, 1)]
    experts[0].requires_grad_(False)
    rollout = Rollout([Step(1 - i / 4, 1 - i / 4) for i in range(4)], ode)
    one = stage(SecondPhase, Triad(Routed(experts, [0.5])), rollout)
    first, second = (weights(expert) for expert in experts)
    logs = one.play(images, steps=4)
    assert {log["exit"] for log in logs} == {2.0, 3.0} and logs[0]["generator/grad_norm"] > 0
    assert torch.equal(weights(experts[0]), first) and all(p.grad is None for p in experts[0].parameters())
    assert (weights(experts[1]) - second).abs().max() > 1e-3
    played = {id(p) for p in one.players["generator"].parameters}
    assert played == {id(p) for p in experts[1].parameters()}


def test_the_second_phase_does_not_reach_back_into_the_first(tiny_unet: Callable[..., nn.Module], images: Any) -> None:
    """With a window of the phase's own length, even an unfrozen first expert gets no gradient."""
    experts = [DiffusersBackbone(tiny_unet(seed), Flow(), "flow_prediction") for seed in (0, 1)]
    rollout = Rollout([Step(1 - i / 4, 1 - i / 4) for i in range(4)], ode)
    batch = images(torch.arange(3), 0)
    sample = rollout(Routed(experts, [0.5]), batch.noise, batch.cond, batch.draw, grad=2)
    sample.x0.square().mean().backward()
    assert all(p.grad is None for p in experts[0].parameters())
    assert sum(p.grad is not None and p.grad.abs().max() > 0 for p in experts[1].parameters()) > 20

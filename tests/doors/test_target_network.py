"""A consistency loss against a target network that trails the generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import Batch
from fewstep.core.schedule import Flow, add_noise
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.objectives.base import Objective, Triad, Turn
from fewstep.rollout import Rollout, Step


class AgainstTarget(Objective):
    reads = ("x0",)

    def followers(self) -> dict[str, float]:
        return {"target": 0.9}

    def turns(self, batch: Batch, step: int):
        net, target = self.triad.generator, self.targets["target"]
        t = self.config + (1 - self.config) * batch.draw.uniform("t")
        eps = batch.draw.normal("eps", (3, 8, 8))
        with torch.no_grad():
            cleaner = target(add_noise(Flow(), batch.x0, eps, t / 2), t / 2, batch.cond).x0
        guess = net(add_noise(Flow(), batch.x0, eps, t), t, batch.cond).x0
        yield Turn("generator", (guess - cleaner).square().mean())


def test_a_target_network_trails_the_generator(
    tiny_unet: Callable[..., nn.Module], stage: Any, images: Any, weights: Callable[[nn.Module], Tensor]
) -> None:
    net = DiffusersBackbone(tiny_unet(), Flow(), "flow_prediction")
    one = stage(AgainstTarget, Triad(net), Rollout([Step(1, 1)]), config=0.1)
    target = one.objective.targets["target"]
    assert torch.equal(weights(target), weights(net)) and target is not net
    expected = weights(net)
    for step in range(3):
        one.play(images)
        expected = 0.9 * expected + 0.1 * weights(net)
        assert torch.allclose(weights(target), expected, rtol=0, atol=1e-6), f"move {step}"
    assert (weights(target) - weights(net)).abs().max() > 1e-3
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())
    saved = set(one.objective.state_dict())
    assert saved == set()  # the player saves the target, once

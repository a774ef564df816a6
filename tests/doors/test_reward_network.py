"""A frozen reward network on samples: its gradient reaches the generator and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import Batch
from fewstep.core.schedule import Flow
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.objectives.base import Objective, Triad, Turn
from fewstep.rollout import Rollout, Step, ode


class Reward(nn.Module):
    """A small picture critic whose answer depends on its mode, as an encoder's with dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.SiLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)[:, 0]


class Rewarded(Objective):
    def __init__(self, config: Any, triad: Triad, rollout: Rollout):
        super().__init__(config, triad, rollout)
        self.reward = config  # in a tuple, because frozen weights need not be saved with the run

    def turns(self, batch: Batch, step: int):
        sample = self.rollout(self.triad.generator, batch.noise, batch.cond, batch.draw, grad=1)
        (network,) = self.reward
        reward = network(sample.x0.clamp(-3, 3))
        yield Turn("generator", -reward.mean(), {"reward": reward.mean()})


def test_the_reward_moves_the_generator_alone(
    tiny_unet: Callable[..., nn.Module], stage: Any, images: Any, weights: Callable[[nn.Module], Tensor]
) -> None:
    net = DiffusersBackbone(tiny_unet(), Flow(), "flow_prediction")
    reward = Reward().eval().requires_grad_(False)
    rollout = Rollout([Step(1, 1), Step(0.5, 0.5)], ode)
    one = stage(Rewarded, Triad(net), rollout, config=(reward,), lr=3e-3)
    before, fixed = weights(net), weights(reward)
    logs = one.play(images, steps=8)
    assert (weights(net) - before).abs().max() > 1e-3
    assert torch.equal(weights(reward), fixed) and all(p.grad is None for p in reward.parameters())
    assert logs[-1]["reward"] > logs[0]["reward"]
    assert dict(one.objective.state_dict()) == {} and len(one.players["generator"].modules) == 1


def test_the_gradient_is_that_of_the_last_pass(tiny_unet: Callable[..., nn.Module], images: Any) -> None:
    net, reward = DiffusersBackbone(tiny_unet(), Flow(), "flow_prediction"), Reward().eval()
    batch = images(torch.arange(3), 0)
    rollout = Rollout([Step(1, 1), Step(0.5, 0.5)], ode)
    sample = rollout(net, batch.noise, batch.cond, batch.draw, grad=1)
    mine = torch.autograd.grad(reward(sample.x0).mean(), list(net.parameters()), allow_unused=True)
    again = net(sample.x_t, sample.t, batch.cond).x0
    theirs = torch.autograd.grad(reward(again).mean(), list(net.parameters()), allow_unused=True)
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if b is not None]
    assert len(pairs) > 20 and all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in pairs)

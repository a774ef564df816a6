"""Groups of K samples per prompt with advantages, and an inner loop over the cached rollout: GRPO on a sampler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Objective, Share, Triad, Turn
from fewstep.rollout import Rollout, Sample, Step, cps

GROUP, ETA, GOAL = 4, 0.5, 2.0
STEPS = Rollout([Step(1 - i / 3, 1 - i / 3) for i in range(3)], cps(ETA))


def log_prob(net: Backbone, taken: Sample, cond: Condition) -> Tensor:
    """log p(x | x_t) (B,) of one step of coefficient-preserving sampling."""
    prediction = net(taken.x_t, taken.t, cond)
    c = net.schedule.at(taken.s, taken.x)
    mean = c.alpha * prediction.x0 + math.cos(ETA * math.pi / 2) * c.sigma * prediction.eps
    std = math.sin(ETA * math.pi / 2) * c.sigma
    return (-0.5 * ((taken.x - mean) / std) ** 2 - std.log()).flatten(1).sum(1)


class Policy(Objective):
    def trajectory(self, batch: Batch) -> list[Sample]:
        """The steps taken that had fresh noise, each as its Sample at the next level."""
        net, args = self.triad.generator, (batch.noise, batch.cond, batch.draw)
        exits = range(len(self.rollout) - 1)
        return [self.rollout(net, *args, exit=i, stop=self.rollout.level_after(i)).detach() for i in exits]

    def turns(self, batch: Batch, step: int):
        net = self.triad.generator
        taken = self.trajectory(batch)
        clean = self.rollout(net, batch.noise, batch.cond, batch.draw).x0
        reward = -(clean - GOAL).square().flatten(1).mean(1)
        groups = reward.reshape(-1, GROUP)
        advantage = groups - groups.mean(1, keepdim=True)
        scale = yield Share(advantage.square().mean())
        advantage = (advantage / (scale.sqrt() + 1e-6)).flatten()
        with torch.no_grad():
            old = [log_prob(net, one, batch.cond) for one in taken]
        for i in range(self.config):
            for k, (one, before) in enumerate(zip(taken, old, strict=True)):
                ratio = (log_prob(net, one, batch.cond) - before).exp()
                clipped = ratio.clamp(0.8, 1.2)
                loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
                drift = yield Share((ratio.detach() - 1).abs().mean())
                logs = {"reward": reward.mean(), f"drift/{i}": drift}
                yield Turn("generator", loss, logs, move=k == len(taken) - 1)


def prompts(ids: Tensor, step: int) -> Batch:
    """Consecutive ids share a prompt."""
    draw = Draw(1, step, ids)
    return Batch(draw.normal("noise", (1,)), Condition({"prompt": ids // GROUP}), draw)


def student() -> GaussianModel:
    return GaussianModel(0.0, 1.0, Flow(), "flow_prediction", learned=True)


def test_a_cached_trajectory_is_the_rollout(stage: Any) -> None:
    net = student()
    one = stage(Policy, Triad(net), STEPS, config=1)
    batch = prompts(torch.arange(8), 0)
    taken = one.objective.trajectory(batch)
    assert torch.equal(taken[0].x_t, batch.noise) and torch.equal(taken[1].x_t, taken[0].x)
    assert [one.s[0].item() for one in taken] == pytest.approx([2 / 3, 1 / 3])
    assert torch.equal(STEPS(net, batch.noise, batch.cond, batch.draw).x_t, taken[1].x)


def test_the_log_probability_is_that_of_the_step(stage: Any) -> None:
    """Its mean over steps taken is minus the entropy of the fresh noise, up to the constant log sqrt(2 pi)."""
    net, batch = student(), prompts(torch.arange(20_000), 0)
    (taken, _) = stage(Policy, Triad(net), STEPS, config=1).objective.trajectory(batch)
    std = math.sin(math.pi / 4) * 2 / 3
    mean = log_prob(net, taken, batch.cond).mean().item()
    assert mean == pytest.approx(-0.5 - math.log(std), abs=4 * 0.5**0.5 / 20_000**0.5)


@pytest.mark.parametrize("parts", [1, 4])
def test_an_inner_loop_moves_several_times_on_one_rollout(parts: int, stage: Any) -> None:
    one = stage(Policy, Triad(student()), STEPS, config=3)
    logs = one.play(prompts, rows=32, parts=parts)[0]
    assert one.players["generator"].moves == 3
    assert logs["drift/0"] == 0 and 0 < logs["drift/1"] < logs["drift/2"]


def test_the_reward_rises(stage: Any) -> None:
    one = stage(Policy, Triad(student()), STEPS, config=2, lr=0.03)
    logs = one.play(prompts, steps=40, rows=128)
    first, last = (sum(log["reward"] for log in part) / 5 for part in (logs[:5], logs[-5:]))
    assert first < -3 and last > first + 1.5

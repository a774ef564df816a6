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
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Objective, Share, Triad, Turn
from fewstep.rollout import Rollout, Sample, Step, cps, ode

GROUP, ETA, GOAL = 4, 0.5, 2.0
STEPS = Rollout([Step(1 - i / 3, 1 - i / 3) for i in range(3)], cps(ETA))


class Policy(Objective):
    def trajectory(self, batch: Batch) -> list[Sample]:
        """The steps taken in one walk; all but the last had fresh noise."""
        return list(self.rollout.walk(self.triad.generator, batch.noise, batch.cond, batch.draw))

    def turns(self, batch: Batch, step: int):
        net = self.triad.generator
        *taken, last = self.trajectory(batch)
        reward = -(last.x0 - GOAL).square().flatten(1).mean(1)
        groups = reward.reshape(-1, GROUP)
        advantage = groups - groups.mean(1, keepdim=True)
        scale = yield Share(advantage.square().mean())
        advantage = (advantage / (scale.sqrt() + 1e-6)).flatten()
        with torch.no_grad():
            old = [self.rollout.log_prob(net, one, batch.cond) for one in taken]
        for i in range(self.config):
            for k, (one, before) in enumerate(zip(taken, old, strict=True)):
                ratio = (self.rollout.log_prob(net, one, batch.cond) - before).exp()
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
    assert [one.s[0].item() for one in taken] == pytest.approx([2 / 3, 1 / 3, 0])
    assert torch.equal(STEPS(net, batch.noise, batch.cond, batch.draw).x, taken[-1].x)


def test_the_log_probability_is_that_of_the_step(stage: Any) -> None:
    """Its mean over steps taken is minus the entropy of the fresh noise."""
    net, batch = student(), prompts(torch.arange(20_000), 0)
    taken, *_ = stage(Policy, Triad(net), STEPS, config=1).objective.trajectory(batch)
    std = math.sin(math.pi / 4) * 2 / 3
    mean = STEPS.log_prob(net, taken, batch.cond).mean().item()
    assert mean == pytest.approx(-0.5 - math.log(std * math.sqrt(2 * math.pi)), abs=4 * 0.5**0.5 / 20_000**0.5)


def test_a_step_without_fresh_noise_has_no_density() -> None:
    net, batch = student(), prompts(torch.arange(4), 0)
    *_, last = STEPS.walk(net, batch.noise, batch.cond, batch.draw)
    straight = Rollout(STEPS.steps, ode)
    first = next(straight.walk(net, batch.noise, batch.cond, batch.draw))
    for rollout, taken in ((STEPS, last), (straight, first)):
        with pytest.raises(ValueError, match="without fresh noise"):
            rollout.log_prob(net, taken, batch.cond)


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

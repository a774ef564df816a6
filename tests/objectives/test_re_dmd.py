from __future__ import annotations

import math

import pytest
import torch
from oracle import (
    TEACHER,
    Renamed,
    adam,
    gaussian_triad,
    keep_critic_exact,
    law_of,
    learn,
    one_step,
    play,
    players_for,
    real_batch,
    told_batch,
    whitened,
)
from torch import Tensor, nn

from fewstep import build, config, rewards
from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.data.source import open_source
from fewstep.objectives import dmd2
from fewstep.objectives.re_dmd import Config, Objective


def rewarded(reward, triad=None, **changes) -> Objective:
    triad = triad or gaussian_triad(Flow(), "flow_prediction", critic=(0.2, 0.9))
    objective = Objective(Config(**{"reward": "mine:own", "ratio": 1, **changes}), triad, one_step())
    objective.reward = reward
    return objective


def mean(x: Tensor, cond: Condition) -> Tensor:
    return x.flatten(1).mean(1)


def test_a_constant_reward_is_a_factor_on_the_generators_gradient() -> None:
    """exp(2 x .3) times DMD2's, and the same critic's turn."""
    ours = rewarded(lambda x, cond: torch.full((len(x),), 0.3))
    base = dmd2.Objective(dmd2.Config(gan_weight=0, ratio=1), ours.triad, one_step())
    for step in range(3):
        one, other = (play(o, real_batch(step, draw=Renamed), step) for o in (ours, base))
        for name in ("generator.mean", "generator.std"):
            assert one["generator"][name] == pytest.approx(math.exp(0.6) * other["generator"][name], rel=1e-5)
            assert abs(other["generator"][name]) > 1e-4
        assert one["fake_score"].loss == other["fake_score"].loss


def test_every_sample_has_a_weight_of_its_own() -> None:
    objective = rewarded(mean)
    batch = told_batch(*whitened(2))
    sample = objective.sample(batch, 0, False)
    look = objective.look(batch, sample)
    plain, got = dmd2.Objective.gradient(objective, batch, sample, look), objective.gradient(batch, sample, look)
    assert torch.allclose(got, (2 * sample.x0.mean(1, keepdim=True)).exp() * plain, rtol=1e-5)
    assert sample.x0.mean(1).std() > 0.1


def test_no_gradient_goes_through_the_reward() -> None:
    net = nn.Linear(32, 1)
    seen: list[bool] = []

    def reward(x: Tensor, cond: Condition) -> Tensor:
        out = net(x).squeeze(1)
        seen.append(out.requires_grad)
        return out

    play(rewarded(reward), told_batch(*whitened(2)))
    assert seen == [False] and all(p.grad is None for p in net.parameters())


def test_where_the_student_is_the_teacher_no_reward_moves_it() -> None:
    triad = gaussian_triad(Flow(), "flow_prediction", student=TEACHER)
    turn = play(rewarded(mean, triad), told_batch(*whitened(2)))["generator"]
    assert (turn["generator.mean"], turn["generator.std"]) == pytest.approx((0, 0), abs=1e-5)
    moved = play(rewarded(mean), told_batch(*whitened(2)))["generator"]
    assert abs(moved["generator.mean"]) > 1e-2


@pytest.mark.slow
def test_learns_the_teacher_whatever_the_reward() -> None:
    """Weight exp(2 mean x), exact critic, 700 moves of Adam at 2e-2, cosine: N(1, .7^2) within 2 %, not tilted."""
    objective = rewarded(mean)
    keep_critic_exact(objective, fresh=True)
    learn(objective, players_for(objective, adam(2e-2, 700), adam(1e-9)), 700, size=64)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.02)


@pytest.mark.slow
def test_learns_the_teacher_with_a_learned_critic() -> None:
    """Five critic moves at 2e-2 for each of 1200 generator moves at 1e-2, cosine: within 4 %."""
    objective = rewarded(mean, gaussian_triad(Flow(), "flow_prediction"), ratio=5)
    learn(objective, players_for(objective, adam(1e-2, 1200), adam(2e-2)), 6000)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.04)


def test_the_built_in_reward_reads_the_label() -> None:
    source = open_source("scenes", 16, 1)
    ids = torch.arange(32)
    images, labels = source.images(ids), source.label_of(ids)
    reward = rewards.open_reward("label_log_probability", source, None)
    right = reward(images, Condition({"class_labels": labels}))
    wrong = reward(images, Condition({"class_labels": (labels + 1) % 12}))
    assert right.shape == (32,) and right.mean() > -0.05 and wrong.max() < -2
    with pytest.raises(UserError, match=r"set data\.source=scenes"):
        rewards.open_reward("label_log_probability", open_source("noise", 16, 1), None)


@pytest.mark.parametrize(
    "name, said",
    [
        ("no_colon", "module:function of your own"),
        ("../mine.py:f", "module:function of your own"),
        ("os:system", "is part of Python"),
        ("no_such_module_of_mine:f", "put the module where Python finds it"),
        ("tiny:no_such_function", "has no function"),
        ("tiny:LABELS", "has no function"),
    ],
)
def test_a_reward_that_is_none_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        rewards.own(name)


def test_a_reward_gives_one_number_a_sample_on_images_in_range() -> None:
    assert rewards.open_reward("tiny:brightness", open_source("noise", 16, 1), None)(
        torch.full((2, 3, 4, 4), 5.0), Condition()
    ).tolist() == [1, 1]
    with pytest.raises(UserError, match="one number a sample"):
        rewards.checked("mine:own", torch.zeros(2, 1), torch.zeros(2, 3))


def test_a_run_opens_its_reward_and_tries_it() -> None:
    (given,) = config.load("configs/scenes/re_dmd.yaml", ["device=cpu"])
    run = build.build(given)
    worth = run.objective.worth(run.source.images(torch.arange(4)), run.conditions.of(torch.arange(4)))
    assert worth.shape == (4,) and worth.min() > 0.8
    (given,) = config.load("configs/scenes/re_dmd.yaml", ["objective.reward=os:system"])
    with pytest.raises(UserError, match="is part of Python"):
        build.build(given)


@pytest.mark.parametrize("wrong", [{}, {"reward": "a:b", "ratio": 0}])
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Config(**wrong)

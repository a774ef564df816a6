from __future__ import annotations

from typing import Any

import pytest
import torch
from maps import LAW, NAMES, PROCESSES, Jump, Perceptron, data_batch
from oracle import walk

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule, expand
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.models.tangent import Direction, Tangent, along
from fewstep.objectives.base import Triad
from fewstep.objectives.meanflow import Config, Objective
from fewstep.rollout import Rollout, ode, renoise


def objective_of(net: Backbone, teacher: GaussianModel, **changes: Any) -> Objective:
    found = Objective(Config(**changes), Triad(net, Guided(teacher)), walk((1.0,), ode))
    found.attach(torch.zeros(2, 3), Condition())
    return found


def residual(objective: Objective, batch: Batch) -> float:
    (turn,) = objective.turns(batch, 0)
    return float(turn.logs["residual"])


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_the_exact_map_has_no_loss(schedule: NoiseSchedule, kind: Kind) -> None:
    """Per sample, whatever the two times: the target is the map's own velocity, to float32."""
    teacher = GaussianModel(*LAW, schedule, kind)
    squared = residual(objective_of(Jump(teacher), teacher, equal=0.2), data_batch(512))
    assert squared < (1e-8 if kind == "flow_prediction" else 1e-5)


def test_the_ends_of_steps_must_not_move_with_their_starts() -> None:
    """With ds/dt = 1 in the derivative, the exact map would have a loss of order 1."""
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    objective = objective_of(Jump(teacher), teacher, equal=0.0)
    batch = data_batch(512)
    t, s = objective.interval(batch)
    x_t, line = objective.noised(batch, t)
    v, h = objective.velocity(x_t, t, batch.cond, line), 1e-3
    with torch.no_grad():
        ends = [objective.flow(x_t + k * h * v, t + k * h, batch.cond, to=s + k * h).velocity for k in (0.5, -0.5)]
        u = objective.flow(x_t, t, batch.cond, to=s).velocity
    wrong = v - expand(t - s, x_t) * (ends[0] - ends[1]) / h
    assert (u - wrong).square().mean() > 1e-3


def test_equal_times_are_flow_matching() -> None:
    """Loss and gradient are those of |u(x_t, t, t) - v|^2."""
    teacher, net = (GaussianModel(mean, 0.9, Flow(), "flow_prediction", learned=True) for mean in (1.0, 0.2))
    objective = objective_of(net, teacher, equal=1.0, power=0.0)
    batch = data_batch(64)
    (turn,) = objective.turns(batch, 0)
    ours = torch.autograd.grad(turn.loss, net.mean)[0]
    t, s = objective.interval(batch)
    x_t, _ = objective.noised(batch, t)
    plain = (net(x_t, t, batch.cond).value - teacher(x_t, t, batch.cond).value.detach()).square().sum(1).mean()
    assert torch.equal(t, s)
    assert torch.allclose(turn.loss, plain, rtol=1e-6)
    assert torch.allclose(ours, torch.autograd.grad(plain, net.mean)[0], rtol=1e-5)


def test_data_alone_gives_the_same_target_on_average() -> None:
    """The residual of one sample is far from zero, its mean given the times is zero within four standard errors."""
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    objective = objective_of(Jump(teacher), teacher, mode="training", equal=0.25)
    batch = data_batch(200_000, dims=1)
    t, s = objective.interval(batch)
    x_t, line = objective.noised(batch, t)
    du = along(objective.flow, x_t, t, batch.cond, Direction(line, torch.ones_like(t)), "exact", 1e-4, s)
    with torch.no_grad():
        off = objective.flow(x_t, t, batch.cond, to=s).velocity - (line - expand(t - s, x_t) * du)
    assert off.square().mean().sqrt() > 0.3
    for weight in (torch.ones_like(off), x_t):
        product = off * weight
        assert product.mean().abs() < 4 * product.std() / len(product) ** 0.5


@pytest.mark.parametrize("way", ["semi", "difference"])
def test_the_other_derivatives_agree(way: Any) -> None:
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    objective = objective_of(Jump(teacher), teacher, equal=0.2, tangent=Tangent(way, 1e-3))
    assert objective.way == way and residual(objective, data_batch(512)) < 1e-4


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_any_number_of_exact_steps_ends_alike(count: int) -> None:
    """N(1, .7^2) with unit noise: x0 = 1 + .7 z, to float32."""
    net = Jump(GaussianModel(*LAW, Flow(), "flow_prediction"))
    times = tuple(1 - i / count for i in range(count))
    noise = torch.randn(64, 3)
    rollout = Rollout(walk(times, ode).steps, ode, two_times=True)
    assert torch.allclose(rollout(net, noise, Condition(), Draw(0, 0, torch.arange(64))).x0, 1 + 0.7 * noise, atol=1e-5)


def test_the_weight_is_the_loss_to_a_power() -> None:
    objective = objective_of(Jump(teacher := GaussianModel(*LAW, Flow(), "flow_prediction")), teacher, power=0.5)
    u = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.3]], requires_grad=True)
    loss, _ = objective.distance(u, torch.zeros(2, 3))
    (gradient,) = torch.autograd.grad(loss, u)
    assert loss.item() == pytest.approx((9 / 9.01**0.5 + 0.09 / 0.1**0.5) / 2, rel=1e-5)
    assert gradient[0].tolist() == pytest.approx([x / 9.01**0.5 for x in (1, 2, 2)], rel=1e-5)


def test_one_step_learns_the_map() -> None:
    """From random weights toward N(1, .7^2): the rms distance to 1 + .7 z falls below .06 (seen: .02)."""
    torch.manual_seed(0)
    net = Perceptron()
    objective = objective_of_one(net)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(1500):
        draw = Draw(0, step, torch.arange(256))
        batch = Batch(draw.normal("noise", (1,)), Condition(), draw, 1 + 0.7 * draw.normal("x0", (1,)))
        (turn,) = objective.turns(batch, step)
        optimizer.zero_grad()
        turn.loss.backward()
        optimizer.step()
    noise = torch.randn(4096, 1)
    with torch.no_grad():
        x = noise - net(noise, torch.ones(4096), Condition(), to=torch.zeros(4096)).value
    assert (x - (1 + 0.7 * noise)).square().mean().sqrt() < 0.06


def objective_of_one(net: Backbone) -> Objective:
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    found = Objective(Config(equal=0.25), Triad(net, Guided(teacher)), walk((1.0,), ode))
    found.attach(torch.zeros(2, 1), Condition())
    return found


def test_fresh_noise_is_refused() -> None:
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    with pytest.raises(UserError, match=r"deterministic: set model\.transition=ode"):
        Objective(Config(), Triad(teacher, Guided(teacher)), walk((1.0,), renoise))


@pytest.mark.parametrize("wrong", [{"equal": 1.5}, {"power": -1.0}, {"floor": 0.0}])
def test_keys_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Config(**wrong)

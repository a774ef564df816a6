from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from flow_maps import LAW, NAMES, PROCESSES, VP, Perceptron, data, guided, one_step_error, teacher_of, train
from oracle import ConsistencyMap, play, walk

from fewstep.core.batch import Condition, Pair
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule, Trig
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.models.tangent import Direction, along
from fewstep.objectives.base import Triad
from fewstep.objectives.pieces.flow import as_angles
from fewstep.objectives.scm import QUARTER, Config, Objective, States
from fewstep.rollout import ode

PLAIN: dict[str, Any] = {"weight": "none", "adaptive": False, "normal": 0.0}


def of(net: Backbone, teacher: GaussianModel | None = None, dims: int = 3, **changes: Any) -> Objective:
    config = Config(**{"warmup": 0, **changes})
    found = Objective(config, Triad(net, guided(teacher or teacher_of())), walk((1.0,)))
    found.attach(torch.zeros(2, dims), Condition())
    return found


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_the_exact_map_has_no_tangent(schedule: NoiseSchedule, kind: Kind) -> None:
    """rms of cos(a) df/da per value at the exact consistency function; the denoiser itself has one of order .1."""
    teacher = teacher_of(schedule, kind)
    for net, low, high in ((ConsistencyMap(teacher), 0.0, 3e-3), (teacher, 0.02, 1.0)):
        (turn,) = of(net, teacher).turns(data(512), 0)
        assert low <= turn.logs["tangent"] < high


@pytest.mark.parametrize("schedule", [Flow(), VP], ids=["flow", "vp"])
def test_the_tangent_is_the_derivative_of_the_jump(schedule: NoiseSchedule) -> None:
    """cos(a) df/da of a random network along a random direction, against differences of f in float64: 1e-3."""
    torch.manual_seed(0)
    net = Perceptron(dims=3, schedule=schedule, kind="v_prediction")
    objective, x, v = of(net), torch.randn(16, 3), torch.randn(16, 3)
    t, h = torch.linspace(0.15, 0.85, 16), 1e-3
    states = States(x, t, v, Condition())
    with torch.no_grad():
        F = objective.net(x, t, Condition()).value
    dF = along(objective.net, x, t, Condition(), Direction(v, torch.full_like(t, 1 / QUARTER)), "exact", 1e-4, None)
    g = objective.tangent(F, dF, states, 1.0)
    angled = as_angles(net.double())

    def f(sign: int) -> torch.Tensor:
        angle = t.double() * QUARTER + sign * h
        x_h = x.double() + sign * h * v.double()
        F_h = angled(x_h, angle / QUARTER, Condition()).value.double()
        return angle.cos()[:, None] * x_h - angle.sin()[:, None] * F_h

    with torch.no_grad():
        truth = (t.double() * QUARTER).cos()[:, None] * (f(1) - f(-1)) / (2 * h)
    assert (g - truth).norm() / truth.norm() < 1e-3


def test_without_the_derivative_it_is_flow_matching() -> None:
    """r = 0: g = cos^2(a) (v - F), so gradient and loss are those of cos^2(a) |F - v|, up to the known powers."""
    net = GaussianModel(0.2, 0.9, Trig(), "v_prediction", learned=True)
    teacher = GaussianModel(*LAW, Trig(), "v_prediction")
    objective, batch = of(net, teacher, warmup=10, **PLAIN), data(256)
    turn = play(objective, batch, 0)["generator"]
    states = objective.states(batch)
    F = net(states.x, states.t, Condition()).value
    cos2 = ((states.t * QUARTER).cos() ** 2)[:, None]
    assert turn.loss == pytest.approx((cos2 * (F - states.velocity)).square().mean().item(), rel=1e-4)
    (by_hand,) = torch.autograd.grad((cos2 * (F - states.velocity).square()).mean(), net.mean)
    assert turn["generator.mean"] == pytest.approx(by_hand.item(), rel=1e-4)


def test_the_share_of_the_derivative_rises() -> None:
    objective = of(teacher_of(), warmup=100)
    assert [objective.share(step) for step in (0, 25, 100, 500)] == [0, 0.25, 1, 1] and of(teacher_of()).share(0) == 1


def test_the_normalised_tangent_has_a_norm_below_one() -> None:
    objective, g = of(teacher_of(), normal=0.1), torch.tensor([[3.0, 4.0], [0.03, 0.04]])
    assert objective.normalised(g).norm(dim=1).tolist() == pytest.approx([5 / 5.1, 0.05 / 0.15])
    assert torch.equal(of(teacher_of(), normal=0.0).normalised(g), g)


def test_the_weight_is_one_over_the_tangent_and_the_head_learns_its_loss() -> None:
    """e^-u L + u is least at u = ln L."""
    objective = of(teacher_of(), weight="inverse_tan", adaptive=False)
    t = torch.tensor([0.25, 0.5])
    weighed = objective.weighed(torch.ones(2), t).item()
    assert weighed == pytest.approx((1 / math.tan(math.pi / 8) + 1) / 2, rel=1e-5)
    learnt = of(teacher_of(), weight="none")
    assert learnt.expected is not None and learnt.learns() == {"generator": [learnt.expected]}
    last = learnt.expected.layers[-1].bias
    losses = torch.full((4,), 0.37)
    assert learnt.weighed(losses, torch.full((4,), 0.5)).item() == pytest.approx(0.37)
    with torch.no_grad():
        last.fill_(math.log(0.37))
    (slope,) = torch.autograd.grad(learnt.weighed(losses, torch.full((4,), 0.5)), last)
    assert abs(slope.item()) < 1e-6


def test_data_alone_gives_the_same_tangent_on_average() -> None:
    """Per sample far from zero, on average zero within four standard errors, also when multiplied by the state."""
    teacher = teacher_of()
    objective = of(ConsistencyMap(teacher), teacher, dims=1, mode="training")
    states = objective.states(data(200_000, dims=1))
    toward = Direction(states.velocity, torch.full_like(states.t, 1 / QUARTER))
    dF = along(objective.net, states.x, states.t, Condition(), toward, "exact", 1e-4, None)
    with torch.no_grad():
        g = objective.tangent(objective.net(states.x, states.t, Condition()).value, dF, states, 1.0)
    assert g.square().mean().sqrt() > 0.2
    for weight in (torch.ones_like(g), states.x):
        product = g * weight
        assert product.mean().abs() < 4 * product.std() / len(product) ** 0.5


def test_the_tangent_carries_no_gradient() -> None:
    """The loss's gradient is -2 g dF / numel: nothing of how g depends on the weights."""
    net = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    objective, batch = of(net, **PLAIN), data(64)
    turn = play(objective, batch)["generator"]
    states = objective.states(batch)
    toward = Direction(states.velocity, torch.full_like(states.t, 1 / QUARTER))
    dF = along(objective.net, states.x, states.t, Condition(), toward, "exact", 1e-4, None)
    F = objective.net(states.x, states.t, Condition()).value
    g = objective.tangent(F.detach(), dF, states, 1.0)
    (by_hand,) = torch.autograd.grad((-2 * g * F).mean(), net.mean)
    assert turn["generator.mean"] == pytest.approx(by_hand.item(), rel=1e-3) and turn.touched() == {"generator"}


@pytest.mark.parametrize("mode", ["distillation", "training"])
def test_one_step_learns_the_map(mode: str) -> None:
    """From random weights toward 1 + .7 z (seen: .01 and .02)."""
    torch.manual_seed(0)
    net = Perceptron()
    objective = of(net, dims=1, mode=mode, times=Times(law="log_normal", mean=0.5, std=1.6), **{**PLAIN, "warmup": 300})
    train(objective, 1500)
    assert one_step_error(net) < (0.06 if mode == "distillation" else 0.15)


def test_refusals() -> None:
    with pytest.raises(UserError, match="fresh noise in between"):
        Objective(Config(), Triad(teacher_of(), guided(teacher_of())), walk((1.0, 0.5), ode))
    for wrong in ({"warmup": -1}, {"normal": -0.1}):
        with pytest.raises(UserError, match="at least 0"):
            Config(**wrong)  # type: ignore[arg-type]
    assert Objective.needs(Config(mode="training")) == ("generator",)


def test_the_teachers_samples_can_stand_for_data() -> None:
    """Pairs whose clean ends are the batch's data give the same loss, by the same draws."""
    net = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    batch = data(64)
    assert batch.x0 is not None
    paired = replace(batch, x0=None, pair=Pair(batch.noise, batch.x0, Condition()))
    ours = of(net, data="pairs")
    assert ours.reads == ("pair",) and of(net).reads == ("x0",)
    one, other = (play(*both)["generator"] for both in ((ours, paired), (of(net), batch)))
    assert one["generator.mean"] == pytest.approx(other["generator.mean"], rel=1e-6)

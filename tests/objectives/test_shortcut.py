from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from maps import LAW, NAMES, PROCESSES, Jump, Perceptron, data_batch, error, train, walked
from oracle import Recorder, walk
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.core.times import Grid
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.shortcut import Config, Objective
from fewstep.rollout import GammaJump, ode, renoise


def objective_of(net: Backbone, teacher: GaussianModel, times: tuple[float, ...] = (1.0,), **changes: Any) -> Objective:
    found = Objective(Config(**changes), Triad(net, Guided(teacher)), walk(times, ode))
    found.targets["target"] = net
    return found


def exact(schedule: NoiseSchedule, kind: Kind, **changes: Any) -> Objective:
    teacher = GaussianModel(*LAW, schedule, kind)
    return objective_of(Jump(teacher), teacher, **changes)


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_two_exact_halves_are_the_exact_step(schedule: NoiseSchedule, kind: Kind) -> None:
    """The semigroup: the bootstrapped rows have no residual, to float32. Another law's rows have none either: the
    bootstrap alone does not know the teacher."""
    batch = data_batch(512)
    for law in (LAW, (0.2, 0.5)):
        net = Jump(GaussianModel(*law, schedule, kind))
        (turn,) = objective_of(net, GaussianModel(*LAW, schedule, kind), clamp=1e3).turns(batch, 0)
        assert turn.logs["residual/bootstrap"] < 1e-8
        assert turn.logs["residual/matched"] < 1e-4 or law != LAW
    assert turn.logs["residual/matched"] > 1e-2


def test_the_target_is_the_mean_of_two_half_velocities() -> None:
    """By hand, from t = 1 over the whole ladder: halves from 1 to 1/2 and from there to 0, in float32."""
    net = Sevenths()
    objective = objective_of(net, GaussianModel(*LAW, Flow(), "flow_prediction"), clamp=1e3)
    x, ones = torch.randn(8, 3), torch.ones(8)
    prediction = net(x, ones, Condition(), to=0 * ones)
    target = objective.bootstrapped(prediction, ones / 2, 0 * ones, Condition(), torch.arange(8))
    first = x / 7 + 0.5
    second = (x - first / 2) / 7 + 0.25
    assert torch.allclose(target, (first + second) / 2, atol=1e-6)


class Sevenths(Backbone):
    """The velocity x / 7 + t (t - s)."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.kind = Flow(), "flow_prediction"

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        return Prediction(x_t / 7 + (t * (t - to))[:, None], self.kind, x_t, t, self.schedule)


def test_steps_are_dyadic_and_begin_at_their_multiples() -> None:
    """Every size 2, 4, .. 128 alike often, an eighth of the rows in all; the others go over one rung, anywhere."""
    objective, batch = exact(Flow(), "flow_prediction"), data_batch(64_000, dims=1)
    halved, start, size = objective.steps(batch)
    assert halved.float().mean() == pytest.approx(1 / 8, abs=0.006)
    assert (size[~halved] == 1).all() and (size[halved] > 1).all()
    assert torch.equal(size[halved].unique(), 2 ** torch.arange(1, 8))
    for one in 2 ** torch.arange(1, 8):
        assert (size[halved] == one).float().mean() == pytest.approx(1 / 7, abs=0.02)
        here = start[halved & (size == one)]
        assert torch.equal(here.unique(), one * torch.arange(1, 128 // one + 1))
    assert torch.equal(start[~halved].unique(), torch.arange(1, 129))


def test_rows_over_one_rung_are_flow_matching_whatever_the_follower_says() -> None:
    """And only the bootstrapped rows cost the follower's passes."""
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    objective, batch = exact(Flow(), "flow_prediction"), data_batch(256)
    halved, start, size = objective.steps(batch)
    seen = Recorder(Jump(teacher))
    seen.forward = lambda *args, **kwargs: (seen.seen.append(args[:2]), Jump(teacher)(*args, **kwargs))[1]  # type: ignore[method-assign]
    objective.targets["target"] = seen
    list(objective.turns(batch, 0))
    assert [len(t) for _, t in seen.seen] == [int(halved.sum())] * 2
    assert torch.equal(seen.seen[0][1].sort().values, (start[halved] / 128).sort().values)
    assert torch.equal(seen.seen[1][1].sort().values, ((start - size // 2)[halved] / 128).sort().values)


def test_data_or_the_teacher_is_what_is_matched() -> None:
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    batch = data_batch(64)
    x, t = batch.noise, torch.full((64,), 0.5)
    eps = torch.randn(64, 3)
    said = teacher(x, t, Condition())
    matched = exact(Flow(), "flow_prediction").matched(said, batch.x0, eps, Condition())
    assert torch.allclose(matched, said.value, atol=1e-5)
    of_data = exact(Flow(), "flow_prediction", mode="training")
    assert torch.equal(of_data.matched(said, batch.x0, eps, Condition()), eps - batch.x0)
    assert Objective.needs(of_data.config) == ("generator",)


def test_targets_and_states_are_clamped() -> None:
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    objective = objective_of(Jump(teacher), teacher, clamp=0.5)
    said = Jump(teacher)(x := 3 * torch.randn(64, 3), torch.ones(64), Condition(), to=torch.zeros(64))
    target = objective.bootstrapped(said, torch.full((64,), 0.5), torch.zeros(64), Condition(), torch.arange(64))
    assert target.abs().max() == 0.5 and x.abs().max() > 3


def test_a_clipped_state_is_only_what_the_second_half_is_asked_at() -> None:
    """The target is the mean of two velocities; what was clipped does not come back divided by t - s."""
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    net, x, rows = Jump(teacher), 5.3 * torch.ones(8, 3), torch.arange(8)
    t, m, s = (torch.full((8,), time) for time in (1.0, 0.75, 0.5))
    target = objective_of(net, teacher, clamp=4.0).bootstrapped(net(x, t, Condition(), to=m), m, s, Condition(), rows)
    first = net(x, t, Condition(), to=m)
    x_m = first.to(m)
    assert x_m.min() > 4.2 and first.velocity.abs().max() < 4
    second = net(x_m.clamp(max=4.0), m, Condition(), to=s)
    assert torch.allclose(target, (first.velocity + second.velocity) / 2, atol=1e-5)
    assert (second.velocity - net(x_m, m, Condition(), to=s).velocity).abs().min() > 1e-2


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_any_number_of_exact_steps_ends_alike(count: int) -> None:
    noise = torch.randn(64, 3)
    net = Jump(GaussianModel(*LAW, Flow(), "flow_prediction"))
    assert torch.allclose(walked(net, count, noise), 1 + 0.7 * noise, atol=1e-5)


@pytest.mark.parametrize("mode, least", [("distillation", 0.1), ("training", 0.15)])
def test_it_learns_the_map(mode: Any, least: float) -> None:
    """From random weights toward N(1, .7^2), 1,500 steps, half of the rows bootstrapped. Seen: .059 and .088."""
    torch.manual_seed(0)
    net = Perceptron()
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    objective = objective_of(net, teacher, mode=mode, grid=Grid(16), bootstrap=0.5, target_decay=0.95)
    objective.targets["target"] = copy.deepcopy(net).requires_grad_(False)
    train(objective, 1500, 3e-3)
    assert error(net) < least and error(net, 4) < least


@pytest.mark.parametrize("transition", [renoise, GammaJump(0.5)])
def test_fresh_noise_is_refused(transition: Any) -> None:
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    with pytest.raises(UserError, match=r"set model\.transition=ode"):
        Objective(Config(), Triad(teacher, Guided(teacher)), walk((1.0,), transition))


def test_steps_that_are_never_learnt_are_refused() -> None:
    net = GaussianModel(*LAW, Flow(), "flow_prediction")
    objective_of(net, net, (1.0, 0.75, 0.5, 0.25))
    objective_of(net, net, (1.0, 0.5, 0.25))
    for times in ((1.0, 2 / 3, 1 / 3), (1.0, 0.75, 0.25), (1.0, 0.9)):
        with pytest.raises(UserError, match="none of the ladder"):
            objective_of(net, net, times)
    shifted = tuple(3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25))
    objective_of(net, net, shifted, grid=Grid(128, 3.0))
    with pytest.raises(UserError, match=r"objective\.grid\.shift"):
        objective_of(net, net, shifted)


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"grid": Grid(12)}, "power of two"),
        ({"grid": Grid(1)}, "power of two"),
        ({"bootstrap": 0.0}, "bootstrap"),
        ({"target_decay": 1.0}, "target_decay"),
        ({"clamp": 0.0}, "clamp"),
    ],
)
def test_keys_that_cannot_be(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Config(**wrong)


def test_the_jump_target_undoes_the_jump() -> None:
    for schedule, kind in PROCESSES:
        x, t, s = torch.randn(8, 3), torch.full((8,), 0.7), torch.full((8,), 0.2)
        said = Prediction(torch.randn(8, 3), kind, x, t, schedule)
        back: Tensor = said.jump_target(said.to(s), s)
        assert torch.allclose(back, said.value, atol=1e-5)

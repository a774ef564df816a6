"""TCD and its segments (TSCD)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from flow_maps import (
    LAW,
    NAMES,
    PROCESSES,
    VP,
    Ending,
    Jump,
    Perceptron,
    data,
    guided,
    one_step_error,
    teacher_of,
    train,
)
from oracle import ConsistencyMap, play, walk

from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.core.times import Grid, Step
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives import tcd, tscd
from fewstep.objectives.base import Triad
from fewstep.rollout import GammaJump, Rollout, cps, ode, renoise


def of(net: Backbone, module: Any = tcd, teacher: GaussianModel | None = None, **changes: Any) -> Any:
    config = module.Config(**{"target": "self", "distance": "l2", "grid": Grid(16), **changes})
    return module.Objective(config, Triad(net, guided(teacher or teacher_of())), walk((1.0,), ode))


def exactly(objective: Any, teacher: GaussianModel, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(objective, "cleaner", lambda x_t, x0, eps, t, m, batch: teacher.flow_map(x_t, t, m))
    return objective


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_told_both_times_the_exact_map_has_no_loss(
    schedule: NoiseSchedule, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(schedule, kind)
    objective = exactly(of(Jump(teacher), second_time=True, teacher=teacher), teacher, monkeypatch)
    (turn,) = objective.turns(data(1024), 0)
    assert turn.loss < 1e-8


def test_told_one_time_no_weights_are_right_for_every_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the consistency function, not the denoiser; but for one fixed end the map to it is."""
    teacher = teacher_of()
    for net in (ConsistencyMap(teacher), teacher):
        (turn,) = exactly(of(net), teacher, monkeypatch).turns(data(1024), 0)
        assert turn.loss > 1e-5
    fixed = exactly(of(Ending(teacher, lambda t: 0.25 * (t > 0.25))), teacher, monkeypatch)
    monkeypatch.setattr(fixed, "ends", lambda batch, t, m: 0.25 * (t > 0.25))
    (turn,) = fixed.turns(data(1024), 0)
    assert turn.loss < 1e-8


@pytest.mark.parametrize("schedule, exact, map_alone, denoiser", [(Flow(), 0.2281, 0.4019, 0.1502)], ids=["flow"])
def test_what_a_jump_does_to_the_variance(
    schedule: NoiseSchedule, exact: float, map_alone: float, denoiser: float
) -> None:
    """Data of deviation .5, from t = .8 to s = .35: the flow map keeps the law, the x0 of others does not."""
    teacher = GaussianModel(0.0, 0.5, schedule, "flow_prediction")
    at_t = schedule.at(torch.tensor([0.8]), torch.zeros(1, 1))
    x = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    x = x / x.std() * (at_t.alpha**2 * 0.25 + at_t.sigma**2).sqrt()
    t, s = torch.full((len(x),), 0.8), torch.full((len(x),), 0.35)
    clean = ConsistencyMap(teacher)(x, t, Condition())
    found = [teacher.flow_map(x, t, s), clean.to(s), teacher(x, t, Condition()).to(s)]
    assert [y.var().item() for y in found] == pytest.approx([exact, map_alone, denoiser], abs=2e-4)


def test_ends_are_rungs_at_or_below_the_cleaner_time() -> None:
    objective, batch = of(teacher_of(), grid=Grid(10, shift=2.0)), data(4000)
    t, m = objective.neighbours(batch, 0)
    s = objective.ends(batch, t, m)
    ladder = objective.config.grid.times(Flow())
    assert (s <= m).all() and torch.isin(s, ladder).all()
    low = s[m == ladder[4]]
    shares = torch.tensor([(low == rung).float().mean() for rung in ladder[:5]])
    assert (shares - 0.2).abs().max() < 4 * 0.4 / len(low) ** 0.5


def test_the_jump_back_to_where_it_is_leaves_everything() -> None:
    """s = m: the target is x_m itself, bit for bit."""
    objective, batch = of(teacher_of()), data(64)
    m = torch.full((64,), 0.5)
    assert torch.equal(objective.target(batch.noise, m, m, batch.cond), batch.noise)


def test_one_segment_is_trajectory_consistency() -> None:
    net = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    one = play(of(net), data(256))["generator"]
    other = play(of(copy.deepcopy(net), tscd, segments=1), data(256))["generator"]
    assert one.loss == other.loss and one["generator.mean"] == other["generator.mean"]


@pytest.mark.parametrize("segments", [1, 2, 4, 8, 16])
def test_ends_stay_in_the_segment(segments: int) -> None:
    objective, batch = of(teacher_of(), tscd, segments=segments), data(4000)
    t, m = objective.neighbours(batch, 0)
    s, floor = objective.ends(batch, t, m), objective.floor(t)
    long = 1 / segments
    assert torch.allclose(floor, ((t - 1e-4) / long).floor() * long, atol=1e-5)
    assert (s >= floor).all() and (s <= m).all() and (s < t).all() and (t <= floor + long + 1e-6).all()
    assert segments == 16 or (s == floor).float().mean() < 1


def test_jumps_to_the_floor_survive_the_merging_of_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """One end for each t has an exact network, for 8 segments as for 4; random ends have none without a second time."""
    teacher = teacher_of()
    for segments in (8, 4, 2, 1):
        objective = of(teacher, tscd, segments=segments)
        objective.triad = Triad(Ending(teacher, objective.floor), objective.triad.real_score)
        exactly(objective, teacher, monkeypatch)
        (random,) = objective.turns(data(512), 0)
        monkeypatch.setattr(objective, "ends", lambda batch, t, m, at=objective: at.floor(t))
        (turn,) = objective.turns(data(512), 0)
        assert turn.loss < 1e-8 < 1e-7 < random.loss


@pytest.mark.parametrize("gamma, same", [(0.0, ode), (1.0, renoise)])
def test_the_ends_of_gamma_are_the_jump_and_fresh_noise(gamma: float, same: Any) -> None:
    noise, draw = torch.randn(32, 3), Draw(0, 0, torch.arange(32))
    steps = [Step(t, t) for t in (1.0, 0.7, 0.4)]
    one, other = (
        Rollout(steps, step)(teacher_of(VP, "epsilon"), noise, Condition(), draw).x0
        for step in (GammaJump(gamma), same)
    )
    assert torch.allclose(one, other, atol=1e-5)


def test_one_step_learns_the_map() -> None:
    """Told both times, from random weights (seen: .07, some of it the teacher's 16 Euler steps)."""
    torch.manual_seed(0)
    net = Perceptron(told=1)
    train(of(net, second_time=True), 1500)
    assert one_step_error(net, to=torch.zeros(4096)) < 0.1


def test_segments_in_stages_learn_the_map() -> None:
    """8, 4, 2 and 1 segments, each from the last one's weights; told both times (seen: .05)."""
    torch.manual_seed(0)
    net = Perceptron(told=1)
    for segments in (8, 4, 2, 1):
        train(of(net, tscd, second_time=True, segments=segments), 400)
    assert one_step_error(net, to=torch.zeros(4096)) < 0.12


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"segments divides the 16 intervals .* but 5"):
        tscd.Config(segments=5, grid=Grid(16))
    with pytest.raises(UserError, match="renoise, gamma or ode"):
        tcd.Objective(tcd.Config(), Triad(teacher_of(), guided(teacher_of())), walk((1.0, 0.5), cps(0.5)))
    config = tscd.Config(mode="training", grid=Grid(16))
    config.judge.weight = 0.1
    objective = tscd.Objective(config, Triad(teacher_of()), walk((1.0,)))
    with pytest.raises(UserError, match="reads the features of a teacher"):
        objective.attach(torch.zeros(2, 3), Condition())


class Stretched(Backbone):
    """A prediction whose x0 and eps are anything: for the geometry of a jump alone."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.kind = Flow(), "flow_prediction"

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        return Prediction(torch.sin(3 * x_t), self.kind, x_t, t, self.schedule)


def test_a_jump_of_no_length_is_the_identity_for_any_network() -> None:
    x, t = torch.randn(64, 3), torch.linspace(0.05, 1, 64)
    assert torch.allclose(Stretched()(x, t, Condition()).to(t), x, atol=1e-6) and LAW == (1.0, 0.7)

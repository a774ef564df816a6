from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from flow_maps import LAW, NAMES, PROCESSES, Perceptron, data, guided, teacher_of, train
from oracle import play, walk

from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule, add_noise, remap
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives import rectified_flow
from fewstep.objectives.base import Triad
from fewstep.objectives.perflow import Config, Objective
from fewstep.objectives.pieces.flow import as_flow
from fewstep.rollout import ode, renoise


def of(net: Backbone, count: int, teacher: GaussianModel | None = None, **changes: Any) -> Objective:
    times = tuple(1 - i / count for i in range(count))
    return Objective(Config(**changes), Triad(net, guided(teacher or teacher_of())), walk(times, ode))


def test_one_window_is_reflow_with_the_pairs_made_on_the_way() -> None:
    """The same loss and gradient as reflow on (z, the teacher's walk from z), at the same times."""
    net = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    ours, batch = of(net, 1, solver_steps=5), data(256)
    high, low = ours.window(batch)
    z, x = ours.ends(batch, high, low)
    assert torch.equal(z, batch.noise) and (high == 1).all() and (low == 0).all()
    steps = walk(tuple(1 - i / 5 for i in range(5)), ode)
    made = steps(teacher_of(), batch.noise, Condition(), batch.draw).x0
    assert torch.allclose(x, made, atol=1e-5)

    class Renamed(Draw):
        def uniform(self, purpose, shape=()):
            return super().uniform("perflow.t" if purpose == "reflow.t" else purpose, shape)

    pair = Pair(z, x, Condition())
    same = Batch(batch.noise, Condition(), Renamed(0, 0, torch.arange(256)), pair=pair)
    other = rectified_flow.Objective(rectified_flow.Config(), Triad(copy.deepcopy(net)), walk((1.0,), ode))
    one, two = play(ours, batch)["generator"], play(other, same)["generator"]
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert one["generator.mean"] == pytest.approx(two["generator.mean"], rel=1e-4)


def test_a_window_for_each_step_of_the_teacher_is_the_teacher() -> None:
    """One solver step: at the upper edge the straight path has the teacher's own velocity."""
    objective, batch = of(teacher_of(), 6, solver_steps=1), data(256)
    high, low = objective.window(batch)
    x_high, x_low = objective.ends(batch, high, low)
    v = (x_high - x_low) / (high - low)[:, None]
    assert torch.allclose(v, teacher_of()(x_high, high, Condition()).velocity, atol=1e-4)


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_windows_join_and_the_ends_follow_the_flow(schedule: NoiseSchedule, kind: Kind) -> None:
    """Edges are the student's own times as flows; with Heun steps the lower end is the exact map's."""
    teacher = teacher_of(schedule, kind)
    objective, batch = of(teacher, 4, teacher, solver="heun", solver_steps=12), data(512)
    high, low = objective.window(batch)
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    edges = remap(schedule, Flow(), levels, levels)[0]
    assert torch.isin(high, edges).all() and torch.isin(low, edges).all() and (high > low).all()
    x_high, x_low = objective.ends(batch, high, low)
    t, scale = remap(Flow(), schedule, high, x_high)
    s, back = remap(Flow(), schedule, low, x_low)
    exact = teacher.flow_map(scale * x_high, t, s) / back
    assert (x_low - exact).square().mean().sqrt() < 0.02
    inside = (high < edges[0]) & (low > 0)
    noised = add_noise(Flow(), batch.x0, batch.noise, high)  # type: ignore[arg-type]
    assert torch.allclose(x_high[inside], noised[inside])


class Windowed(Perceptron):
    """Also sees how far it is inside its window: at the edges the velocity jumps."""

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        inside = torch.ceil(4 * t - 1e-4) - 4 * t
        return super().forward(x_t, t, Condition({}, {"inside": inside}))


def test_four_windows_learn_the_way() -> None:
    torch.manual_seed(0)
    net = Windowed(told=1)
    objective = of(net, 4, solver="heun", solver_steps=4)
    train(objective, 900)
    noise = torch.randn(4096, 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = objective.rollout(net, noise, Condition(), Draw(0, 0, torch.arange(4096))).x0
    assert (x - (LAW[0] + LAW[1] * noise)).square().mean().sqrt() < 0.08


def test_refusals() -> None:
    with pytest.raises(UserError, match="solver_steps is at least 1, but 0"):
        Config(solver_steps=0)
    with pytest.raises(UserError, match=r"model\.transition=ode"):
        Objective(Config(), Triad(teacher_of(), guided(teacher_of())), walk((1.0, 0.5), renoise))
    assert as_flow(teacher_of()).kind == "flow_prediction"

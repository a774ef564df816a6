from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flow_maps import NAMES, PROCESSES, Perceptron, data, guided, one_step_error, teacher_of, train
from oracle import ConsistencyMap, walk

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import NoiseSchedule, Trig, remap, shift
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.tbcm import Config, Objective


def of(net: Backbone, teacher: GaussianModel | None = None, dims: int = 3, **changes: Any) -> Objective:
    config = Config(**{"warmup": 0, **changes})
    found = Objective(config, Triad(net, guided(teacher or teacher_of())), walk((1.0,)))
    found.attach(torch.zeros(2, dims), Condition())
    return found


def test_times_fall_one_from_each_shifted_interval() -> None:
    objective = of(teacher_of(), states=8, route_shift=2.5)
    times = objective.route(data(500))
    edges = shift(torch.arange(9, dtype=torch.float64) / 8, 2.5)
    assert times.shape == (8, 500) and (times[0] == 1).all() and (times[1:] < times[:-1]).all()
    for i in range(1, 8):
        assert (times[i] > edges[7 - i] - 1e-6).all() and (times[i] < edges[8 - i] + 1e-6).all()


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_states_follow_the_flow_to_the_order_of_their_steps(schedule: NoiseSchedule, kind: Kind) -> None:
    """Against the exact map from pure noise: halving the steps halves the error (global order 1)."""
    teacher, errors = teacher_of(schedule, kind), []
    for count in (16, 32, 64):
        objective, batch = of(teacher, teacher, states=count, route_shift=1.0), data(256)
        states = objective.states(batch)
        start, pure = (batch.noise.repeat(count - 1, 1) for _ in range(2))
        there, scale = remap(Trig(), schedule, torch.ones(len(start)), start)
        t, back = remap(Trig(), schedule, states.t, states.x)
        exact = teacher.flow_map(scale * start, there, t) / back
        errors.append((states.x - exact).square().mean().sqrt().item())
        assert pure.shape == states.x.shape == states.velocity.shape
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.5) and errors[1] / errors[2] == pytest.approx(2, abs=0.5)


def test_no_data_is_read_and_the_teacher_is_asked_once_a_state() -> None:
    asked = []

    class Counting(GaussianModel):
        def forward(self, x_t, t, cond, **more):
            asked.append(len(x_t))
            return super().forward(x_t, t, cond, **more)

    teacher = Counting(1.0, 0.7, *PROCESSES[0])
    objective = of(ConsistencyMap(teacher_of()), teacher, states=6)
    assert objective.reads == ()
    (turn,) = objective.turns(replace(data(32), x0=None), 0)
    assert asked == [32] * 6 and turn.logs["tangent"] < 3e-3


def test_the_share_rises_and_calms_down() -> None:
    objective = of(teacher_of(), warmup=100, calm_from=300, calm=100, last_share=0.4)
    shares = [objective.share(step) for step in (0, 50, 100, 300, 350, 400, 900)]
    assert shares == pytest.approx([0, 0.5, 1, 1, 0.7, 0.4, 0.4])


def test_one_step_learns_the_map_without_data() -> None:
    """From random weights (seen: .02)."""
    torch.manual_seed(0)
    net = Perceptron()
    objective = of(net, dims=1, states=12, warmup=300, adaptive=False, normal=0.0, weight="none")
    train(objective, 900, size=48)
    assert one_step_error(net) < 0.08


@pytest.mark.parametrize(
    "wrong", [{"mode": "training"}, {"states": 1}, {"route_shift": 0.0}, {"calm": 0}, {"last_share": 1.5}]
)
def test_keys_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Config(**wrong)

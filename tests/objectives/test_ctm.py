from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from flow_maps import NAMES, PROCESSES, Jump, Perceptron, data, guided, one_step_error, teacher_of, train
from oracle import play, walk

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.core.times import Grid
from fewstep.models.backbone import Backbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.ctm import Config, Objective
from fewstep.rollout import ode


def of(net: Backbone, teacher: GaussianModel | None = None, **changes: Any) -> Objective:
    config = Config(**{"denoising": 0.0, "grid": Grid(16), **changes})
    found = Objective(config, Triad(net, guided(teacher or teacher_of())), walk((1.0,), ode))
    found.targets["target"] = copy.deepcopy(net).requires_grad_(False)
    return found


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_the_exact_map_has_no_loss(schedule: NoiseSchedule, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of(schedule, kind)
    objective = of(Jump(teacher), teacher, most_steps=4)
    monkeypatch.setattr(objective, "cleaner", lambda x_t, x0, eps, t, m, batch: teacher.flow_map(x_t, t, m))
    for step in range(4):
        (turn,) = objective.turns(data(512, step), step)
        assert turn.loss < 1e-8


def test_the_teacher_walks_every_rung_between() -> None:
    """Against its steps one by one; rows whose way is shorter stay where they end."""
    objective, batch = of(teacher_of(), most_steps=5, solver="euler"), data(64)
    ladder = objective.config.grid.times(Flow())
    index = torch.arange(64) % 16 + 1
    t, m = ladder[index], ladder[(index - 3).clamp(min=0)]
    x = objective.cleaner(batch.noise, batch.x0, batch.noise, t, m, batch)  # type: ignore[arg-type]
    for row in (0, 1, 2, 9, 15):
        by_hand = batch.noise[row : row + 1]
        for i in range(int(index[row]), max(int(index[row]) - 3, 0), -1):
            by_hand = teacher_of()(by_hand, ladder[i : i + 1], Condition()).to(ladder[i - 1 : i])
        assert torch.allclose(x[row], by_hand[0], atol=1e-6)


def test_the_number_of_steps_is_random_and_alike_for_the_batch() -> None:
    objective, lengths = of(teacher_of(), most_steps=4), set()
    for step in range(40):
        t, m = objective.neighbours(data(256, step), step)
        whole = m > 0
        lengths.add(tuple((16 * (t - m))[whole].round().int().unique().tolist()))
    assert lengths == {(1,), (2,), (3,), (4,)}


def test_gradient_goes_through_the_trailing_copy_and_not_into_it() -> None:
    net = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    objective = of(net, most_steps=3)
    with torch.no_grad():
        objective.targets["target"].mean += 0.3  # type: ignore[operator]
    turn = play(objective, data(256))["generator"]
    assert turn.touched() == {"generator"} and abs(turn["generator.mean"]) > 1e-3
    assert all(p.grad is None for p in objective.targets["target"].parameters())


def test_the_diagonal_is_denoising() -> None:
    """Told to stay, the exact map is the denoiser: at its minimum, the gradient is that of the sampling noise."""
    teacher = GaussianModel(1.0, 0.7, Flow(), "flow_prediction", learned=True)
    objective, batch = of(Jump(teacher), denoising=1.0), data(20_000, dims=1)
    best = objective.diagonal(batch)
    (at_best,) = torch.autograd.grad(best, teacher.mean)
    with torch.no_grad():
        teacher.mean += 0.2
    worse = objective.diagonal(batch)
    (beside,) = torch.autograd.grad(worse, teacher.mean)
    assert worse > best and abs(at_best) < 0.1 * abs(beside)


def test_the_weight_of_the_diagonal() -> None:
    net = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    batch = data(64)
    none, some = (next(iter(of(net, denoising=w).turns(batch, 0))).loss for w in (0.0, 0.7))
    assert (some - none).item() == pytest.approx(0.7 * of(net).diagonal(batch).item(), rel=1e-4)


def test_one_step_learns_the_map() -> None:
    """From random weights, Heun steps (seen: .08)."""
    torch.manual_seed(0)
    net = Perceptron(told=1)
    train(of(net, most_steps=4, denoising=0.5), 1200)
    assert one_step_error(net, to=torch.zeros(4096)) < 0.12


@pytest.mark.parametrize(
    "wrong", [{"most_steps": 0}, {"most_steps": 19}, {"denoising": -1.0}, {"second_time": False}, {"target": "self"}]
)
def test_keys_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Config(**wrong)

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from flow_maps import NAMES, PROCESSES, Ending, Perceptron, data, guided, teacher_of, train
from oracle import play, walk

from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import Flow, NoiseSchedule, shift, vp_from_betas
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.progressive import Config, Objective
from fewstep.rollout import ode, renoise


def even(count: int, factor: float = 1.0) -> tuple[float, ...]:
    return tuple(float(shift(torch.tensor(1 - i / count), factor)) for i in range(count))


def of(net: Backbone, count: int, teacher: Backbone | None = None, **changes: Any) -> Objective:
    triad = Triad(net, Guided(teacher or teacher_of()))
    return Objective(Config(**changes), triad, walk(even(count, changes.get("shift", 1.0)), ode))


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_one_step_of_the_target_lands_where_two_of_the_teacher_do(schedule: NoiseSchedule, kind: Kind) -> None:
    teacher = teacher_of(schedule, kind)
    objective, batch = of(teacher, 4, teacher), data(256)
    t, m, e = objective.interval(batch)
    x_t = batch.noise
    x0 = objective.target(x_t, t, m, e, batch)
    x_e = teacher(teacher(x_t, t, Condition()).to(m), m, Condition()).to(e)
    at_t, at_e = schedule.at(t, x_t), schedule.at(e, x_t)
    landed = at_e.alpha * x0 + at_e.sigma * (x_t - at_t.alpha * x0) / at_t.sigma
    assert torch.allclose(landed, x_e, atol=2e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_target_lands_where_it_was_made_for(kind: Any) -> None:
    """By one DDIM step of the process in float32; x~ = (x_e - s_e / s_t x_t) / (a_e - s_e / s_t a_t) by hand."""
    schedule, x_t, x_e = vp_from_betas("scaled_linear", 0.00085, 0.012), torch.randn(64, 3), torch.randn(64, 3)
    t, e = torch.full((64,), 0.8), torch.full((64,), 0.55)
    target = Prediction(x_t, kind, x_t, t, schedule).jump_target(x_e, e)
    read = Prediction(target, kind, x_t, t, schedule)
    assert torch.allclose(read.to(e), x_e, atol=1e-5)
    there, here = schedule.at(e, x_t), schedule.at(t, x_t)
    quotient = there.sigma / here.sigma
    assert torch.allclose(read.x0, (x_e - quotient * x_t) / (there.alpha - quotient * here.alpha), atol=1e-4)


def test_an_exact_teacher_gives_its_own_map() -> None:
    """Steps that land on the flow: the target of one of them is the flow map's, and its student has no loss."""
    teacher = teacher_of()
    objective, batch = of(teacher, 4), data(512)
    middle = {round(1 - i / 8, 4): round(1 - (i + 1) / 8, 4) for i in range(8)}

    def ends(t: torch.Tensor) -> torch.Tensor:
        return torch.tensor([middle[round(float(one), 4)] for one in t])

    exact = Ending(teacher, ends)
    objective.triad = Triad(objective.triad.generator, Guided(exact))
    student = Ending(teacher, lambda t: (t - 0.25).clamp(min=0))
    objective.triad = Triad(student, objective.triad.real_score)
    (turn,) = objective.turns(batch, 0)
    assert turn.loss < 1e-8


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_middle_of_a_step_is_a_time_of_the_last_stage(factor: float) -> None:
    """Beginning, middle and end of four steps are times of eight."""
    objective = of(teacher_of(), 4, shift=factor)
    t, m, e = objective.interval(data(400))
    eight = torch.tensor([*even(8, factor), 0.0])
    for times, index in ((t, (0, 2, 4, 6)), (m, (1, 3, 5, 7)), (e, (2, 4, 6, 8))):
        nearest = (times[:, None] - eight).abs().min(1)
        assert nearest.values.max() < 1e-5 and set(nearest.indices.tolist()) == set(index)


def test_weights() -> None:
    like, t = torch.zeros(3, 1), torch.tensor([0.9, 0.5, 0.2])
    snr = ((1 - t) / t) ** 2
    one, other = of(teacher_of(), 2), of(teacher_of(), 2, weight="snr_plus_one")
    assert torch.allclose(one.weight(t, like).flatten(), snr.clamp(min=1))
    assert torch.allclose(other.weight(t, like).flatten(), snr + 1)
    assert of(teacher_of(), 2, largest_weight=3.0).weight(t, like).max() == 3


def test_later_stages_ask_the_last_student() -> None:
    assert Objective.needs(Config()) == ("generator", "real_score")
    assert Objective.needs(Config(target_teacher="previous.generator")) == ("generator", "target_score")
    net = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    last = GaussianModel(0.5, 0.8, Flow(), "flow_prediction")
    later = Objective(Config(), Triad(net, target_score=Guided(last, 4.0)), walk(even(2), ode))
    first = of(copy.deepcopy(net), 2, last)
    one, other = (play(objective, data(128))["generator"] for objective in (later, first))
    assert one.loss == other.loss and one.touched() == {"generator"}


def test_stages_learn_one_step() -> None:
    """8, 4, 2, 1 steps, each from the last stage: within .12 of the teacher's own 16 steps."""
    torch.manual_seed(0)
    teacher: Backbone = teacher_of()
    net = Perceptron()
    for count in (8, 4, 2, 1):
        train(of(net, count, teacher, largest_weight=10.0), 400)
        teacher, net = net, copy.deepcopy(net)
    noise = torch.randn(2048, 1, generator=torch.Generator().manual_seed(1))
    draw = Draw(0, 0, torch.arange(2048))
    with torch.no_grad():
        many = walk(even(16), ode)(teacher_of(), noise, Condition(), draw).x0
        one = walk((1.0,), ode)(net, noise, Condition(), draw).x0
    assert (many - one).square().mean().sqrt() < 0.12


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"model\.transition=ode"):
        Objective(Config(), Triad(teacher_of(), guided(teacher_of())), walk(even(2), renoise))
    with pytest.raises(UserError, match=r"not those of objective\.shift=1\.0"):
        Objective(Config(), Triad(teacher_of(), guided(teacher_of())), walk(even(4, 3.0), ode))
    for wrong in ({"largest_weight": 0.5}, {"shift": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Config(**wrong)  # type: ignore[arg-type]

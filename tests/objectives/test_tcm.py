from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_maps import NAMES, PROCESSES, Perceptron, data, guided, one_step_error, teacher_of, train
from oracle import ConsistencyMap, play, walk

from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.tcm import Config, Objective
from fewstep.rollout import renoise


def of(net: Backbone, first: Backbone, teacher: GaussianModel | None = None, **changes: Any) -> Objective:
    config = Config(**{"times": Times(), "mode": "distillation", **changes})
    triad = Triad(net, guided(teacher or teacher_of()), target_score=Guided(first))
    return Objective(config, triad, walk((1.0,)))


def exactly(objective: Objective, teacher: GaussianModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(objective, "cleaner", lambda x_t, x0, eps, t, m, batch: teacher.flow_map(x_t, t, m))


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_exact_functions_on_both_sides_have_no_loss(
    schedule: NoiseSchedule, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(schedule, kind)
    objective = of(ConsistencyMap(teacher), ConsistencyMap(teacher), teacher)
    exactly(objective, teacher, monkeypatch)
    for step in (0, 500):
        (turn,) = objective.turns(data(512), step)
        assert turn.loss < 3e-4


def test_below_the_truncation_the_first_stage_answers() -> None:
    """Below t' the target is f-'s, at 0 the state itself, from t' on the generator's own."""
    first, own = ConsistencyMap(teacher_of()), GaussianModel(0.2, 0.9, Flow(), "flow_prediction")
    objective, batch = of(own, first), data(400)
    m = torch.linspace(0, 1, 401)[:400]
    target = objective.target(batch.noise, m, torch.zeros_like(m), batch.cond)
    low, high = (m < 0.5) & (m > 0), m >= 0.5
    assert torch.equal(target[low], first(batch.noise, m, batch.cond).x0[low])
    assert torch.equal(target[high], own(batch.noise, m, batch.cond).x0[high])
    assert torch.equal(target[0], batch.noise[0])


def test_times_lie_above_the_truncation_and_a_share_on_it() -> None:
    objective, batch = of(teacher_of(), teacher_of(), boundary_share=0.25), data(8000)
    t, m = objective.neighbours(batch, 0)
    assert (t >= 0.5).all() and (m < t).all()
    assert (t == 0.5).float().mean().item() == pytest.approx(0.25, abs=4 * 0.433 / 8000**0.5)
    assert (m[t == 0.5] < 0.5).all()


def test_pinned_rows_weigh_less() -> None:
    objective = of(teacher_of(), teacher_of(), weight="none", distance="l2", boundary_weight=0.1)
    a, b = torch.ones(2, 3), torch.zeros(2, 3)
    loss = objective.loss(a, b, torch.tensor([0.5, 0.8]), torch.tensor([0.2, 0.4]))
    assert loss.item() == pytest.approx((0.1 + 1.0) / 2)


def test_the_first_stage_is_never_moved() -> None:
    first = GaussianModel(1.0, 0.7, Flow(), "flow_prediction", learned=True).requires_grad_(False)
    net = GaussianModel(0.2, 0.9, Flow(), "flow_prediction", learned=True)
    turn = play(of(net, first), data(128))["generator"]
    assert turn.touched() == {"generator"} and abs(turn["generator.mean"]) > 1e-3
    assert Objective.needs(Config()) == ("generator", "target_score")


def test_a_random_student_learns_the_noisy_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """From an exact first stage; the step's ratio grows (seen: .03)."""
    torch.manual_seed(0)
    teacher, net = teacher_of(), Perceptron()
    objective = of(net, ConsistencyMap(teacher), stage_steps=150, ratio=2.0, weight="none", distance="l2")
    exactly(objective, teacher, monkeypatch)
    train(objective, 1000)
    assert one_step_error(net) < 0.06


def test_steps_below_the_truncation_are_refused() -> None:
    with pytest.raises(UserError, match=r"begins at 0\.25"):
        triad = Triad(teacher_of(), target_score=Guided(teacher_of()))
        Objective(Config(), triad, walk((1.0, 0.75, 0.5, 0.25), renoise))


@pytest.mark.parametrize("wrong", [{"truncation": 1.0}, {"boundary_share": 1.0}, {"boundary_weight": -0.1}])
def test_keys_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Config(**wrong)

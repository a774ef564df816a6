from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_maps import LAW, NAMES, PROCESSES, VP, Perceptron, data, guided, one_step_error, teacher_of, train
from oracle import ConsistencyMap, play, walk

from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import EDM, Flow, NoiseSchedule
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.ect import Config, Objective


def of(schedule: NoiseSchedule = PROCESSES[0][0], kind: Kind = "flow_prediction", **changes: Any) -> Objective:
    teacher = teacher_of(schedule, kind)
    return Objective(Config(**changes), Triad(ConsistencyMap(teacher), guided(teacher)), walk((1.0,)))


def test_the_cleaner_time_is_the_published_ratio() -> None:
    """q = 2, k = 8, b = 1 at stage 0: r / t = 0, 0, .02, .5, .5 at sigma = .01, .5, 2, 10, 80."""
    t = torch.tensor([0.01, 0.5, 2.0, 10.0, 80.0]) / 80
    m = of(EDM(), "sample").cleaner_time(t, 0)
    assert (m / t).tolist() == pytest.approx([0, 0, 0.02, 0.5, 0.5], abs=0.006)


@pytest.mark.parametrize("schedule", [Flow(), VP, EDM()], ids=["flow", "vp", "edm"])
def test_the_cleaner_time_rises_with_both(schedule: NoiseSchedule) -> None:
    objective, t = of(schedule, "sample"), torch.linspace(0.002, 1, 400)
    stages = torch.stack([objective.cleaner_time(t, stage) for stage in range(8)])
    assert (stages >= 0).all() and (stages < t).all()
    assert (stages[:, 1:] >= stages[:, :-1] - 1e-6).all() and (stages[1:] >= stages[:-1] - 1e-6).all()
    assert stages[7, -1] > 0.9 and stages[0, 0] == 0


def test_the_step_decides_the_stage() -> None:
    objective, batch = of(stage_steps=10), data(64)
    for step, stage in ((0, 0), (9, 0), (10, 1), (35, 3)):
        t, m = objective.neighbours(batch, step)
        assert torch.equal(m, objective.cleaner_time(t, stage))


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_an_exact_teacher_step_leaves_nothing(
    schedule: NoiseSchedule, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = of(schedule, kind, mode="distillation", weight="none")
    monkeypatch.setattr(
        objective, "cleaner", lambda x_t, x0, eps, t, m, batch: teacher_of(schedule, kind).flow_map(x_t, t, m)
    )
    for step in (0, 250, 900):
        (turn,) = objective.turns(data(256), step)
        assert turn.loss < 2e-4


def test_the_loss_is_the_norm_over_the_step() -> None:
    """With |a - b| far above c, loss (t - m) is |a - b| of the whole sample."""
    a, b = 3 * torch.randn(5, 12), torch.zeros(5, 12)
    t, m = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([0.8, 0.5, 0.1, 0.0, 0.45])
    assert of().loss(a, b, t, m).item() == pytest.approx((a.norm(dim=1) / (t - m)).mean().item(), rel=1e-3)


def test_training_reads_no_teacher() -> None:
    assert Objective.needs(Config()) == ("generator",)
    triad = Triad(GaussianModel(*LAW, Flow(), "flow_prediction", learned=True))
    assert play(Objective(Config(), triad, walk((1.0,))), data(32))["generator"].loss > 0


def test_one_step_learns_the_map_from_data() -> None:
    """Seven stages, from random weights: rms to 1 + .7 z (seen: .13)."""
    torch.manual_seed(0)
    net = Perceptron()
    config = Config(stage_steps=200, weight="none", distance="l2")
    config.times.mean, config.times.std = 1.0, 2.0
    train(Objective(config, Triad(net), walk((1.0,))), 1400, size=512)
    assert one_step_error(net) < 0.2


@pytest.mark.parametrize("wrong", [{"ratio": 1.0}, {"stage_steps": 0}, {"steep": -1.0}, {"times": None}])
def test_keys_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Config(**wrong)

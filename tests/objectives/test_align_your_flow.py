from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from maps import LAW, NAMES, PROCESSES, Jump, Perceptron, data_batch, error, train, walked
from oracle import Leaning, walk
from torch import nn

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives import meanflow
from fewstep.objectives.align_your_flow import Config, Objective
from fewstep.objectives.base import Triad
from fewstep.rollout import GammaJump, ode, renoise

FORMS = ["eulerian", "lagrangian"]
LATE = 10_000  # a step long after the warm-up


def objective_of(net: Backbone, teacher: Backbone, dims: int = 3, **changes: Any) -> Objective:
    found = Objective(Config(**changes), Triad(net, Guided(teacher)), walk((1.0,), ode))
    inputs = {"class_labels": torch.zeros(2, dtype=torch.long)} if found.config.guidance else {}
    found.attach(torch.zeros(2, dims), Condition(inputs))
    return found


def residual(objective: Objective, batch: Batch, step: int = LATE) -> float:
    (turn,) = objective.turns(batch, step)
    return float(turn.logs["residual"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_the_exact_map_has_no_gap(schedule: NoiseSchedule, kind: Kind, form: Any) -> None:
    """Per sample, whatever the two times, to float32; another law's map has one."""
    teacher = GaussianModel(*LAW, schedule, kind)
    batch = data_batch(512)
    squared = residual(objective_of(Jump(teacher), teacher, form=form, equal=0.2), batch)
    assert squared < (1e-8 if kind == "flow_prediction" else 1e-5)
    other = GaussianModel(0.5, 0.4, schedule, kind)
    assert residual(objective_of(Jump(other), teacher, form=form, equal=0.2), batch) > 1e-2


def test_the_warm_up_moves_from_flow_matching_to_the_map() -> None:
    """At step 0 the exact map has the gap u - v, halfway half of (t - s) du/dt, after it none."""
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    objective = objective_of(Jump(teacher), teacher, equal=0.0, warmup=100)
    batch = data_batch(512)
    whole, half, none = (residual(objective, batch, step) for step in (0, 50, 100))
    t, s = objective.interval(batch)
    x_t, _ = objective.noised(batch, t)
    u, v = objective.flow(x_t, t, batch.cond, to=s).velocity, teacher(x_t, t, batch.cond).velocity
    assert whole == pytest.approx((u - v).square().mean().item(), rel=1e-5) and whole > 1e-2
    assert half == pytest.approx(whole / 4, rel=1e-3) and none < 1e-8
    assert residual(objective_of(Jump(teacher), teacher, equal=0.0, warmup=0), batch, 0) < 1e-8


def test_without_normalising_it_is_the_square_of_the_mean_velocity() -> None:
    """The same gradient as that objective's plain squares, up to their scale of 2 times the values of a sample."""
    teacher, net = (GaussianModel(m, 0.9, Flow(), "flow_prediction", learned=True) for m in (1.0, 0.2))
    ours = objective_of(net, teacher, normalise=False, equal=0.0)
    theirs = meanflow.Objective(meanflow.Config(power=0.0, equal=0.0), ours.triad, ours.rollout)
    theirs.attach(torch.zeros(2, 3), Condition())
    theirs.stream = ours.stream  # type: ignore[misc]
    gradients = []
    for objective in (ours, theirs):
        (turn,) = objective.turns(data_batch(64), LATE)
        gradients.append(torch.autograd.grad(turn.loss, net.mean)[0])
    assert torch.allclose(2 * 3 * gradients[0], gradients[1], rtol=1e-4)


class Asked(Backbone):
    """A velocity that is a number for every value, which the gradient of the loss is read from."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.kind = Flow(), "flow_prediction"
        self.value = nn.Parameter(torch.zeros(64, 3))

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        return Prediction(self.value[: len(x_t)], self.kind, x_t, t, self.schedule)


def test_the_whole_gap_is_normalised() -> None:
    """The gradient is g / (rms(g) + c) / values: in each row its rms is rms / (rms + c), and its zero is that of g."""
    teacher, net = GaussianModel(*LAW, Flow(), "flow_prediction"), Asked()
    gradients = []
    for normalise in (False, True):
        (turn,) = objective_of(net, teacher, normalise=normalise, floor=0.1).turns(data_batch(64), LATE)
        gradients.append(torch.autograd.grad(turn.loss, net.value)[0] * 64 * 3)
    g, normed = gradients
    rms = g.square().mean(1).sqrt()
    assert torch.allclose(normed, g / (rms + 0.1)[:, None], rtol=1e-4, atol=1e-6)
    assert (rms.max() > 2 * rms.min()) and (normed.square().mean(1).sqrt() < 1).all()


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_any_number_of_exact_steps_ends_alike(count: int) -> None:
    noise = torch.randn(64, 3)
    net = Jump(GaussianModel(*LAW, Flow(), "flow_prediction"))
    assert torch.allclose(walked(net, count, noise), 1 + 0.7 * noise, atol=1e-5)


def labelled(batch: Batch) -> Batch:
    return replace(batch, cond=Condition({"class_labels": torch.ones(len(batch), dtype=torch.long)}))


def test_the_guidance_that_is_drawn_is_the_one_that_is_told() -> None:
    """Every row's teacher is u + w (c - u) with the w in its dial; w in [1, 3], and its constant when sampling."""
    teacher = Leaning(*LAW, Flow(), "flow_prediction")
    objective = objective_of(Jump(teacher), teacher, guidance=[1.0, 3.0], sampled_guidance=2.5)
    assert Objective.tells(objective.config) == {"guidance": 2.5} and Objective.tells(Config()) == {}
    batch = labelled(data_batch(256))
    guided, cond = objective.guided(batch)
    w = cond.dials["guidance"]
    assert 1 <= w.min() < 1.1 and 2.9 < w.max() <= 3 and batch.cond.dials == {}
    x_t, t = batch.noise, torch.full((256,), 0.5)
    with_, without = (teacher(x_t, t, c).value for c in (batch.cond, teacher.null(batch.cond)))
    said = guided(x_t, t, batch.cond).value
    assert torch.allclose(said, without + w[:, None] * (with_ - without), atol=1e-5)
    assert (said - with_).abs().max() > 0.5


@pytest.mark.parametrize("form, least", [("eulerian", 0.07), ("lagrangian", 0.12)])
def test_it_learns_the_map(form: Any, least: float) -> None:
    """From random weights toward N(1, .7^2), 1,200 steps. Seen: one step .045 and .083, four .045 and .035."""
    torch.manual_seed(0)
    net = Perceptron()
    objective = objective_of(net, GaussianModel(*LAW, Flow(), "flow_prediction"), dims=1, form=form, warmup=300)
    train(objective, 1200, 3e-3)
    assert error(net) < least and error(net, 4) < least


def test_fresh_noise_is_for_where_the_network_has_landed() -> None:
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    with pytest.raises(UserError, match=r"deterministic: set model\.transition=ode"):
        Objective(Config(), Triad(teacher, Guided(teacher)), walk((1.0,), renoise))
    Objective(Config(), Triad(teacher, Guided(teacher)), walk((1.0, 0.5), GammaJump(0.3)))


def test_guidance_needs_a_condition() -> None:
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    found = Objective(Config(guidance=[1.0, 2.0]), Triad(teacher, Guided(teacher)), walk((1.0,), ode))
    with pytest.raises(UserError, match="labels or prompts"):
        found.attach(torch.zeros(2, 3), Condition())


@pytest.mark.parametrize(
    "wrong", [{"equal": 1.5}, {"floor": 0.0}, {"warmup": -1}, {"guidance": [1.0]}, {"guidance": [3.0, 1.0]}]
)
def test_keys_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Config(**wrong)

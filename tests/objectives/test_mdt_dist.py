from __future__ import annotations

from typing import Any

import pytest
import torch
from maps import LAW, NAMES, PROCESSES, data_batch, train
from oracle import ConsistencyMap, walk
from torch import Tensor, nn

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind, Prediction
from fewstep.core.schedule import Flow, NoiseSchedule, remap
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.models.tangent import Tangent
from fewstep.objectives.base import Triad
from fewstep.objectives.mdt_dist import Config, Objective
from fewstep.rollout import Transition, cps, ode, renoise

INSIDE = Times(low=0.02, high=0.9)
FLOW: tuple[NoiseSchedule, Kind] = (Flow(), "flow_prediction")


def objective_of(net: Backbone, teacher: Backbone, dims: int = 3, **changes: Any) -> Objective:
    config = Config(**{"times": INSIDE, "own_times": INSIDE, **changes})
    found = Objective(config, Triad(net, Guided(teacher)), walk((1.0,), ode))
    found.attach(torch.zeros(2, dims), Condition())
    return found


def logs(objective: Objective, batch: Batch) -> dict[str, float]:
    (turn,) = objective.turns(batch, 0)
    return {name: value.item() for name, value in turn.logs.items()}


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
@pytest.mark.parametrize("tangent", [Tangent(), Tangent("difference", 0.01)], ids=["exact", "step of .01"])
def test_the_exact_way_has_no_residual(schedule: NoiseSchedule, kind: Kind, tangent: Tangent) -> None:
    """At data and at its own samples, per sample, to float32, or to the square of the step; another law's has one."""
    teacher, least = GaussianModel(*LAW, schedule, kind), 1e-5 if tangent.way == "auto" else 1e-3
    seen = logs(objective_of(ConsistencyMap(teacher), teacher, tangent=tangent), data_batch(512))
    assert seen["residual"] < least and seen["gap"] < least
    other = ConsistencyMap(GaussianModel(0.5, 0.4, schedule, kind))
    seen = logs(objective_of(other, teacher, tangent=tangent), data_batch(512))
    assert seen["residual"] > 0.05 and seen["gap"] > 0.05


def test_normalising_the_derivative_alone_moves_the_fixed_point() -> None:
    """The exact way then has a residual. Seen: rms .197, against 1e-4 without, by a step of .01."""
    teacher = GaussianModel(*LAW, *FLOW)
    plain, moved = (
        logs(objective_of(ConsistencyMap(teacher), teacher, normalise=on), data_batch(512))["residual"] ** 0.5
        for on in (False, True)
    )
    assert plain < 1e-3 and moved > 0.1
    assert not Config().normalise


def test_the_gradient_of_the_velocity_is_the_residual() -> None:
    """Velocity matching: g / values, in u; velocity distillation: the same, in the velocity that made the samples."""
    teacher, net = GaussianModel(*LAW, *FLOW), Straight()
    batch = data_batch(64)
    for keys in ({"distillation": 0.0}, {"matching": 0.0}):
        objective = objective_of(net, teacher, **keys)
        sample = objective.sample(batch, 0, True)
        loss, _ = objective.generator_loss(batch, sample, 0)
        (gradient,) = torch.autograd.grad(loss, net.value)
        x = batch.x0 if "distillation" in keys else sample.x0.detach()
        purpose = "matching" if "distillation" in keys else "own"
        x_t, t = objective.noised(batch, x, INSIDE, purpose)
        # u is a constant: du/dt = 0, and g = u - v.
        g = net.value.detach() - teacher(x_t, t, Condition()).value
        assert torch.allclose(gradient * gradient.numel(), g, atol=1e-5)


class Straight(Backbone):
    """A velocity that is a number for every value, at all times."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.kind = FLOW
        self.value = nn.Parameter(torch.randn(64, 3))

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        return Prediction(self.value[: len(x_t)] + 0 * x_t, self.kind, x_t, t, self.schedule)


@pytest.mark.parametrize("mean, sign", [(0.0, -1), (2.0, 1)])
def test_distillation_pulls_the_samples_to_the_teachers_law(mean: float, sign: int) -> None:
    """Where the student's way is that of another mean, the residual at its samples is the difference of the velocities.

    v = eps - x0 falls with the mean, and so does the velocity that made the samples.
    """
    teacher, net = GaussianModel(*LAW, *FLOW), ConsistencyMap(GaussianModel(mean, 0.7, *FLOW))
    objective, batch = objective_of(net, teacher), data_batch(512)
    sample = objective.sample(batch, 0, False)
    x_t, t = objective.noised(batch, sample.x0, INSIDE, "own")
    g = objective.residual(x_t, t, Condition())
    assert torch.sign(g).mean() == pytest.approx(-sign, abs=0.05)
    assert torch.allclose(objective.made_by(sample), batch.noise - sample.x0, atol=1e-5)


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_the_velocity_that_made_a_sample(schedule: NoiseSchedule, kind: Kind) -> None:
    """In the flow's coordinates it is what the network says at the time of its last level."""
    net = ConsistencyMap(GaussianModel(*LAW, schedule, kind))
    objective, batch = objective_of(net, net.of), data_batch(64)
    sample = objective.sample(batch, 0, False)
    t, scale = remap(schedule, Flow(), sample.t, batch.noise)
    said = objective.flow(scale * batch.noise, t, Condition()).velocity
    assert torch.allclose(objective.made_by(sample), said, atol=1e-3)


def test_what_it_reads() -> None:
    teacher = GaussianModel(*LAW, *FLOW)
    assert objective_of(teacher, teacher).reads == ("x0",)
    assert objective_of(teacher, teacher, matching=0.0).reads == ()


class Perceptron(Backbone):
    """A velocity (B, 1) of x_t and t."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.kind = FLOW
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition, *, to=None, taps=(), stop=False):
        return Prediction(self.layers(torch.cat([x_t, t[:, None]], 1)), self.kind, x_t, t, self.schedule)


def test_one_step_learns_the_map() -> None:
    """From random weights toward N(1, .7^2), 1,200 steps: rms distance to 1 + .7 z. Seen: .011."""
    torch.manual_seed(0)
    net = Perceptron()
    objective = objective_of(
        net, GaussianModel(*LAW, *FLOW), dims=1, times=Times(), own_times=Times(), distillation=0.3
    )
    train(objective, 1200, 3e-3)
    noise = torch.randn(4096, 1)
    with torch.no_grad():
        x = noise - net(noise, torch.ones(4096), Condition()).value
    off = (x - (1 + 0.7 * noise)).square().mean().sqrt()
    assert off < 0.04


@pytest.mark.parametrize("transition", [ode, cps(0.5)])
def test_several_steps_without_fresh_noise_are_refused(transition: Transition) -> None:
    triad = Triad(net := GaussianModel(*LAW, *FLOW), Guided(net))
    with pytest.raises(UserError, match=r"set model\.transition=renoise"):
        Objective(Config(), triad, walk((1.0, 0.5), transition))
    Objective(Config(), triad, walk((1.0, 0.5), renoise))


@pytest.mark.parametrize("wrong", [{"matching": -1.0}, {"matching": 0.0, "distillation": 0.0}])
def test_keys_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Config(**wrong)

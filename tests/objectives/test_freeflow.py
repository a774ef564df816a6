from __future__ import annotations

from typing import Any

import pytest
import torch
from maps import LAW, NAMES, PROCESSES, Jump, Perceptron, error
from oracle import adam, learn, players_for, walk

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule, expand
from fewstep.core.times import Step, Times
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.models.tangent import Tangent
from fewstep.objectives.base import Triad
from fewstep.objectives.freeflow import Config, Objective
from fewstep.rollout import Rollout, ode, renoise

ONE = Rollout([Step(1.0, 1.0)], ode, two_times=True)


def objective_of(net: Backbone, teacher: Backbone, critic: Any = None, dims: int = 3, **changes: Any) -> Objective:
    config = Config(**({} if critic else {"correct": 0.0}), **changes)
    found = Objective(config, Triad(net, Guided(teacher), critic), ONE)
    found.attach(torch.zeros(2, dims), Condition())
    return found


def batch(rows: int = 512, dims: int = 3) -> Batch:
    """Noise alone: there are no data to read."""
    draw = Draw(0, 0, torch.arange(rows))
    return Batch(draw.normal("noise", (dims,)), Condition(), draw)


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_the_exact_map_predicts_itself(schedule: NoiseSchedule, kind: Kind) -> None:
    """From noise to any time, to float32, where another law's map does not; VP begins at its own last level."""
    teacher = GaussianModel(*LAW, schedule, kind)
    for tangent in (Tangent(), Tangent("difference", 1e-3)):
        squared = objective_of(Jump(teacher), teacher, tangent=tangent).predicted(batch())
        assert squared < (1e-6 if kind == "flow_prediction" else 1e-4)
    other = Jump(GaussianModel(0.5, 0.4, schedule, kind))
    assert objective_of(other, teacher).predicted(batch()) > 1e-2


@pytest.mark.parametrize("schedule, kind", PROCESSES, ids=NAMES)
def test_what_is_learnt_from_noise_is_what_is_sampled(schedule: NoiseSchedule, kind: Kind) -> None:
    """f(z, 0) in the flow's coordinates is the clean sample of the rollout."""
    net = Jump(GaussianModel(*LAW, schedule, kind))
    objective, given = objective_of(net, net.of), batch(64)
    z, t = objective.noisiest(given.noise)
    clean = torch.zeros_like(t)
    f = z - expand(t, z) * objective.flow(z, t, Condition(), to=clean).velocity
    sampled = ONE(net, given.noise, Condition(), given.draw).x0
    assert torch.allclose(f, sampled, atol=1e-3)
    assert torch.allclose(t, torch.ones(64)) == isinstance(schedule, Flow)


def test_a_step_of_no_length_is_the_velocity_of_the_teacher() -> None:
    """At s = 1 the target is v(z, 1) whatever the network is."""
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    objective = objective_of(Jump(GaussianModel(-2.0, 0.1, Flow(), "flow_prediction")), teacher)
    z, ones = batch().noise, torch.ones(512)
    target = objective.at_end(Guided(teacher), z, ones, ones, Condition()) + objective.by_end(
        z, ones, ones, Condition()
    )
    assert torch.allclose(target, teacher(z, ones, Condition()).velocity, atol=1e-6)
    assert torch.allclose(target, z - 1, atol=1e-6)  # v = E[eps - x0 | z]


@pytest.mark.parametrize("law, pull", [(LAW, 0.0), ((0.0, 0.7), -1.0)])
def test_the_correction_is_the_gap_at_the_samples(law: tuple[float, float], pull: float) -> None:
    """A critic that knows a student of the right law gives no gradient; one of a lower mean is pushed up."""
    teacher, critic = (GaussianModel(*one, Flow(), "flow_prediction") for one in (LAW, law))
    objective = objective_of(Jump(GaussianModel(*law, Flow(), "flow_prediction", learned=True)), teacher, critic)
    given = batch()
    sample = objective.sample(given, 0, grad=True)
    _, logs = objective.generator_loss(given, sample, 0)
    (gradient,) = torch.autograd.grad(logs["correct"], sample.x0)
    assert gradient.mean() * gradient.numel() == pytest.approx(pull, abs=0.35 if pull else 1e-5)


def test_nothing_reads_data() -> None:
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    objective = objective_of(Jump(teacher), teacher)
    assert objective.reads == () and Objective.needs(Config()) == ("generator", "real_score", "fake_score")
    assert Objective.needs(Config(correct=0.0)) == ("generator", "real_score")
    assert not objective.criticises(0) and [objective.generates(step) for step in range(2)] == [True, True]


@pytest.mark.parametrize("correct, least", [(0.0, 0.02), (0.3, 0.04)])
def test_it_learns_the_map_from_noise_alone(correct: float, least: float) -> None:
    """From random weights toward N(1, .7^2). Seen: .006 without the correction, .013 with it."""
    torch.manual_seed(0)
    net, teacher = Perceptron(), GaussianModel(*LAW, Flow(), "flow_prediction")
    critic = GaussianModel(0.0, 1.0, Flow(), "flow_prediction", learned=True) if correct else None
    objective = objective_of(net, teacher, critic, dims=1, **({"correct": correct} if correct else {}))
    steps = 1000
    players = players_for(objective, adam(3e-3, steps), adam(1e-2) if correct else None)
    learn(objective, players, steps, size=256, shape=(1,))
    assert error(net) < least


def test_several_steps_and_fresh_noise_are_refused() -> None:
    triad = Triad(net := GaussianModel(*LAW, Flow(), "flow_prediction"), Guided(net), net)
    with pytest.raises(UserError, match=r"set model\.steps=1"):
        Objective(Config(), triad, walk((1.0, 0.5), ode))
    with pytest.raises(UserError, match=r"set model\.transition=ode"):
        Objective(Config(), triad, walk((1.0,), renoise))


@pytest.mark.parametrize("wrong", [{"correct": -1.0}, {"ratio": 0}, {"ratio": 2, "correct": 0.0}])
def test_keys_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Config(**wrong)


def test_the_ends_are_drawn_from_their_law() -> None:
    """With all of them at the last level the residual is that of flow matching at pure noise."""
    teacher = GaussianModel(*LAW, Flow(), "flow_prediction")
    other = Jump(GaussianModel(0.5, 0.4, Flow(), "flow_prediction"))
    squared = objective_of(other, teacher, ends=Times(low=0.9999, high=1.0)).predicted(batch())
    assert squared == pytest.approx(0.25, abs=1e-2)  # v differs by the means, 1 and .5

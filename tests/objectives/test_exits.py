"""Where the rollout of a training step ends, how far back its gradient goes, and the regression that follows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import STUDENT, Student, gaussian_triad, jump, play, walk
from torch import Tensor

from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.objectives import base, dmd, dmd2
from fewstep.objectives.base import Objective, Triad
from fewstep.objectives.pieces.distances import Distance, distance
from fewstep.objectives.pieces.exits import Exits
from fewstep.objectives.pieces.paired import paired_loss
from fewstep.rollout import ode, renoise

TIMES = (1.0, 0.75, 0.5, 0.25)
LAWS = [(0.4, 0.6), (-0.2, 0.9), (0.1, 1.1), (0.3, 0.8)]
PLAIN = {"dmd": {"regression": 0.0}, "dmd2": {"ratio": 1, "gan_weight": 0.0}}
"""Objective -> the keys that leave the score gap alone, with a generator move at every step."""

every_objective = pytest.mark.parametrize("name", PLAIN)


def four_steps(schedule: NoiseSchedule | None = None) -> Student:
    return Student(schedule or Flow(), LAWS, TIMES)


def objective_of(name: str, exits: Exits, transition: Any = ode, **changes: Any) -> Objective:
    """Four steps of a Gaussian student, none of whose laws is the teacher's."""
    module, roles = base.find(name), gaussian_triad(Flow(), "flow_prediction")
    config = module.Config(**{**PLAIN[name], "exits": exits, **changes})
    return module.Objective(config, Triad(four_steps(), roles.real_score, roles.fake_score), walk(TIMES, transition))


def batch_at(step: int, rows: int = 8) -> Batch:
    """Unit noise, and stored pairs of other noise whose samples are anything."""
    draw = Draw(0, step, torch.arange(rows))
    pair = Pair(draw.normal("stored", (16,)), draw.normal("made", (16,)) + 1, Condition())
    return Batch(draw.normal("noise", (16,)), Condition(), draw, pair=pair)


def by_hand(student: Student, noise: Tensor, draw: Draw, exit: int, window: int, transition: Any) -> Tensor:
    """x0 of step `exit`, with the state cut off from what came before the last `window` steps."""
    x = noise
    for i in range(exit + 1):
        if i == exit - window + 1:
            x = x.detach()
        x0 = student.mean[i] + student.std[i] * x
        if i == exit:
            break
        if transition is ode:
            toward, keep = jump(student.schedule, TIMES[i], TIMES[i + 1])
            x = toward * x0 + keep * x
        else:
            x = (1 - TIMES[i + 1]) * x0 + TIMES[i + 1] * draw.normal(f"rollout.{i}", noise.shape[1:])
    return x0


def test_the_last_step_is_always_the_exit_of_the_law_last() -> None:
    draws = [Draw(0, step, torch.arange(4)) for step in range(100)]
    for times in (TIMES, TIMES[:1]):
        assert {Exits("last").at(walk(times), draw, "any") for draw in draws} == {len(times) - 1}


def test_every_step_is_as_likely_an_exit_of_the_law_random() -> None:
    """Chi-squared of 4000 exits over four steps: three degrees of freedom, one in a thousand. Samples do not matter."""
    exits = [Exits().at(walk(TIMES), Draw(0, step, torch.arange(4)), "any") for step in range(4000)]
    counts = torch.tensor(exits).bincount(minlength=4).double()
    assert len(counts) == 4 and ((counts - 1000) ** 2 / 1000).sum() < 16.3
    assert exits[:50] == [Exits().at(walk(TIMES), Draw(0, step, torch.arange(9, 11)), "any") for step in range(50)]


@every_objective
@pytest.mark.parametrize("transition", [ode, renoise])
@pytest.mark.parametrize("law", ["last", "random"])
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_the_gradient_is_that_of_the_last_steps_of_the_rollout(
    name: str, transition: Any, law: Any, window: int
) -> None:
    """Against autograd through a rollout written out, in every weight of every step, for a random cotangent."""
    objective, other, seen = objective_of(name, Exits(law, window), transition), four_steps(), set()
    student = objective.triad.generator
    assert isinstance(student, Student)
    for step in range(1 if law == "last" else 12):
        batch = batch_at(step)
        sample = objective.sample(batch, step, True)
        seen.add(sample.index)
        expected = by_hand(other, batch.noise, batch.draw, sample.index, window, transition)
        assert torch.allclose(sample.x0, expected, atol=1e-6)
        cotangent = batch.draw.normal("cotangent", (16,))
        got = torch.autograd.grad((sample.x0 * cotangent).sum(), [student.mean, student.std])
        want = torch.autograd.grad((expected * cotangent).sum(), [other.mean, other.std])
        for one, two in zip(got, want, strict=True):
            assert torch.allclose(one, two, rtol=1e-5, atol=1e-5)
            assert one.nonzero().flatten().tolist() == list(range(max(0, sample.index - window + 1), sample.index + 1))
        assert not objective.sample(batch, step, False).x0.requires_grad
    assert seen == ({3} if law == "last" else {0, 1, 2, 3})


@every_objective
@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_generator_turn_moves_the_window_alone(name: str, window: int) -> None:
    """The score gap and the regression alike reach the last `window` of the four steps, and no other."""
    for regression in (0.0, 0.5):
        objective = objective_of(name, Exits("last", window), regression=regression)
        turn = play(objective, batch_at(0))["generator"]
        for weight in ("generator.mean", "generator.std"):
            assert turn.gradients[weight].nonzero().flatten().tolist() == list(range(4 - window, 4))
        assert turn.touched() == {"generator"}


@pytest.mark.parametrize("kind", ["l2", "l1", "huber"])
@pytest.mark.parametrize("exit, window", [(0, 1), (2, 2), (3, 1), (3, 4)])
def test_the_paired_loss_is_the_distance_from_the_pairs_own_noise(kind: Distance, exit: int, window: int) -> None:
    """And so is its gradient: written out on the pair's noise and sample, whatever the noise of the batch is."""
    student, other, batch = four_steps(), four_steps(), batch_at(0)
    loss = paired_loss(student, walk(TIMES, ode), batch, exit, window, kind)
    assert batch.pair is not None
    off = by_hand(other, batch.pair.noise, batch.draw, exit, window, ode) - batch.pair.x0
    size = {"l2": off**2, "l1": off.abs(), "huber": (off**2 + 1e-6).sqrt() - 1e-3}[kind].mean()
    assert loss.item() == pytest.approx(size.item(), rel=1e-5) and loss.item() > 0.3
    got = torch.autograd.grad(loss, [student.mean, student.std])
    want = torch.autograd.grad(size, [other.mean, other.std])
    assert all(torch.allclose(one, two, rtol=1e-4, atol=1e-6) for one, two in zip(got, want, strict=True))


@every_objective
@pytest.mark.parametrize("law", ["last", "random"])
def test_the_regression_follows_the_sample_to_its_exit(name: str, law: Any) -> None:
    """loss = gap + weight * distance at the step the sample left at; the log says the distance itself."""
    seen = set()
    for step in range(12):
        batch = batch_at(step)
        plain, paired = (objective_of(name, Exits(law, 2), regression=weight) for weight in (0.0, 0.25))
        exit = plain.sample(batch, step, False).index
        turn, alone = (play(objective, batch, step)["generator"] for objective in (paired, plain))
        assert batch.pair is not None
        made = by_hand(four_steps(), batch.pair.noise, batch.draw, exit, 2, ode)
        size = distance(made, batch.pair.x0, "l2").item()
        assert turn.logs["regression"] == pytest.approx(size, rel=1e-5)
        assert turn.loss - alone.loss == pytest.approx(0.25 * size, rel=1e-4)
        seen.add(exit)
    assert seen == ({3} if law == "last" else {0, 1, 2, 3})


def test_the_whole_rollout_of_one_step_is_that_step() -> None:
    """With a single step neither the law nor the window changes anything."""
    turns = []
    for exits in (Exits(), Exits("last", 3)):
        roles = gaussian_triad(Flow(), "flow_prediction")
        triad = Triad(Student(Flow(), [STUDENT]), roles.real_score, roles.fake_score)
        objective = dmd2.Objective(dmd2.Config(gan_weight=0, exits=exits), triad, walk((1.0,)))
        turns.append(play(objective, batch_at(0)))
    assert turns[0]["generator"].gradients == turns[1]["generator"].gradients
    assert turns[0]["fake_score"].loss == turns[1]["fake_score"].loss


@every_objective
def test_pairs_need_a_rollout_that_its_noise_decides(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.transition=ode"):
        objective_of(name, Exits(), renoise, regression=0.5)
    reads = objective_of(name, Exits(), ode, regression=0.5).reads, objective_of(name, Exits(), renoise).reads
    assert reads == (("pair",), ())


def test_contradictions_are_refused() -> None:
    with pytest.raises(UserError, match=r"exits\.window is at least 1 step, but 0 was given"):
        Exits(window=0)
    with pytest.raises(UserError, match="simulated inputs"):
        dmd2.Config(backward_simulation=False, exits=Exits("last"))
    assert dmd.Config().exits == dmd2.Config().exits == Exits("random", 1)

from __future__ import annotations

import copy

import pytest
import torch
from oracle import (
    STUDENT,
    TEACHER,
    Featured,
    Line,
    Renamed,
    Student,
    adam,
    exact_law,
    gaussian_triad,
    keep_critic_exact,
    law_of,
    learn,
    one_step,
    play,
    players_for,
    real_batch,
    walk,
)

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Guided
from fewstep.objectives import dmd2
from fewstep.objectives.base import Triad
from fewstep.objectives.flash_dmd import Config, Objective
from fewstep.train.loop import train_step
from fewstep.train.player import Pull

TIMES = (1.0, 0.75, 0.5, 0.25)


def flash(times: tuple[float, ...] = TIMES, critic: tuple[float, float] = (0.2, 0.9), **changes) -> Objective:
    torch.manual_seed(0)
    triad = Triad(
        Student(Flow(), [STUDENT] * len(times), times),
        Guided(Featured(*TEACHER, Flow(), "flow_prediction").requires_grad_(False)),
        Featured(*critic, Flow(), "flow_prediction"),
    )
    config = Config(**{"gan_weight": 0.5, "ratio": 1, "critic_average": 1.0, **changes})
    objective = Objective(config, triad, walk(times))
    objective.attach(torch.zeros(2, 32), Condition())
    return objective


def at_index(objective: Objective, index: int) -> tuple[int, Batch]:
    """A step whose rollout exits there, and its batch."""
    for step in range(500):
        batch = real_batch(step)
        if objective.sample(batch, step, False).index == index:
            return step, batch
    raise AssertionError("no step exits there")


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_noisy_inputs_get_the_gap_alone_and_cleaner_ones_the_gan_alone(index: int) -> None:
    """Levels 1 and .75 against .5 and .25: a critic without fault silences the first, a constant head the second."""
    objective = flash(split=0.5)
    step, batch = at_index(objective, index)
    whole = play(objective, batch, step)["generator"].gradients["generator.mean"]
    assert whole.nonzero().flatten().tolist() == [index]
    objective.triad.fake_score.load_state_dict(objective.triad.real_score.inner.state_dict())  # type: ignore[union-attr]
    without_gap = play(objective, batch, step)["generator"].gradients["generator.mean"]
    objective = flash(split=0.5)
    for parameter in objective.heads.parameters():  # type: ignore[union-attr]
        parameter.data.zero_()
    without_gan = play(objective, batch, step)["generator"].gradients["generator.mean"]
    high = index < 2
    assert torch.equal(without_gap[index], torch.tensor(0.0)) == high
    assert torch.equal(without_gan[index], torch.tensor(0.0)) != high


def test_split_at_zero_is_dmd2_without_a_gan() -> None:
    base = gaussian_triad(Flow(), "flow_prediction", critic=(0.2, 0.9))
    triad = Triad(Student(Flow(), [STUDENT] * 4, TIMES), base.real_score, base.fake_score)
    ours = Objective(Config(split=0.0, gan_weight=0.0, ratio=1, critic_average=1.0), triad, walk(TIMES))
    other = dmd2.Objective(dmd2.Config(gan_weight=0.0, ratio=1), triad, walk(TIMES))
    for step in range(4):
        one, two = (play(o, real_batch(step, draw=Renamed), step) for o in (ours, other))
        for player in ("generator", "fake_score"):
            assert one[player].gradients.keys() == two[player].gradients.keys()
            for name, gradient in two[player].gradients.items():
                assert torch.allclose(one[player].gradients[name], gradient, rtol=1e-5, atol=1e-8)
        assert two["generator"].gradients["generator.mean"].abs().max() > 1e-3


def test_split_at_one_is_the_gan_alone() -> None:
    """DMD2's own GAN term: its gradient less that of DMD2 with no weight on it."""
    ours = flash((1.0,), split=1.0)
    found = []
    for weight in (0.5, 1e-12):
        config = dmd2.Config(gan_weight=weight, ratio=1, gan_features="teacher")
        other = dmd2.Objective(config, ours.triad, ours.rollout)
        other.heads = ours.heads
        found.append(play(other, real_batch(draw=Renamed))["generator"])
    turn = play(ours, real_batch(draw=Renamed))["generator"]
    for name in ("generator.mean", "generator.std"):
        assert turn[name] == pytest.approx(found[0][name] - found[1][name], rel=1e-3, abs=1e-6)
        assert abs(turn[name]) > 1e-4


def test_a_step_makes_only_the_passes_of_its_own_loss() -> None:
    """The gap: a whole pass of each score, then the critic's own. The GAN: stopped ones of the teacher alone."""
    for split, teacher, critic in ((0.0, [False], [False, False]), (1.0, [True] * 3, [])):
        objective = flash((1.0,), split=split)
        for net in (objective.triad.real_score.inner, objective.triad.fake_score):
            net.stops.clear()
        play(objective, real_batch())
        assert objective.triad.real_score.inner.stops == teacher
        assert objective.triad.fake_score.stops == critic


def test_until_the_gan_starts_every_step_gets_the_gap() -> None:
    objective = flash((1.0,), split=1.0, gan_start=1)
    played = [play(objective, real_batch(s), s) for s in (0, 1)]
    assert [("gap" in turns["generator"].logs) for turns in played] == [True, False]
    for turns, touched in zip(played, ({"fake_score", "own"}, {"own"}), strict=True):
        assert turns["fake_score"].touched() == touched  # critic and discriminator learn what they judge


@pytest.mark.parametrize("decay", [1.0, 0.97, 0.0])
def test_the_critic_is_drawn_to_the_generator_once_after_its_move(decay: float) -> None:
    """By 3 % of the way, after the generator's move and before the critic's own; four micro-batches make it one."""
    torch.manual_seed(0)
    triad = Triad(
        Line(Flow(), "flow_prediction"),
        gaussian_triad(Flow(), "flow_prediction").real_score,
        Line(Flow(), "flow_prediction"),
    )
    config = Config(split=0.0, gan_weight=0.0, ratio=2, critic_average=decay)
    objective = Objective(config, triad, one_step())
    players = players_for(objective, adam(1e-2), adam(1e-12))
    for step, draws in ((0, decay < 1), (1, False)):
        before = copy.deepcopy(triad.fake_score)
        train_step(objective, [real_batch(step, ids) for ids in torch.arange(16).chunk(4)], step, players)
        for was, now, toward in zip(
            before.parameters(), triad.fake_score.parameters(), triad.generator.parameters(), strict=True
        ):
            expected = decay * was + (1 - decay) * toward if draws else was
            assert torch.allclose(now, expected, atol=1e-6)
    assert (triad.generator.layers[0].weight - triad.fake_score.layers[0].weight).abs().max() > 1e-2 or decay == 0  # type: ignore[union-attr]


def test_networks_of_two_shapes_cannot_be_drawn_together() -> None:
    with pytest.raises(UserError, match=r"set objective\.critic_average=1"):
        Pull(torch.nn.Linear(2, 2), torch.nn.Linear(2, 3), 0.9, "objective.critic_average")


@pytest.mark.parametrize(
    "wrong", [{"split": 1.5}, {"critic_average": -0.1}, {"gan_weight": 0.0}, {"regression": 0.5}, {"ratio": 0}]
)
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


@pytest.mark.slow
def test_learns_the_teacher_from_the_gap_with_an_exact_critic() -> None:
    """All steps above the split: N(1, .7^2) from (-.5, 1.3) within 2 %."""
    objective = Objective(
        Config(split=0.0, gan_weight=0.0, ratio=1, critic_average=1.0),
        gaussian_triad(Flow(), "flow_prediction"),
        one_step(),
    )
    keep_critic_exact(objective, fresh=True)
    learn(objective, players_for(objective, adam(2e-2, 700), adam(1e-9)), 700, size=64)
    assert law_of(objective) == pytest.approx(TEACHER, rel=0.02)


@pytest.mark.slow
def test_learns_the_teacher_from_the_gap_at_first_and_the_gan_after_it() -> None:
    """Two renoised steps; the critic is learned, and the second step is told by the discriminator alone.

    The first reaches N(1, .7^2) within 4 %, the second, on random features of a frozen teacher, within 20 %.
    """
    objective = flash((1.0, 0.5), critic=STUDENT, gan_weight=0.5, gan_critic_weight=1.0, ratio=2)
    players = players_for(objective, adam(1e-2, 1000), adam(2e-2))
    learn(objective, players, 2000, extra=lambda d: {"x0": TEACHER[0] + TEACHER[1] * d.normal("real", (32,))}, size=64)
    student = objective.triad.generator
    laws = [exact_law(student, objective.rollout, index, 0.0, fresh=True) for index in (0, 1)]  # type: ignore[arg-type]
    assert laws[0] == pytest.approx(TEACHER, rel=0.04)
    assert laws[1] == pytest.approx(TEACHER, rel=0.2)

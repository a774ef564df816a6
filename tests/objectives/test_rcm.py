from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from flow_maps import data
from oracle import STUDENT, TEACHER, gaussian_triad, one_step, play, real_batch

from fewstep.core.batch import Batch, Condition
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.core.times import Grid
from fewstep.objectives import consistency, dmd2, scm
from fewstep.objectives.base import Objective as Base
from fewstep.objectives.base import Triad
from fewstep.objectives.rcm import Config, Objective


class Straight(torch.nn.Module):
    """Marker for nothing: the student of the oracle answers at one time alone, so sCM needs a network of all times."""


def triad() -> Triad:
    """A learnable Gaussian as generator, its frozen teacher, and a critic that holds another law."""
    from fewstep.models.gaussian import GaussianModel

    given = gaussian_triad(Flow(), "flow_prediction", critic=(0.1, 1.1))
    return Triad(GaussianModel(*STUDENT, Flow(), "flow_prediction", learned=True), given.real_score, given.fake_score)


def of(networks: Triad, **changes: Any) -> Objective:
    matching = changes.pop("matching", dmd2.Config(gan_weight=0.0, ratio=1))
    config = Config(**{"warmup": 0, "consistency": 1.0, "matching": matching, **changes})
    found = Objective(config, networks, one_step())
    found.attach(torch.zeros(2, 32), Condition())
    return found


def same(one: Base, other: Base, batch: Batch, players: tuple[str, ...], step: int = 0) -> None:
    first, second = play(one, batch, step), play(other, batch, step)
    assert set(first) == set(second) == set(players)
    for player in players:
        assert first[player].loss == pytest.approx(second[player].loss, rel=1e-6)
        for name, gradient in second[player].gradients.items():
            assert torch.allclose(first[player].gradients[name], gradient, rtol=1e-5, atol=1e-8), name


def test_without_the_gap_it_is_continuous_consistency() -> None:
    """Whatever the cadence of the gap would be; and it asks for no critic."""
    config: dict[str, Any] = {"warmup": 4, "weight": "inverse_tan"}
    ours = of(triad(), gap=0.0, matching=dmd2.Config(gan_weight=0.0, ratio=5), **config)
    times = ours.config.times
    plain = scm.Objective(scm.Config(adaptive=False, times=times, **config), copy.deepcopy(ours.triad), one_step())
    plain.attach(torch.zeros(2, 32), Condition())
    for step in (0, 1, 3, 9):
        same(ours, plain, real_batch(step), ("generator",), step)
    assert Objective.needs(Config(gap=0.0)) == ("generator", "real_score")
    assert Objective.needs(Config(gap=0.0, mode="training")) == ("generator",)


def test_without_consistency_it_is_dmd2() -> None:
    ours = of(triad(), consistency=0.0, warmup=100)
    plain = dmd2.Objective(dmd2.Config(gan_weight=0.0, ratio=1), copy.deepcopy(ours.triad), one_step())
    same(ours, plain, real_batch(3), ("generator", "fake_score"))
    assert ours.reads == () and Objective.needs(Config()) == ("generator", "real_score", "fake_score")


def test_on_a_grid_it_is_discrete_consistency() -> None:
    discrete = consistency.Config(target="self", distance="l2", grid=Grid(48, shift=5.0))
    ours = of(triad(), gap=0.0, discrete=discrete)
    plain = consistency.Objective(discrete, copy.deepcopy(ours.triad), one_step())
    same(ours, plain, real_batch(1), ("generator",))


def test_the_loss_is_the_sum_of_both() -> None:
    networks = triad()
    batch = real_batch(2)
    whole = play(of(networks, consistency=0.3, gap=0.7), batch)["generator"]
    kept = play(of(networks, gap=0.0), batch)["generator"]
    gap = play(of(networks, consistency=0.0), batch)["generator"]
    assert whole.loss == pytest.approx(0.3 * kept.loss + 0.7 * gap.loss, rel=1e-5)
    for name in ("generator.mean", "generator.log_std"):
        assert whole[name] == pytest.approx(0.3 * kept[name] + 0.7 * gap[name], rel=1e-4)


def test_the_gap_waits_for_the_tangent() -> None:
    networks = triad()
    waiting, alone = of(networks, warmup=10), of(networks, warmup=10, gap=0.0)
    assert play(waiting, real_batch(), 9)["generator"].loss == play(alone, real_batch(), 9)["generator"].loss
    assert play(waiting, real_batch(), 10)["generator"].loss != play(alone, real_batch(), 10)["generator"].loss


def test_a_critic_that_is_the_teacher_leaves_no_gap() -> None:
    networks = triad()
    given = gaussian_triad(Flow(), "flow_prediction", critic=TEACHER)
    turn = play(of(Triad(networks.generator, networks.real_score, given.fake_score), consistency=0.0), real_batch())
    assert abs(turn["generator"]["generator.mean"]) < 1e-6


def test_turns_follow_the_cadence_of_the_gap() -> None:
    objective = of(triad(), matching=dmd2.Config(gan_weight=0.0, ratio=3, critic_on_generator_step=False))
    played = [set(play(objective, real_batch(step), step)) for step in range(4)]
    assert played == [{"generator"}, {"fake_score"}, {"fake_score"}, {"generator"}]


def test_contradictions_are_refused() -> None:
    for wrong in ({"gap": 0.0, "consistency": 0.0}, {"gap": -1.0}, {"matching": dmd2.Config(regression=1.0)}):
        with pytest.raises(UserError):
            Config(**wrong)  # type: ignore[arg-type]
    assert data(2).noise.shape == (2, 3)

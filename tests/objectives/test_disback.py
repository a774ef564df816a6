from __future__ import annotations

import copy
import itertools

import pytest
import torch
from oracle import (
    STUDENT,
    TEACHER,
    Featured,
    Student,
    adam,
    gaussian_triad,
    law_of,
    learn,
    one_step,
    play,
    players_for,
    real_batch,
)

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Guided
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.gaussian import GaussianModel
from fewstep.models.lora import LoraSpec
from fewstep.models.voices import Shared
from fewstep.objectives import dmd2
from fewstep.objectives.base import Triad
from fewstep.objectives.disback import Config, Objective
from fewstep.rollout import Rollout, Step
from fewstep.train.loop import train_step
from fewstep.train.player import PlayerConfig

PLAIN = {"gan_weight": 0.0, "ratio": 1}


def recording(**changes) -> Objective:
    """A critic that starts as the teacher does, and a student far from it."""
    triad = gaussian_triad(Flow(), "flow_prediction", critic=TEACHER)
    return Objective(Config(**{**PLAIN, "snapshots": 3, "record": 40, "interval": 5, **changes}), triad, one_step())  # type: ignore[arg-type]


def laws(objective: Objective) -> list[tuple[float, float]]:
    return [(s.mean.item(), s.log_std.exp().item()) for s in objective.snapshots]  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("changes", [PLAIN, {"gan_weight": 0.5, "ratio": 2, "critic_on_generator_step": False}])
def test_without_snapshots_it_is_dmd2(changes: dict) -> None:
    def made(kind: type, config: object) -> dmd2.Objective:
        torch.manual_seed(3)
        teacher = Guided(GaussianModel(*TEACHER, Flow(), "flow_prediction"))
        critic = Featured(*STUDENT, Flow(), "flow_prediction")
        objective = kind(config, Triad(Student(Flow(), [STUDENT]), teacher, critic), one_step())
        objective.attach(torch.zeros(2, 32), Condition())
        return objective

    one, base = made(Objective, Config(snapshots=0, **changes)), made(dmd2.Objective, dmd2.Config(**changes))
    for step in range(4):
        ours, theirs = (play(objective, real_batch(step), step) for objective in (one, base))
        assert ours.keys() == theirs.keys()
        for player, turn in ours.items():
            assert turn.loss == pytest.approx(theirs[player].loss, rel=1e-6)
            assert turn.gradients.keys() == theirs[player].gradients.keys()
            for name, gradient in turn.gradients.items():
                assert torch.allclose(gradient, theirs[player].gradients[name], rtol=1e-5, atol=1e-9)


def test_the_generator_rests_while_the_critic_is_recorded() -> None:
    objective = recording(record=8, ratio=3)
    moved = [tuple(play(objective, real_batch(step), step)) for step in range(16)]
    assert moved[:8] == [("fake_score",)] * 8
    assert moved[8:] == [("generator", "fake_score") if i % 3 == 0 else ("fake_score",) for i in range(8)]


def test_snapshots_lie_in_order_between_the_teacher_and_the_student() -> None:
    """Mean and deviation go from (1, .7) towards (-.5, 1.3), each a step further, and the critic the furthest."""
    objective = recording()
    players = players_for(objective, adam(1e-2), adam(2e-2))
    learn(objective, players, 40, size=64)
    critic = objective.triad.fake_score
    path = [TEACHER, *laws(objective), (critic.mean.item(), critic.log_std.exp().item())]  # type: ignore[union-attr, operator]
    means, stds = zip(*path, strict=True)
    assert all(a > b + 0.05 for a, b in itertools.pairwise(means)) and means[-1] > STUDENT[0]
    assert all(a + 0.02 < b for a, b in itertools.pairwise(stds)) and stds[-1] < STUDENT[1]
    assert players["generator"].moves == 0 and [objective.moment(k) for k in (1, 2, 3)] == [10, 20, 30]


def test_the_real_score_walks_back_to_the_teacher() -> None:
    """Snapshots 3, 2, 1, each for five steps, then the teacher; what it says changes at every switch."""
    objective = recording()
    learn(objective, players_for(objective, adam(1e-2), adam(2e-2)), 40, size=64)
    assert [objective.target(step) for step in range(40, 62)] == [3] * 5 + [2] * 5 + [1] * 5 + [0] * 7
    x, t, said = torch.randn(4, 32), torch.full((4,), 0.5), []
    for step in (40, 45, 50, 55):
        turn = play(objective, real_batch(step), step)["generator"]
        assert turn.logs["target"] == objective.target(step) and turn.touched() == {"generator"}
        said.append(objective.real(x, t, Condition()).x0)
    assert all((a - b).abs().mean() > 1e-2 for a, b in itertools.pairwise(said))
    assert torch.equal(said[-1], objective.triad.real_score(x, t, Condition()).x0)
    assert all(not p.requires_grad for p in objective.snapshots.parameters())


def test_the_first_target_is_where_the_critic_starts() -> None:
    """Recorded to the last step, critic and target agree, and there is nothing to learn yet."""
    objective = recording(snapshots=1, record=1)
    learn(objective, players_for(objective, adam(1e-2), adam(2e-2)), 1, size=64)
    turn = play(objective, real_batch(1), 1)["generator"]
    assert objective.target(1) == 1 and turn.logs["gap"] == 0 and turn.loss == 0


def test_the_parts_of_a_batch_take_one_snapshot() -> None:
    """Each micro-batch asks for it before the critic moves, so all of them take the same."""
    ends = []
    for parts in (1, 4):
        objective = recording(record=4)
        players = players_for(objective, adam(1e-2), adam(2e-2))
        for step in range(5):
            ids = torch.arange(step * 16, (step + 1) * 16)
            train_step(objective, [real_batch(step, part) for part in ids.chunk(parts)], step, players)
        ends.append(laws(objective))
    assert ends[1] == [pytest.approx(law, rel=1e-5) for law in ends[0]] and len(set(ends[0])) == 3


def test_snapshots_are_saved_with_the_run_and_fit_exactly() -> None:
    objective, again = recording(), recording()
    learn(objective, players_for(objective, adam(1e-2), adam(2e-2)), 40, size=64)
    again.load_state_dict(copy.deepcopy(objective.state_dict()))
    assert laws(again) == laws(objective) != laws(recording())
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({})


def test_snapshots_of_an_adapter_are_adapters(tiny_unet) -> None:
    """They cost no network of their own, each says what the critic said, and the teacher below stays."""
    shared = Shared(DiffusersBackbone(tiny_unet(3), Flow(), "flow_prediction", 4), {"critic": LoraSpec(2, 2.0, ["*"])})
    generator = DiffusersBackbone(tiny_unet(4), Flow(), "flow_prediction", 4)
    triad = Triad(generator, Guided(shared.as_(None)), shared.as_("critic"))
    config = Config(**{**PLAIN, "snapshots": 1, "record": 2, "interval": 9})  # type: ignore[arg-type]
    objective = Objective(config, triad, Rollout([Step(1.0, 1.0)]))
    players = players_for(objective, PlayerConfig(lr=1e-2), PlayerConfig(lr=1e-2))
    noise, cond = torch.randn(4, 3, 8, 8), Condition({"class_labels": torch.arange(4)})
    teacher = triad.real_score(noise, torch.full((4,), 0.5), cond).value
    said = []
    for step in range(3):
        said.append(triad.fake_score(noise, torch.full((4,), 0.5), cond).value)
        train_step(objective, [Batch(noise, cond, Draw(0, step, torch.arange(4)))], step, players)
    snapshot = objective.snapshots[0](noise, torch.full((4,), 0.5), cond).value
    assert torch.allclose(snapshot, said[1], atol=1e-5) and (snapshot - said[2]).abs().max() > 1e-3
    assert sum(p.numel() for p in objective.parameters()) == sum(p.numel() for p in triad.fake_score.parameters())
    assert torch.equal(triad.real_score(noise, torch.full((4,), 0.5), cond).value, teacher)


@pytest.mark.parametrize("wrong", [{"snapshots": -1}, {"interval": 0}, {"snapshots": 5, "record": 4}, {"ratio": 0}])
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


@pytest.mark.slow
def test_learns_the_teacher_on_the_way_back() -> None:
    """Five critic moves at 2e-2 for each of 800 generator moves at 1e-2, cosine; three targets before: within 4 %."""
    objective = recording(ratio=5, record=100, interval=300)
    learn(objective, players_for(objective, adam(1e-2, 800), adam(2e-2)), 4100)
    assert objective.degraded == 0 and law_of(objective) == pytest.approx(TEACHER, rel=0.04)

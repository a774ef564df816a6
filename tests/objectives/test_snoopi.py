from __future__ import annotations

import pytest
import torch
from oracle import STUDENT, TEACHER, Student, at, gaussian_triad, one_step, play
from test_swiftbrush import Told, labelled

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Guided
from fewstep.objectives import swiftbrush
from fewstep.objectives.base import Triad
from fewstep.objectives.snoopi import Config, Objective


def triad(guidance: float = 1.0) -> Triad:
    """Student, teacher and critic that hear labels, critic and teacher being of different laws."""
    torch.manual_seed(3)
    teacher = Told(*TEACHER, Flow(), "sample").requires_grad_(False)
    return Triad(Student(Flow(), [STUDENT]), Guided(teacher, guidance), Told(*STUDENT, Flow(), "sample", learned=True))


def batch(step: int) -> Batch:
    draw = Draw(0, step, torch.arange(16))
    return Batch(draw.normal("noise", (32,)), Condition({"class_labels": torch.arange(16) % 2}), draw)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_with_one_guidance_it_is_swiftbrush(scale: float) -> None:
    """Whatever model.guidance says; losses and gradients of both players with the same draws."""
    networks = triad(1.7)
    drawn = Objective(Config(guidance_low=scale, guidance_high=scale), networks, one_step())
    same = Triad(networks.generator, Guided(networks.real_score.inner, scale), networks.fake_score)
    fixed = swiftbrush.Objective(swiftbrush.Config(), same, one_step())
    for step in range(3):
        one, other = (play(objective, batch(step), step) for objective in (drawn, fixed))
        for player in ("generator", "fake_score"):
            assert one[player].loss == pytest.approx(other[player].loss, rel=1e-6)
            assert one[player].gradients.keys() == other[player].gradients.keys()
            for name, gradient in one[player].gradients.items():
                assert torch.allclose(gradient, other[player].gradients[name], rtol=1e-5)
        assert abs(one["generator"]["generator.mean"]) > 1e-3


def test_kappa_is_uniform_and_one_for_all_parts_of_a_step() -> None:
    objective = Objective(Config(guidance_low=0.5, guidance_high=4.0), triad(), one_step())
    drawn = torch.tensor([objective.kappa(batch(step)) for step in range(2000)])
    assert 0.5 <= drawn.min() < 0.51 and 3.99 < drawn.max() <= 4.0
    assert drawn.mean().item() == pytest.approx(2.25, abs=4 * 3.5 / 12**0.5 / 2000**0.5)
    for step in range(3):
        parts = {objective.kappa(Batch(batch(0).noise, Condition(), Draw(0, step, torch.arange(i)))) for i in (4, 9)}
        assert parts == {objective.kappa(batch(step))}


def test_both_scores_are_guided_by_it() -> None:
    """A critic that hears labels as the teacher does leaves the gap of the unguided scores at any kappa."""
    gaps = []
    for scale in (1.0, 4.0):
        networks = triad()
        networks.fake_score.load_state_dict(networks.real_score.inner.state_dict())  # type: ignore[union-attr]
        with torch.no_grad():
            networks.fake_score.mean += 0.3  # type: ignore[operator]
        config = Config(guidance_low=scale, guidance_high=scale, times=at(0.4), critic_times=at(0.4))
        gaps.append(play(Objective(config, networks, one_step()), labelled(1))["generator"]["generator.mean"])
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-5) and abs(gaps[0]) > 1e-2


@pytest.mark.parametrize(
    "wrong",
    [{"ratio": 0}, {"guidance_low": 3.0, "guidance_high": 2.0}, {"guidance_low": -1.0}, {"label_dropout": 0.0}],
)
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


def test_networks_that_are_told_nothing_are_refused_before_training() -> None:
    objective = Objective(Config(), gaussian_triad(Flow(), "flow_prediction"), one_step())
    with pytest.raises(UserError, match="told nothing"):
        objective.attach(torch.zeros(2, 32), Condition())

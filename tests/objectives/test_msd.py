from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import STUDENT, TEACHER, Featured, Student, gaussian_triad, one_step, play
from torch import Tensor

from fewstep import build, cli, config, sampling
from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.schedule import Flow
from fewstep.models.backbone import Guided
from fewstep.models.bank import Bank
from fewstep.objectives import dmd2
from fewstep.objectives.base import Triad
from fewstep.objectives.msd import Config, Objective
from fewstep.train import checkpoint

GAN = {"gan_weight": 0.5, "gan_critic_weight": 0.5, "ratio": 2}


def triad() -> Triad:
    torch.manual_seed(4)
    teacher = Guided(Featured(*TEACHER, Flow(), "flow_prediction").requires_grad_(False))
    return Triad(Student(Flow(), [STUDENT]), teacher, Featured(0.1, 0.8, Flow(), "flow_prediction"))


def made(kind: type, settings: object) -> dmd2.Objective:
    objective = kind(settings, triad(), one_step())
    torch.manual_seed(5)
    objective.attach(torch.zeros(2, 32), Condition({"class_labels": torch.zeros(2, dtype=torch.int64)}))
    return objective


def batch(labels: Tensor, step: int = 0) -> Batch:
    draw, cond = Draw(0, step, torch.arange(len(labels))), Condition({"class_labels": labels})
    pair = Pair(draw.normal("stored", (32,)), draw.normal("made", (32,)), cond)
    return Batch(draw.normal("noise", (32,)), cond, draw, draw.normal("real", (32,)), pair)


@pytest.mark.parametrize("changes", [GAN, {"gan_weight": 0.0, "regression": 0.5}])
def test_one_part_is_dmd2(changes: dict) -> None:
    labels = torch.arange(12)
    one, base = made(Objective, Config(parts=1, **changes)), made(dmd2.Objective, dmd2.Config(**changes))
    for step in range(3):
        ours, theirs = (play(objective, batch(labels, step), step) for objective in (one, base))
        assert ours.keys() == theirs.keys()
        for player, turn in ours.items():
            assert turn.loss == pytest.approx(theirs[player].loss, rel=1e-6)
            assert turn.gradients.keys() == theirs[player].gradients.keys()
            for name, gradient in turn.gradients.items():
                assert torch.allclose(gradient, theirs[player].gradients[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("changes", [GAN, {"gan_weight": 0.0}])
def test_a_student_has_no_gradient_from_the_labels_of_others(changes: dict) -> None:
    """Neither from the score gap nor from the GAN; each label reaches exactly one of the four students."""
    for label in (0, 2, 3, 8, 11):
        labels, moved = torch.full((8,), label), []
        for part in range(1, 5):
            turn = play(made(Objective, Config(parts=4, part=part, **changes)), batch(labels))["generator"]
            moved.append(turn["generator.mean"] != 0 or turn["generator.std"] != 0)
        assert moved == [label // 3 == part for part in range(4)]


def test_the_students_gradients_add_up_to_that_of_one() -> None:
    """A part's samples count K times, so the mean over the parts is DMD2's gradient on the same batch."""
    labels = torch.arange(24) % 12
    whole = play(made(dmd2.Objective, dmd2.Config(**GAN)), batch(labels))["generator"]  # type: ignore[arg-type]
    for name in ("mean", "std"):
        parts = [
            play(made(Objective, Config(parts=3, part=part, **GAN)), batch(labels))["generator"][f"generator.{name}"]
            for part in (1, 2, 3)
        ]
        assert sum(parts) / 3 == pytest.approx(whole[f"generator.{name}"], rel=1e-4)
        assert max(parts) - min(parts) > 1e-3


def test_the_regression_keeps_all_pairs() -> None:
    labels = torch.full((8,), 11)
    turns = [
        play(made(Objective, Config(parts=4, part=1, gan_weight=0, regression=r)), batch(labels))["generator"]
        for r in (0.0, 0.5)
    ]
    assert turns[0]["generator.mean"] == 0 and abs(turns[1]["generator.mean"]) > 1e-2


@pytest.mark.parametrize("wrong", [{"parts": 0}, {"parts": 13}, {"part": 0}, {"part": 5}, {"ratio": 0}])
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        Config(**wrong)


def test_conditions_without_labels_are_refused_before_training() -> None:
    objective = Objective(Config(gan_weight=0), gaussian_triad(Flow(), "flow_prediction"), one_step())
    with pytest.raises(UserError, match="told none"):
        objective.attach(torch.zeros(2, 32), Condition())


CONFIG = """
name: part
device: cpu
batch: 4
model: {{teacher: {teacher}}}
objective: {{name: msd, gan_weight: 0.0, parts: 2, part: {part}}}
players: {{generator: {{lr: 1.0e-3}}, fake_score: {{lr: 1.0e-3}}}}
"""


@pytest.fixture
def run_of(tmp_path: Path, tiny_teacher: Path) -> Callable[[int], Path]:
    """Makes the run folder of a part, its student the teacher with other weights in the last layer."""

    def make(part: int) -> Path:
        place = tmp_path / f"part_{part}"
        place.mkdir()
        (place / "config.yaml").write_text(CONFIG.format(teacher=tiny_teacher, part=part))
        (one,) = config.load(place / "config.yaml")
        (place / "config.yaml").write_text(config.to_yaml(one))
        run = build.build(one)
        torch.nn.init.constant_(run.triad.generator.net.conv_out.bias, float(part))  # type: ignore[union-attr]
        checkpoint.save(place / "checkpoints", 1, run.players, run.objective)
        return place

    return make


def test_a_bank_samples_each_label_from_its_student(run_of, tmp_path: Path) -> None:
    runs = [run_of(2), run_of(1)]
    sampler = sampling.open_bank(runs)
    assert isinstance(sampler.net, Bank)
    alone = [sampling.open_folder(run) for run in (runs[1], runs[0])]
    images = sampler.draw([0, 5, 6, 11], 4, seed=3)
    for i, label in enumerate((0, 5, 6, 11)):
        own = alone[label // 6].draw([0, 5, 6, 11], 4, seed=3)
        assert torch.allclose(images[i], own[i], atol=1e-5)
    out = tmp_path / "x.png"
    assert cli.main(["sample", str(runs[0]), "--bank", str(runs[1]), "--count", "12", f"--out={out}"]) == 0


def test_a_bank_needs_the_runs_of_all_parts(run_of) -> None:
    run = run_of(1)
    with pytest.raises(UserError, match="part 1 of 2 of 12 labels, part 1 of 2 of 12 labels was given"):
        sampling.open_bank([run, run])
    with pytest.raises(UserError, match="the run of each part"):
        sampling.open_bank([run, run_of(2), run])

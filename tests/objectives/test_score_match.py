from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from oracle import (
    CASE_NAMES,
    CASES,
    STUDENT,
    TEACHER,
    Line,
    Student,
    adam,
    at,
    learn,
    one_step,
    play,
    players_for,
    told_batch,
    whitened,
)

from fewstep import build, cli, config
from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.core.prediction import Kind
from fewstep.core.schedule import Flow, NoiseSchedule
from fewstep.models.backbone import Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Triad
from fewstep.objectives.score_match import Config, Objective


@pytest.mark.parametrize("schedule, kind, t", CASES, ids=CASE_NAMES)
def test_the_loss_is_the_distance_of_two_exact_networks(schedule: NoiseSchedule, kind: Kind, t: float) -> None:
    """E |R - F|^2 in what the network predicts, on data N(.4, .9^2): the x0 distance, scaled."""
    noise, eps = whitened(2)
    student = GaussianModel(*STUDENT, schedule, kind, learned=True)
    objective = Objective(
        Config(times=at(t)), Triad(student, Guided(GaussianModel(*TEACHER, schedule, kind))), one_step()
    )
    played = play(objective, told_batch(noise, eps, x0=0.4 + 0.9 * noise))["generator"]
    alpha, sigma, _, _ = (v.item() for v in schedule.coefficients(torch.tensor([t], dtype=torch.float64)))
    slopes = [alpha * s**2 / (alpha**2 * s**2 + sigma**2) for _, s in (STUDENT, TEACHER)]
    shifts = [m * (1 - alpha * k) for (m, _), k in zip((STUDENT, TEACHER), slopes, strict=True)]
    mean = shifts[0] - shifts[1] + (slopes[0] - slopes[1]) * alpha * 0.4
    apart = mean**2 + (slopes[0] - slopes[1]) ** 2 * (alpha**2 * 0.81 + sigma**2)
    size = {"epsilon": alpha / sigma, "sample": 1.0, "v_prediction": 1 / sigma, "flow_prediction": 1 / sigma}[kind]
    assert played.loss == pytest.approx(size**2 * apart, rel=1e-5)
    assert played.touched() == {"generator"}


def test_the_teachers_guidance_goes_over() -> None:
    """Against a null condition that says the same, guidance changes nothing; the loss is zero at the teacher."""
    noise, eps = whitened(2)
    for scale in (1.0, 3.0):
        teacher = GaussianModel(*TEACHER, Flow(), "flow_prediction")
        student = GaussianModel(*TEACHER, Flow(), "flow_prediction", learned=True)
        objective = Objective(Config(), Triad(student, Guided(teacher, scale)), one_step())
        assert play(objective, told_batch(noise, eps, x0=noise))["generator"].loss == pytest.approx(0, abs=1e-10)


@pytest.mark.slow
def test_a_small_network_reaches_the_teachers_affine_map() -> None:
    """value = c(t) + d(t) x from a network of t: within 2 % of the teacher's at ten times, 3000 moves."""
    torch.manual_seed(1)
    teacher, student = GaussianModel(*TEACHER, Flow(), "flow_prediction"), Line(Flow(), "flow_prediction")
    objective = Objective(Config(), Triad(student, Guided(teacher)), one_step())
    players = players_for(objective, adam(5e-3, 3000))
    learn(objective, players, 3000, extra=lambda draw: {"x0": TEACHER[0] + TEACHER[1] * draw.normal("real", (32,))})
    x, t = torch.randn(10, 32), torch.linspace(0.05, 0.95, 10)
    with torch.no_grad():
        taught, said = (net(x, t, Condition()).value for net in (teacher, student))
    assert (said - taught).square().mean().sqrt() < 0.02 * taught.square().mean().sqrt()


def test_a_student_that_is_no_exact_network_has_a_gradient() -> None:
    noise, eps = whitened(2)
    triad = Triad(Student(Flow(), [STUDENT]), Guided(GaussianModel(*TEACHER, Flow(), "flow_prediction")))
    played = play(Objective(Config(times=at(0.4)), triad, one_step()), told_batch(noise, eps, x0=noise))["generator"]
    assert played.touched() == {"generator"} and abs(played["generator.mean"]) > 1e-2


STAGES = """
name: small
device: cpu
steps: 2
batch: 4
model:
  teacher: {teacher}
  student: {student}
objective: {{name: score_match}}
players: {{generator: {{lr: 1.0e-3}}}}
evals: {{every: 0, samples: 0}}
stages:
  - {{objective: {{name: score_match}}}}
  - objective: {{name: msd, gan_weight: 0.0, parts: 2}}
    players: {{fake_score: {{lr: 1.0e-3}}}}
    start: {{generator: previous.generator}}
"""


@pytest.fixture
def small(tiny_sizes: dict, tiny_teacher: Path, tmp_path: Path) -> Path:
    student = {"class": "UNet2DModel", **tiny_sizes, "block_out_channels": [4, 4, 8]}
    (tmp_path / "small.yaml").write_text(STAGES.format(teacher=tiny_teacher, student=student))
    return tmp_path / "small.yaml"


def test_a_smaller_student_learns_the_score_then_its_part(small: Path, tmp_path: Path) -> None:
    """Two stages from a config to the export, whose network is the small one; teacher and critic keep their size."""
    assert cli.main(["train", str(small), f"--out={tmp_path / 'runs'}"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    exported = diffusers.UNet2DModel.from_pretrained(folder / "export" / "unet")
    assert exported.config.block_out_channels == [4, 4, 8]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("model.student.num_class_embeds=5", "num_class_embeds is that of the teacher, 13, but 5"),
        ("model.student.class=DiTTransformer2DModel", "model.student"),
        ("players.generator.lora={}", "remove players.generator.lora"),
        ("start.generator=teacher", "let start.generator name"),
    ],
)
def test_a_student_that_cannot_stand_in_is_refused(wrong: str, said: str, small: Path) -> None:
    with pytest.raises(UserError, match=said):
        build.build(config.load(small, [wrong])[0])

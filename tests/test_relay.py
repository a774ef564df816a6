"""Diversity distillation: the built-in teacher begins, another network ends, and the latent fits in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewstep import build, cli, config, measure, sampling
from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.schedule import EDM, NoiseSchedule, vp_from_betas
from fewstep.core.times import Step
from fewstep.export import export
from fewstep.models.backbone import Guided
from fewstep.models.gaussian import GaussianModel
from fewstep.relay import Relay
from fewstep.rollout import Rollout, ode
from fewstep.train import checkpoint

CONFIG = """
name: relay
device: cpu
batch: 4
model: {teacher: assets/teachers/scenes-vp, guidance: 2.0, steps: 4, transition: ode}
data: {source: scenes, resolution: 16}
objective: {name: diffusion}
players: {generator: {lr: 1.0e-3}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of four steps: the built-in teacher with other weights."""
    place = tmp_path_factory.mktemp("runs") / "relay"
    place.mkdir()
    (place / "config.yaml").write_text(CONFIG)
    (one,) = config.load(place / "config.yaml", [])
    (place / "config.yaml").write_text(config.to_yaml(one))
    made = build.build(one)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in made.triad.generator.parameters():
            weight += 0.1 * weight.std() * torch.randn_like(weight) if weight.numel() > 1 else 0.0
    checkpoint.save(place / "checkpoints", 3, made.players, made.objective)
    export(made, place / "export")
    return place


def drawn(run: Path, first: int | None) -> torch.Tensor:
    return sampling.open_folder(run, base_first=first).draw([3, 7], 4, 5)


@pytest.mark.slow
def test_zero_is_the_student_and_all_is_the_teacher(run: Path) -> None:
    student, none = drawn(run, None), drawn(run, 0)
    loaded = sampling.load_run(run)
    net, walk = measure.teacher(loaded, measure.TEACHER_STEPS)
    asked = lambda rows: Condition({"class_labels": torch.tensor([3, 7, 3, 7])[rows]})
    teacher = measure.generate(net, walk, asked, 4, (3, 16, 16), 5)
    assert torch.equal(none, student)
    assert torch.equal(drawn(run, 4), teacher)
    assert (student - teacher).abs().mean() > 0.02
    between = drawn(run, 2)
    assert min((between - student).abs().mean(), (between - teacher).abs().mean()) > 0.005


def test_the_latent_arrives_at_the_students_level(run: Path) -> None:
    """Of the 50 steps the relay takes those above the student's; every step of a guided teacher is two passes."""
    loaded = sampling.load_run(run)
    _, own = measure.student(loaded)
    _, walk = measure.teacher(loaded, measure.TEACHER_STEPS)
    told: list[float] = []

    class Student(GaussianModel):
        def forward(self, x_t, t, cond, **more):
            told.append(float(t[0]))
            return super().forward(x_t, t, cond, **more)

    student = Student(0.0, 1.0, loaded.teacher.schedule, loaded.teacher.kind)
    for first in (1, 2, 3):
        relay = measure.relay(loaded, own, first)
        assert relay.handover == own.steps[first].level
        left = walk.level_after(relay.base_steps - 1)
        gaps = [abs(step.level - relay.handover) for step in walk.steps]
        assert abs(left - relay.handover) == min(gaps) < 1 / measure.TEACHER_STEPS
        assert len(relay) == relay.base_steps + 4 - first
        assert relay.passes(student) == 2 * relay.base_steps + 4 - first
        told.clear()
        draw = Draw(0, 0, torch.arange(2))
        relay(student, draw.normal("noise", (3, 16, 16)), Condition({"class_labels": torch.tensor([1, 2])}), draw)
        assert told == pytest.approx([step.told for step in own.steps[first:]])


@pytest.mark.parametrize("schedule", [vp_from_betas("scaled_linear", 0.00085, 0.012), EDM()], ids=["vp", "edm"])
def test_a_relay_of_one_network_is_a_rollout_of_both_walks(schedule: NoiseSchedule) -> None:
    """Where base and student are one network, the relay is its ODE on the levels of both, to rounding."""
    exact = GaussianModel(0.3, 0.5, schedule, "epsilon")
    steps = [Step(level, level) for level in (1 - torch.arange(50) / 50).tolist()]
    walk, own = Rollout(steps, ode), Rollout([steps[0], Step(0.703, 0.703), steps[25], Step(0.207, 0.207)], ode)
    draw = Draw(0, 0, torch.arange(8))
    noise = draw.normal("noise", (16,))
    for first, taken in enumerate((0, 15, 25, 40, 50)):
        relay = Relay(Guided(exact, 1.0), walk, own, first)
        joined = Rollout([*steps[:taken], *own.steps[first:]], ode)
        assert (relay.base_steps, len(relay)) == (taken, len(joined))
        relayed, together = (way(exact, noise, Condition(), draw).x0 for way in (relay, joined))
        assert torch.allclose(relayed, together, rtol=1e-5, atol=1e-5) and together.std() > 0.01


def test_refusals(run: Path, tmp_path: Path) -> None:
    for first in (-1, 5):
        with pytest.raises(UserError, match=f"--base-first is from 0 to the 4 steps of the student, but {first}"):
            drawn(run, first)
    with pytest.raises(UserError, match="pipeline folder, with no teacher beside it"):
        drawn(run / "export", 1)
    loaded = sampling.load_run(run)
    loaded.config.model.teacher = None
    with pytest.raises(UserError, match="trained without one: leave it out"):
        measure.relay(loaded, loaded.rollout, 1)


@pytest.mark.slow
def test_eval_says_what_it_measured(run: Path, tmp_path: Path) -> None:
    given = ["eval", str(run), "--samples=50", "--metrics=frechet", f"--out={tmp_path}", "--base-first=2"]
    assert cli.main(given) == 0
    row = json.loads((tmp_path / "eval.jsonl").read_text())
    relay = measure.relay(sampling.load_run(run), sampling.load_run(run).rollout, 2)
    assert row["passes"] == 2 * relay.base_steps + 2
    assert '"base_first": 2' in json.dumps(row["protocols"])

"""The doctor: each illness named by synthetic logs and by runs that were made ill on purpose, none in healthy ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import cli
from fewstep.core.batch import Batch, Condition, Pair
from fewstep.core.draw import Draw
from fewstep.health import signs
from fewstep.health.alarms import Alarms
from fewstep.health.illnesses import examine
from fewstep.health.record import Stage, read
from fewstep.objectives.base import label_share, sample_logs

Row = dict[str, Any]
CONFIG = """
name: synthetic
steps: 100
model: {teacher: assets/teachers/scenes-flow, guidance: 1.0, steps: 1, shift: null, transition: ode}
objective: {name: dmd2, ratio: 2, gan_weight: 0.03, gan_critic_weight: 0.01}
players: {generator: {lr: 1.0e-4}, fake_score: {lr: 1.0e-3}}
"""
SAMPLING = {"steps": 1, "shift": None, "transition": "ode", "times": [[1.0, 1.0]]}


def row(step: int, **changes: float) -> Row:
    """What a healthy run of the flow teacher logs at a step where the generator moves."""
    healthy = {
        "generator/loss": 0.7,
        "generator/grad_norm": 1.5,
        "fake_score/loss": 0.12,
        "gap": 0.0 if step == 1 else 0.08,
        "lag": 0.0 if step == 1 else -0.0016,
        "gan/generator": 0.8,
        "gan/critic": 1.3,
        "gan/accuracy": 0.6,
        "x0/mean": 0.14,
        "x0/std": 0.25,
        "x0/saturated": 0.003,
        "x0/spread": 0.2,
        "x0/label": 0.6,
        "data/mean": 0.14,
        "data/std": 0.29,
        "data/saturated": 0.0,
        "data/spread": 0.27,
        "data/label": 0.25,
    }
    return {"step": step, "seconds": 0.1 * step, "images": 16 * step, **healthy, **changes}


def healthy(count: int = 60) -> list[Row]:
    """The generator moves at odd steps, the critic at all."""
    return [
        row(step) if step % 2 else {"step": step, "fake_score/loss": 0.12, "gan/critic": 1.3}
        for step in range(1, 2 * count)
    ]


def changed(**changes: float) -> list[Row]:
    """A log that is healthy for ten moves, and then shows `changes`."""
    return [{**found, **changes} if found["step"] > 20 and "x0/std" in found else found for found in healthy()]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder with the given rows and config."""

    def write(rows: list[Row], config: str = CONFIG, place: str = "", **files: Any) -> Path:
        at = tmp_path / "run" / place
        at.mkdir(parents=True, exist_ok=True)
        (at / "log.jsonl").write_text("".join(json.dumps(found) + "\n" for found in rows))
        (at / "config.yaml").write_text(config)
        for name, content in {"origin": {"sampling": SAMPLING}, **files}.items():
            (at / f"{name}.json").write_text(json.dumps(content))
        return tmp_path / "run"

    return write


def ill(stages: list[Stage]) -> list[str]:
    """The checks that say ILL."""
    return [finding.check for stage in stages for finding in examine(stage) if finding.state == "ILL"]


def test_a_healthy_log_has_no_illness(folder, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder(healthy())
    assert cli.main(["doctor", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dmd2, step 119 of 100" and len(lines) == 9
    assert all(line.startswith("ok ") for line in lines[1:])


LOGS = {
    "critic behind": ({"lag": 0.012, "gap": 0.08}, "", "critic", "raise players.fake_score.lr"),
    "critic astray": ({"lag": -0.3, "gap": 0.6}, "", "critic", "lower players.fake_score.lr"),
    "guidance": ({"x0/saturated": 0.3, "gap": 2.0, "lag": -0.01}, "guidance: 30", "guidance", "model.guidance"),
    "generator": ({"x0/saturated": 0.3, "x0/label": 0.0}, "", "generator's rate", "players.generator.lr"),
    "collapse": ({"x0/spread": 0.05}, "", "diversity", "rectified_flow"),
    "labels": ({"x0/label": 0.01}, "", "labels", "model.null_label"),
    "unguided": ({"x0/label": 0.01}, "guidance: 0.0", "labels", "model.guidance to 1"),
    "discriminator's weight": ({"gan/critic": 22.0}, "", "discriminator", "objective.gan_critic_weight"),
    "discriminator": ({"gan/generator": 6.0}, "", "discriminator", "objective.gan_critic_weight"),
    "nan": ({"gap": float("nan")}, "", "finite numbers", "players.<name>.lr"),
}


@pytest.mark.parametrize("name", LOGS)
def test_each_illness_alone_is_named_with_the_key_to_change(name: str, folder, capsys) -> None:
    changes, guidance, check, key = LOGS[name]
    rows = changed(**changes)
    run = folder(rows, CONFIG.replace("guidance: 1.0", guidance or "guidance: 1.0"))
    assert cli.main(["doctor", str(run)]) == 1
    said = capsys.readouterr().out
    assert ill(read(run)) == [check]
    assert key in said.split(f"\n{check}: ")[1].replace("\n", " ")


def test_a_run_that_stopped_says_why(folder) -> None:
    stop = {"step": 120, "stopped": "the loss of player generator is nan at step 119: it was not moved"}
    (stage,) = read(folder([*healthy(), stop]))
    found = examine(stage)[0]
    assert found.state == "ILL" and "stopped at step 120: the loss of player generator is nan" in found.evidence


def test_latents_far_beyond_one_are_no_illness(folder) -> None:
    """A third of unit normal latents lie beyond 1: what is saturated is judged beside the data, or the first sample."""
    latents = {"x0/saturated": 0.36, "data/saturated": 0.32}
    assert ill(read(folder([found | latents if "x0/std" in found else found for found in healthy()]))) == []
    alone = [
        {k: v for k, v in found.items() if not k.startswith("data/")} for found in changed(**{"x0/saturated": 0.4})
    ]
    alone[0]["x0/saturated"] = 0.12
    assert ill(read(folder(alone))) == []


def test_few_moves_tell_nothing(folder) -> None:
    run = folder(healthy(signs.MOVES)[: 2 * signs.MOVES - 3])
    states = {finding.check: finding for finding in examine(read(run)[0])}
    assert states["diversity"].state == "-" and f"{signs.MOVES} are needed" in states["diversity"].evidence
    assert states["finite numbers"].state == states["sampling times"].state == "ok"


def test_a_torn_last_line_and_broken_files_are_left_out(folder) -> None:
    run = folder(healthy(), table={"rows": []})
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 121, "x0/satur')
    (run / "origin.json").write_text("{")
    (stage,) = read(run)
    assert stage.rows[-1]["step"] == 119 and stage.table is None and stage.origin == {} and ill([stage]) == []


def test_every_stage_that_has_begun_is_examined(folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder(changed(**{"x0/spread": 0.05}), place="stage_1")
    run = folder(healthy(), place="stage_2")
    folder([], place="stage_3")
    assert cli.main(["doctor", str(run), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in told["stages"]] == ["stage_1", "stage_2"] and told["healthy"] is False
    named = [[f["check"] for f in stage["findings"] if f["state"] == "ILL"] for stage in told["stages"]]
    assert named == [["diversity"], []]


def test_the_table_outweighs_the_curves_on_labels(folder) -> None:
    table = {"rows": [{"name": "student, 1 step", "label_accuracy": 0.09}]}
    assert ill(read(folder(healthy(), table=table))) == ["labels"]
    table["rows"][0]["label_accuracy"] = 0.97
    assert ill(read(folder(changed(**{"x0/label": 0.01}), table=table))) == []


@pytest.mark.parametrize("change", ["steps: 4", "shift: 3.0", "transition: renoise"])
def test_a_config_that_was_changed_since(change: str, folder) -> None:
    key = change.split(":")[0]
    before = {"steps": ", steps: 1", "shift": ", shift: null", "transition": ", transition: ode"}[key]
    (stage,) = read(folder(healthy(), CONFIG.replace(before, f", {change}")))
    assert ill([stage]) == ["sampling times"] and f"model.{key}=" in examine(stage)[-1].evidence


def test_a_table_of_another_number_of_steps(folder) -> None:
    table = {"rows": [{"name": "student, 4 steps", "label_accuracy": 0.97}]}
    assert ill(read(folder(healthy(), table=table))) == ["sampling times"]


MISTAKES = {
    "absent run": (["runs/nowhere"], "there is no run folder runs/nowhere"),
    "no logs": (["configs"], "has no log.jsonl with a step in it"),
    "no run": ([], "a run folder is missing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_one_sentence(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    given, said = MISTAKES[mistake]
    assert cli.main(["doctor", *given]) == 2
    errors = capsys.readouterr().err.strip()
    assert said in errors and len(errors.splitlines()) == 1


def test_explain_knows_every_curve_that_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--explain"]) == 0
    said = capsys.readouterr().out
    for key in row(1).keys() - {"step", "seconds", "images"}:
        assert key in said, key


def test_alarms_begin_and_end_once() -> None:
    """Twenty moves of collapse sound the alarm, which a window that is healthy in the mean silences again."""
    alarms = Alarms()
    said = [alarms.hear(row(step, **({"x0/spread": 0.01} if 30 < step <= 60 else {}))) for step in range(1, 101)]
    heard = {step: word for step, word in enumerate(said, 1) if word}
    begins, ends = heard
    assert list(heard.values()) == ["collapse begins", "collapse ends"]
    # The mean of 20 moves falls below 0.35 x 0.27 with the 12th ill one, and rises above it with the 9th healthy one.
    assert (begins, ends) == (42, 69)
    assert alarms.on == []


def test_alarms_of_a_resumed_run_go_on() -> None:
    rows = [row(step, **{"x0/saturated": 0.2}) for step in range(1, 31)]
    assert Alarms(rows).on == ["saturated"]
    assert Alarms(rows[:10]).on == []


def test_label_share_is_nought_without_labels_and_one_for_labels_alone() -> None:
    labels = torch.arange(64) % 4
    images = torch.randn(64, 3, 4, 4)
    assert abs(label_share(images, labels).item()) < 0.03
    told = torch.randn(4, 3, 4, 4)[labels]
    assert label_share(told, labels).item() == pytest.approx(1, abs=1e-5)
    # Labels and noise of one variance each: within a label half of what lies between any two, less what labels share.
    assert label_share(told + images, labels).item() == pytest.approx(0.5, abs=0.1)
    assert label_share(images, torch.arange(64)).item() == 0


def test_samples_are_logged_beside_true_images_or_pairs() -> None:
    """Data where there is any, else the pairs, each with its own labels; neither is no mistake."""
    ids = torch.arange(32)
    told, other = (Condition({"class_labels": labels}) for labels in (ids % 2, ids % 4))
    images = torch.where(ids % 4 == 0, 2.0, -0.5).reshape(32, 1, 1, 1).expand(32, 3, 2, 2)
    batch = Batch(torch.zeros(32, 3, 2, 2), told, Draw(0, 0, ids))
    logs = sample_logs(torch.zeros(32, 3, 2, 2), batch)
    assert not any(key.startswith("data/") for key in logs) and logs["x0/spread"] == 0
    paired = sample_logs(images, replace(batch, pair=Pair(images, images, other)))
    assert paired["data/saturated"] == 0.25 and paired["data/label"] == pytest.approx(1, abs=1e-5)
    assert 0 < paired["x0/label"] < 0.6
    assert paired["x0/spread"] == pytest.approx(images[:, 0, 0, 0].std().item(), rel=1e-5)


SMALL = ["steps=48", "batch=16", "evals.every=0", "evals.samples=0", "pairs.count=64", "pairs.steps=4"]


def play(config: str, out: Path, *more: str) -> Path:
    """A short run of the built-in teacher; returns its folder."""
    assert cli.main(["train", f"configs/scenes/{config}.yaml", *SMALL, *more, f"--out={out}"]) == 0
    return next(out.iterdir())


@pytest.fixture
def deaf(tmp_path: Path) -> Path:
    """The built-in teacher with one embedding for all labels: what a conversion that loses them leaves."""
    folder = tmp_path / "deaf"
    shutil.copytree("assets/teachers/scenes-flow", folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    name = "class_embedding.weight"
    state[name] = state[name].float().mean(0, keepdim=True).repeat(len(state[name]), 1).to(state[name].dtype)
    save_file(state, weights, metadata={"format": "pt"})
    return folder


ILL = {
    "critic's rate / 100": ("players.fake_score.lr=1e-5", "critic"),
    "guidance 30": ("model.guidance=30", "guidance"),
    "generator's rate x 100": ("players.generator.lr=1e-2", "generator's rate"),
    "discriminator's weight x 1000": ("objective.gan_critic_weight=10", "discriminator"),
}


@pytest.mark.slow
@pytest.mark.parametrize("illness", ILL)
def test_a_run_made_ill_on_purpose_has_that_illness_alone(illness: str, tmp_path: Path) -> None:
    change, check = ILL[illness]
    run = play("dmd2", tmp_path / "runs", "save.export=false", change)
    assert ill(read(run)) == [check]
    assert cli.main(["doctor", str(run)]) == 1


@pytest.mark.slow
def test_a_teacher_that_has_lost_its_labels(deaf: Path, tmp_path: Path) -> None:
    assert ill(read(play("dmd2", tmp_path / "runs", "save.export=false", f"model.teacher={deaf}"))) == ["labels"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["dmd2", "dmd2_lora", "dmd", "phased_dmd", "consistency", "rectified_flow"])
def test_healthy_runs_have_no_illness(config: str, tmp_path: Path) -> None:
    run = play(config, tmp_path)
    stages = read(run)
    assert ill(stages) == [] and cli.main(["doctor", str(run)]) == 0
    assert not any("alarm" in found for stage in stages for found in stage.rows)
    assert "the export walks the same" in examine(stages[-1])[-1].evidence


@pytest.mark.slow
def test_an_edited_scheduler_walks_other_times(tmp_path: Path) -> None:
    """Four steps are shifted by the exported scheduler alone; the healthy run itself is told apart from that."""
    run = play("dmd2_four_steps", tmp_path)
    assert ill(read(run)) == []
    at = run / "export" / "scheduler" / "scheduler_config.json"
    at.write_text(json.dumps(json.loads(at.read_text()) | {"flow_shift": 3.0}))
    (stage,) = read(run)
    assert ill([stage]) == ["sampling times"]
    assert "walks t = 1.000, 0.900, 0.750, 0.500" in examine(stage)[-1].evidence


def test_a_run_logs_its_alarm_and_its_end(tiny_teacher: Path, tmp_path: Path, capsys) -> None:
    """A generator at a rate of 1 leaves the images at once: the run says so while it trains, and stays readable."""
    given = ["ratio=1", "gan_weight=0", "backward_simulation=true"]
    quick = ["steps=24", "batch=4", "players.generator.lr=1", *(f"objective.{key}" for key in given)]
    run = play("dmd2", tmp_path, f"model.teacher={tiny_teacher}", "save.export=false", *quick)
    begun = [found for found in read(run)[0].rows if "saturated begins" in found.get("alarm", "")]
    assert [found["step"] for found in begun] == [signs.MOVES]
    assert "! saturated" in capsys.readouterr().err
    assert cli.main(["report", str(run)]) == 0


def test_a_run_that_meets_nan_leaves_the_reason(tiny_teacher: Path, tmp_path: Path, capsys) -> None:
    """Also of a run without a single whole step: the reason is then all that its log holds."""
    poisoned = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, poisoned)
    weights = poisoned / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_out.weight"][0] = float("nan")
    save_file(state, weights, metadata={"format": "pt"})
    given = ["configs/scenes/dmd2.yaml", *SMALL, f"model.teacher={poisoned}", f"--out={tmp_path / 'runs'}"]
    assert cli.main(["train", *given]) == 2
    run = next((tmp_path / "runs").iterdir())
    assert cli.main(["doctor", str(run)]) == 1
    assert "the run stopped at step 1: generator: weight 0.net.conv_out.weight is not finite" in capsys.readouterr().out

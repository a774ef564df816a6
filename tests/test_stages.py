"""Runs of several stages: what the next stage starts from, what stays frozen, what is made once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from fewstep import build, cli, config, export
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.core.times import Step
from fewstep.models.backbone import Routed
from fewstep.pairs import noise_of
from fewstep.rollout import Rollout, ode
from fewstep.train import checkpoint

SMALL = ["batch=4", "steps=4", "save.every=2", "evals.every=0", "evals.samples=0", "pairs.count=8", "pairs.steps=2"]

EXPERTS = ["phased_dmd_experts", pytest.param("phased_dmd_experts_lora", marks=pytest.mark.slow)]


def play(name: str, teacher: Path, out: Path, *more: str) -> Path:
    given = [f"configs/scenes/{name}.yaml", *SMALL, f"model.teacher={teacher}", *more]
    assert cli.main(["train", *given, f"--out={out}"]) == 0
    return next(out.iterdir())


def network(stage: Path, part: str | None = None, role: str = "generator") -> dict[str, torch.Tensor]:
    return checkpoint.read_network(checkpoint.available(stage / "checkpoints")[-1], role, part)


@pytest.mark.parametrize("config", EXPERTS)
def test_second_phase_keeps_the_first_expert(tiny_teacher: Path, tmp_path: Path, config: str) -> None:
    """Its average is what the second phase starts its samples from; both experts are whole networks, or adapters."""
    run = play(config, tiny_teacher, tmp_path)
    first, second = network(run / "stage_1", "ema"), network(run / "stage_2")
    assert {name.split(".")[1] for name in second} == {"0", "1"}
    frozen = [name for name in first if name.startswith("experts.0.")]
    trained = [name for name in first if name.startswith("experts.1.")]
    assert frozen and all(torch.equal(first[name], second[name]) for name in frozen)
    assert any(not torch.equal(first[name], second[name]) for name in trained)


@pytest.mark.slow
def test_each_phase_starts_its_critic_from_the_teacher(tiny_teacher: Path, tmp_path: Path) -> None:
    """With a rate near 0 the second critic ends where it began: at the teacher, from which the first one has gone."""
    run = play("phased_dmd_experts", tiny_teacher, tmp_path, "stage_2.players.fake_score.lr=1e-20")
    net = diffusers.UNet2DModel.from_pretrained(tiny_teacher / "unet")
    teacher = {f"net.{name}": value for name, value in net.state_dict().items()}
    first, second = network(run / "stage_1", role="fake_score"), network(run / "stage_2", role="fake_score")
    assert any(not torch.equal(first[name], teacher[name]) for name in teacher)
    assert all(torch.allclose(second[name], teacher[name], rtol=0, atol=1e-12) for name in teacher)


@pytest.mark.slow
@pytest.mark.parametrize("config", EXPERTS)
def test_experts_take_turns_at_inference(tiny_teacher: Path, tmp_path: Path, config: str) -> None:
    """The first two of four steps are those of the first expert, the others those of the second, after a reload."""
    run = export.load_run(play(config, tiny_teacher, tmp_path, "players.generator.lr=1e-2"))
    routed = run.evaluated()
    assert isinstance(routed, Routed)
    draw = Draw(0, 0, torch.arange(2))
    noise, cond = draw.normal("noise", run.shape), run.conditions.of(draw.ids)
    with torch.no_grad():
        walked = list(run.rollout.walk(routed, noise, cond, draw))
    for index, sample in enumerate(walked):
        told = torch.full((2,), run.rollout.steps[index].told)
        said = [expert(sample.x_t, told, cond).at(sample.t).x0 for expert in routed.experts]
        mine, other = said if index < 2 else said[::-1]
        assert torch.allclose(sample.x0, mine, atol=1e-5) and (sample.x0 - other).abs().max() > 1e-4


def test_pairs_are_made_once_and_distillation_starts_from_the_reflow(tiny_teacher: Path, tmp_path: Path) -> None:
    run = play("rectified_flow", tiny_teacher, tmp_path, "players.generator.lr=1e-12")
    assert len(list(run.rglob("pairs_*/index.json"))) == 1
    reflowed, distilled = network(run / "stage_1", "ema"), network(run / "stage_2")
    gap = max((reflowed[name] - distilled[name]).abs().max().item() for name in reflowed)
    assert gap < 1e-9
    assert (run / "export" / "model_index.json").exists()


def test_a_finished_stage_is_not_played_again(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = play("rectified_flow", tiny_teacher, tmp_path)
    before = checkpoint.sha256(run / "stage_1" / "checkpoints" / "0000004" / "state.safetensors")
    (run / "stage_2" / "checkpoints" / "0000004").rename(tmp_path / "gone")
    given = ["configs/scenes/rectified_flow.yaml", *SMALL, f"model.teacher={tiny_teacher}"]
    assert cli.main(["train", *given, "--resume", str(run)]) == 0
    assert checkpoint.sha256(run / "stage_1" / "checkpoints" / "0000004" / "state.safetensors") == before
    again = checkpoint.verify(run / "stage_2" / "checkpoints" / "0000004")
    assert again["step"] == 4
    gone = checkpoint.sha256(tmp_path / "gone" / "state.safetensors")
    assert checkpoint.sha256(run / "stage_2" / "checkpoints" / "0000004" / "state.safetensors") == gone


def test_gone_back_to_an_earlier_stage_the_later_ones_are_played_again(tiny_teacher: Path, tmp_path: Path) -> None:
    """With another rate, so that stages learnt from the old one would be seen."""
    run = play("progressive", tiny_teacher, tmp_path / "out")
    stages = sorted(run.glob("stage_*"))
    last = [stage / "checkpoints" / "0000004" / "state.safetensors" for stage in stages]
    before = [checkpoint.sha256(state) for state in last]
    given = ["configs/scenes/progressive.yaml", *SMALL, f"model.teacher={tiny_teacher}", "players.generator.lr=7e-4"]
    back = stages[0] / "checkpoints" / "0000002"
    assert cli.main(["train", *given, "--resume", str(back)]) == 0
    assert len(last) > 1 and not set(before) & {checkpoint.sha256(state) for state in last}


def test_pairs_of_another_teacher_or_guidance_are_made_again(tiny_teacher: Path, tmp_path: Path) -> None:
    def made(*more: str) -> bytes:
        given = [*SMALL, f"model.teacher={tiny_teacher}", *more]
        run = build.build(config.load("configs/scenes/dmd.yaml", given)[0])
        build.prepare(run, tmp_path)
        return file.read_bytes()

    file = tmp_path / "pairs_8x2_seed7" / "shard-00000.safetensors"
    first = made()
    stamp = file.stat().st_mtime_ns
    assert made("players.generator.lr=1") == first
    assert file.stat().st_mtime_ns == stamp
    assert made("model.guidance=3") != first


def test_a_resumed_run_keeps_what_it_learns(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lengths and rates may change and are said; the seed or the guidance may not."""
    run = play("dmd2", tiny_teacher, tmp_path)
    given = ["configs/scenes/dmd2.yaml", *SMALL, f"model.teacher={tiny_teacher}", "--resume", str(run)]
    assert cli.main(["train", *given, "model.guidance=3", "seed=9"]) == 2
    said = capsys.readouterr().err
    assert "model.guidance was 1.0, is 3.0" in said and "seed was 0, is 9" in said
    assert "guidance: 1.0" in (run / "config.yaml").read_text()
    for more in ("players.generator.ema=0", "players.fake_score.ema=0.5", "players.generator.lora.rank=2"):
        assert cli.main(["train", *given, more]) == 2
        said = capsys.readouterr().err
        assert f"{more.split('=')[0]} was " in said and "was started with other settings" in said
    assert cli.main(["train", *given, "steps=6", "players.generator.lr=1e-5", "players.generator.ema=0.5"]) == 0
    said = capsys.readouterr().out
    assert "resumed with changes: steps was 4, is 6" in said and "players.generator.ema was " in said
    rates = [row["generator/lr"] for row in map(json.loads, (run / "log.jsonl").open()) if "generator/lr" in row]
    assert rates[0] > 2e-5 and all(0.9e-5 < rate <= 1e-5 for rate in rates[-2:])  # it falls along a cosine


FLOWS = ["progressive", "reflow_rounds", "slimflow", "tcm"]


@pytest.mark.parametrize("name", FLOWS)
def test_stopped_inside_a_stage_the_rest_is_played_to_the_same_bits(
    name: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Of the second stage the later half is lost, and every stage after it."""
    run = play(name, tiny_teacher, tmp_path / "out")
    stages = sorted(run.glob("stage_*"))
    last = [stage / "checkpoints" / "0000004" / "state.safetensors" for stage in stages]
    before = [checkpoint.sha256(state) for state in last]
    assert len(set(before)) == len(stages) >= 2
    shutil.rmtree(stages[1] / "checkpoints" / "0000004")
    for stage in stages[2:]:
        shutil.rmtree(stage)
    given = [f"configs/scenes/{name}.yaml", *SMALL, f"model.teacher={tiny_teacher}", "--resume", str(run)]
    assert cli.main(["train", *given]) == 0
    assert [checkpoint.sha256(state) for state in last] == before


def test_what_can_be_made_before_the_rounds_is(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first round's pairs; the others' are made while training, which finds the first's."""
    given = ["configs/scenes/reflow_rounds.yaml", *SMALL, f"model.teacher={tiny_teacher}"]
    assert cli.main(["prepare", *given, f"--out={tmp_path / 'made'}"]) == 0
    assert capsys.readouterr().out.count("its pairs are made by the student before it") == 2
    assert len(list((tmp_path / "made").rglob("pairs_*/index.json"))) == 1
    assert cli.main(["train", *given, f"data.prepared={tmp_path / 'made'}", f"--out={tmp_path / 'runs'}"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert sorted(file.parts[-3] for file in run.rglob("pairs_*/index.json")) == ["stage_2", "stage_3"]
    assert cli.main(["sample", str(run), f"--out={tmp_path / 'x.png'}"]) == 0
    assert cli.main(["prepare", "configs/scenes/progressive.yaml", *given[1:], f"--out={tmp_path / 'none'}"]) == 0


def test_another_round_of_reflow_asks_the_student_before(tiny_teacher: Path, tmp_path: Path) -> None:
    """Its pairs are those that the first round's average leads to, not the teacher's; without a first round, none."""
    run = play("reflow_rounds", tiny_teacher, tmp_path / "out", "players.generator.lr=1e-2")
    given = [*SMALL, f"model.teacher={tiny_teacher}"]
    stages = config.load("configs/scenes/reflow_rounds.yaml", given)
    stages[1].start = {}
    with pytest.raises(UserError, match=r"pairs\.of=previous: there is no earlier stage"):
        build.prepare(build.build(stages[1]), tmp_path)
    second = build.build(stages[1], run / "stage_1")
    build.prepare(second, tmp_path, run / "stage_1")
    assert second.pairs is not None and second.maker is not None
    rows, walk = torch.arange(8), Rollout([Step(0.999, 0.999), Step(0.499, 0.4995)], ode)
    noise, cond = noise_of(7, rows, second.shape), second.pairs.cond
    with torch.no_grad():
        student, teacher = (walk(net, noise, cond, Draw(7, 0, rows)).x0 for net in (second.maker, second.guided()))
    assert torch.allclose(second.pairs.x0, student, atol=1e-5)
    assert (second.pairs.x0 - teacher).abs().max() > 1e-2
    average = network(run / "stage_1", "ema")
    assert all(torch.equal(value, average[name]) for name, value in second.maker.state_dict().items())

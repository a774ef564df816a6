"""Roles that learn adapters on the teacher's own weights: trained, resumed, sampled and exported like the others."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest

from fewstep import build, cli, config, export, measure
from fewstep.models.voices import Voice
from fewstep.train import checkpoint

SMALL = ["batch=4", "steps=4", "save.every=2", "evals.every=0", "evals.samples=0"]
CONFIG = "configs/scenes/dmd2_lora.yaml"


def given(teacher: Path, *more: str) -> list[str]:
    rank = ["players.generator.lora.rank=2", "players.fake_score.lora.rank=2"]
    return [CONFIG, *SMALL, *rank, f"model.teacher={teacher}", *more]


def play(teacher: Path, out: Path, *more: str) -> Path:
    assert cli.main(["train", *given(teacher, *more), f"--out={out}"]) == 0
    return next(out.iterdir())


def built(teacher: Path, *more: str) -> build.Run:
    file, *overrides = given(teacher, *more)
    return build.build(config.load(file, overrides)[0])


def test_three_roles_are_one_network(tiny_teacher: Path) -> None:
    run = built(tiny_teacher)
    generator, critic, teacher = run.triad.generator, run.triad.fake_score, build_bare(run)
    assert isinstance(generator, Voice) and isinstance(critic, Voice)
    assert generator.net is critic.net is teacher.net is run.teacher.net
    assert not any(p.requires_grad for n, p in run.teacher.net.named_parameters() if "lora_" not in n)
    trained = sum(p.numel() for p in run.players["generator"].parameters)
    assert 0 < trained < 0.5 * sum(p.numel() for n, p in run.teacher.net.named_parameters() if "lora_" not in n)


def build_bare(run: build.Run) -> Voice:
    inner = run.triad.real_score.inner  # type: ignore[union-attr]
    assert isinstance(inner, Voice) and inner.voice is None
    return inner


def test_a_critic_alone_leaves_the_generator_a_full_copy(tiny_teacher: Path) -> None:
    run = built(tiny_teacher, "players.generator.lora=null")
    assert not isinstance(run.triad.generator, Voice) and isinstance(run.triad.fake_score, Voice)
    assert run.triad.generator.net is not run.teacher.net  # type: ignore[attr-defined]
    assert not any("lora_" in name for name in run.triad.generator.state_dict())


def test_a_checkpoint_holds_the_adapters_and_resumes_to_the_same_bits(tiny_teacher: Path, tmp_path: Path) -> None:
    run = play(tiny_teacher, tmp_path)
    final = run / "checkpoints" / "0000004"
    adapter = checkpoint.read_network(final, "generator", None)
    assert adapter and all("lora_" in name for name in adapter)
    assert all(weight.abs().max() > 0 for weight in adapter.values())
    before = checkpoint.sha256(final / checkpoint.STATE)
    half = str(run / "checkpoints" / "0000002")
    assert cli.main(["train", *given(tiny_teacher), f"--out={tmp_path}", "--resume", half]) == 0
    assert checkpoint.sha256(final / checkpoint.STATE) == before


def test_the_export_is_fused_and_draws_what_the_voice_draws(tiny_teacher: Path, tmp_path: Path) -> None:
    """To 1e-5 of the largest value, on plain weights; and the bare teacher draws something else."""
    folder = play(tiny_teacher, tmp_path, "steps=8", "players.generator.lr=0.02")
    run = export.load_run(folder)
    net, rollout = measure.student(run)
    assert isinstance(net, Voice)
    unet = diffusers.UNet2DModel.from_pretrained(folder / "export" / "unet")
    assert unet.state_dict().keys() == diffusers.UNet2DModel.from_pretrained(tiny_teacher / "unet").state_dict().keys()
    plain = run.teacher.backbone(unet)
    drawn = [measure.made(run, one, rollout, 6, seed=1) for one in (net, plain, run.teacher.backbone())]
    assert (drawn[0] - drawn[1]).abs().max() < 1e-5
    assert (drawn[0] - drawn[2]).abs().max() > 1e-3


def test_experts_are_adapters_too(tiny_teacher: Path) -> None:
    overrides = [*SMALL, f"model.teacher={tiny_teacher}", "players.generator.lora.rank=2"]
    run = build.build(config.load("configs/scenes/phased_dmd_experts.yaml", overrides)[0])
    first, second = run.triad.generator.experts  # type: ignore[union-attr]
    assert isinstance(first, Voice) and isinstance(second, Voice)
    assert first.net is second.net and first.voice != second.voice


def test_a_dry_run_counts_the_adapter_and_the_teacher(tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *given(tiny_teacher), "--dry-run"]) == 0
    said = capsys.readouterr().out
    run = built(tiny_teacher)
    adapter = sum(p.numel() for p in run.players["generator"].parameters)
    teacher = sum(p.numel() for p in diffusers.UNet2DModel.from_pretrained(tiny_teacher / "unet").parameters())
    assert f"player generator: {adapter:,} parameters" in said
    assert f"real_score: {teacher:,} parameters" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("players.generator.lora.rank=0", "at least 1"),
        ("players.generator.lora.targets=[to_quack]", "to_quack"),
        ("players.generator.lora.ranks=4", "rank"),
    ],
)
def test_mistakes_are_one_sentence(
    override: str, said: str, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *given(tiny_teacher, override), f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_an_adapter_does_not_start_from_a_full_network(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f"start.generator={tiny_teacher}"
    assert cli.main(["train", *given(tiny_teacher, more), f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "start.generator" in error and "adapter" in error

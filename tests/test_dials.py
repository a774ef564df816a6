"""What a network is told beside the time survives saving, loading and export; AGD's export is a teacher of one pass."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

from fewstep import build, cli, config, export
from fewstep.carried import scheduler_of, trusted
from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.models.backbone import Backbone
from fewstep.train import checkpoint
from fewstep.train.loop import train_step

SMALL = ["batch=4", "steps=3", "save.every=3", "evals.every=0", "evals.samples=0", "pairs.count=8", "pairs.steps=2"]
TOLD = {"agd": "guidance", "guidance_distillation": "guidance", "lcm": "guidance", "meanflow": "second_time"}
"""objective -> the dial of its generator"""


def play(name: str, teacher: Path, out: Path, *more: str) -> Path:
    quick = ["players.generator.lr=0.1", "players.generator.ema=0.5", "model.steps=1", f"model.teacher={teacher}"]
    assert cli.main(["train", f"configs/scenes/{name}.yaml", *SMALL, *quick, *more, f"--out={out}"]) == 0
    return next(out.iterdir())


@torch.no_grad()
def velocity(net: Backbone, guidance: float | None = None) -> torch.Tensor:
    draw = Draw(3, 0, torch.arange(4))
    cond = Condition({"class_labels": torch.tensor([0, 3, 7, 11])})
    if guidance is not None:
        cond = Condition(cond.inputs, {"guidance": torch.full((4,), guidance)})
    return net(draw.normal("x", (3, 16, 16)), torch.full((4,), 0.7), cond).velocity


@pytest.mark.parametrize("name", TOLD)
def test_it_is_saved_loaded_and_folded_into_the_export(name: str, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = play(name, tiny_teacher, tmp_path / "runs", "save.export=true")
    run = export.load_run(folder)
    state = run.evaluated().state_dict()
    kept = checkpoint.read_network(checkpoint.available(folder / "checkpoints")[-1], "generator", "ema")
    told = [key for key in kept if TOLD[name] in key]
    assert told and all(torch.equal(kept[key], state[key]) for key in told)
    assert max(kept[key].abs().max() for key in told if "layers" in key) > 1e-2
    noise, cond = export.SameNoise(0, 1), Condition({"class_labels": torch.zeros(1, dtype=torch.int64)})
    with torch.no_grad():
        ours = run.rollout(run.evaluated(), noise.normal("", run.shape), cond, noise).x0  # type: ignore[arg-type]
    said = trusted(scheduler_of(run))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "export", **said)
    states: list[torch.Tensor] = []
    asked = {"class_labels": [0], "num_inference_steps": 1, "generator": torch.Generator().manual_seed(0)}
    pipeline(**asked, callback=lambda i, t, x: states.append(x))
    assert (states[-1] - ours).abs().max() < 1e-5 * ours.abs().max()


def test_the_export_of_agd_is_a_guided_teacher_of_one_pass(tiny_teacher: Path, tmp_path: Path) -> None:
    """It says what the adapter says at the guidance it was exported at; every other objective takes it as it is."""
    folder = play("agd", tiny_teacher, tmp_path / "runs", "save.export=true", "objective.guidance=2.5")
    agd = export.load_run(folder).evaluated()
    given = [*SMALL, f"model.teacher={folder / 'export'}", "model.guidance=1"]
    run = build.build(config.load("configs/scenes/dmd2.yaml", given)[0])
    teacher = run.triad.real_score
    assert torch.allclose(velocity(teacher), velocity(agd, 2.5), atol=1e-5)
    assert (velocity(teacher) - velocity(agd, 1.0)).abs().max() > 1e-3
    logs = train_step(run.objective, build.batches(run)(0), 0, run.players)
    assert all(torch.tensor(value).isfinite() for value in logs.values())

"""The command line: exit codes, one sentence for a mistake, nothing poisoned or half-written."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import cli, export
from fewstep.models.shaped import is_shaped
from fewstep.train import checkpoint, processes

QUICK = ["batch=4", "evals.every=0", "evals.samples=24", "save.every=2", "steps=4"]


def train(teacher: Path, out: Path, *more: str) -> int:
    return cli.main(["train", "configs/scenes/dmd2.yaml", *QUICK, f"model.teacher={teacher}", "--out", str(out), *more])


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, tmp_path_factory) -> Path:
    """A finished run of four steps."""
    out = tmp_path_factory.mktemp("runs")
    assert train(tiny_teacher, out) == 0
    return next(out.iterdir())


def test_a_run_leaves_the_promised_folder(run: Path) -> None:
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "origin.json", "log.jsonl", "checkpoints", "export", "report.html", "table.json"} <= names
    assert [p.name for p in checkpoint.available(run / "checkpoints")] == ["0000002", "0000004"]
    logs = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logs] == [1, 2, 3, 4]
    assert logs[0]["generator/moves"] == 1 and logs[-1]["generator/moves"] == 2 and logs[-1]["fake_score/moves"] == 4
    assert {"gap", "lag", "generator/grad_norm", "x0/mean", "x0/std", "x0/saturated"} <= set(logs[0])
    assert {"gan/accuracy", "fake_score/grad_norm"} <= set(logs[1])
    table = json.loads((run / "table.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["teacher, 50 steps", "teacher, 1 step", "student, 1 step"]
    assert [row["passes"] for row in table["rows"]] == [50, 1, 1]
    assert all(row["samples"] == 24 for row in table["rows"])


def test_what_finishes_a_run_of_several_processes(run: Path) -> None:
    """Teacher and generator alone have memory, and the generator is its average."""
    used = export.load_run(run, last=False)
    triad = used.triad
    assert [is_shaped(net) for net in (triad.generator, triad.real_score, triad.fake_score)] == [False, False, True]
    assert not used.players["generator"].followers and used.evaluated() is triad.generator
    average = checkpoint.read_network(checkpoint.available(run / "checkpoints")[-1], "generator", "ema")
    assert all(torch.equal(value, average[name]) for name, value in triad.generator.state_dict().items())
    assert "EMA of the weights" in export.card(used, torch.float32)


def test_a_batch_that_processes_cannot_share_out_is_refused_first(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(processes, "from_leader", lambda decide: decide())
    monkeypatch.setattr(processes, "refuse_differences", lambda config: None)
    told = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert train(tiny_teacher, tmp_path, "batch=3") == 2
        told.append(capsys.readouterr().err)
    assert told[0].startswith("fewstep: a batch of 3 cannot be shared out to 2 processes") and told[0].count("\n") == 1
    assert told[1] == "" and list(tmp_path.iterdir()) == []


def test_commands_on_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(run), "--samples", "24"]) == 0
    assert cli.main(["export", str(run), "--to", str(tmp_path / "out"), "--dtype", "float16"]) == 0
    assert cli.main(["report", str(run)]) == 0
    assert cli.main(["config", "configs/scenes/dmd2.yaml", "model.steps=4"]) == 0
    assert cli.main(["objectives"]) == 0
    assert cli.main(["objectives", "dmd2"]) == 0
    printed = capsys.readouterr().out
    assert "student, 1 step" in printed and "steps: 4" in printed and "ratio: 5" in printed
    assert (tmp_path / "out" / "model_index.json").exists()


def test_dry_run_writes_nothing(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny_teacher, tmp_path / "none", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "player generator" in printed and "x noise (4, 3, 16, 16)" in printed
    assert not (tmp_path / "none").exists()


MISTAKES = {
    "unknown key": (["model.stepz=4"], "Did you mean: 'steps'"),
    "override behind options": (["--dry-run", "objective.ratoi=3"], "Did you mean: 'ratio'"),
    "absent teacher": (["model.teacher=/nowhere/to/be/found"], "there is no teacher"),
    "nothing to resume": (["--resume"], "nothing to resume"),
    "absent checkpoint": (["--resume", "/nowhere/at/all"], "nothing to resume"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_one_sentence(mistake: str, tiny_teacher: Path, tmp_path: Path, capsys) -> None:
    given, said = MISTAKES[mistake]
    assert train(tiny_teacher, tmp_path, *given) == 2
    errors = capsys.readouterr().err.strip()
    assert said in errors and errors.startswith("fewstep: ") and "Traceback" not in errors
    assert len(errors.splitlines()) == 1


def test_unwritable_run_folder(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert train(tiny_teacher, tmp_path / "file") == 2
    assert "could not be written (Not a directory)" in capsys.readouterr().err


def test_no_space_left_keeps_earlier_checkpoints(tiny_teacher: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    written = checkpoint.write_state

    def full(path: Path, state) -> None:
        if "0000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        written(path, state)

    monkeypatch.setattr(checkpoint, "write_state", full)
    assert train(tiny_teacher, tmp_path) == 2
    assert "No space left on device" in capsys.readouterr().err
    folder = next(tmp_path.iterdir()) / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["0000002"]
    assert checkpoint.verify(folder / "0000002")["step"] == 2


def test_non_finite_loss_names_player_and_step(tiny_teacher: Path, tmp_path: Path, capsys) -> None:
    import shutil

    poisoned = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, poisoned)
    weights = poisoned / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_out.weight"][0] = float("nan")
    save_file(state, weights, metadata={"format": "pt"})
    assert train(poisoned, tmp_path / "out") == 2
    errors = capsys.readouterr().err
    assert (
        "generator: weight 0.net.conv_out.weight is not finite at step 0: nothing was moved" in errors
        and "no checkpoint had been written yet" in errors
    )
    assert not list(tmp_path.glob("out/*/checkpoints/*"))


def test_a_disk_that_fails_anywhere_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/table.json")

    monkeypatch.setattr(cli, "prepare", full)
    assert cli.main(["prepare", "configs/quickstart.yaml"]) == 2
    assert capsys.readouterr().err == (
        "fewstep: /disk/table.json could not be read or written (No space left on device)\n"
    )

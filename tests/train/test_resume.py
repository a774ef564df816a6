"""Killed at any step and resumed, a run ends with the same bits; asked to stop, it saves first and says where."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewstep import cli
from fewstep.config import SaveConfig
from fewstep.core.errors import UserError
from fewstep.train import checkpoint

QUICK = [
    "steps=14",
    "batch=4",
    "save.every=3",
    "save.export=false",
    "evals.every=0",
    "evals.samples=0",
]


def command(teacher: Path, out: Path, *more: str) -> list[str]:
    overrides = [*QUICK, f"model.teacher={teacher}"]
    return [sys.executable, "-m", "fewstep.cli", "train", "configs/scenes/dmd2.yaml", *overrides, f"--out={out}", *more]


def run_folder(out: Path) -> Path:
    return next(out.glob("*_dmd2"))


def wait_for_step(out: Path, step: int) -> None:
    """Until the log shows that `step` is done."""
    deadline = time.time() + 120
    while time.time() < deadline:
        logs = list(out.glob("*/log.jsonl"))
        if logs and len(logs[0].read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError("the run never reached the step")


def final_state(out: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder(out) / "checkpoints" / "0000014" / "state.safetensors")


@pytest.fixture(scope="module")
def whole(tiny_teacher: Path, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    subprocess.run(command(tiny_teacher, out), check=True, capture_output=True)
    return out


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_exact(step: int, whole: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(command(tiny_teacher, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path, step)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = sorted((run_folder(tmp_path) / "checkpoints").glob("0*"))
    more = ["--resume", str(run_folder(tmp_path))] if saved else []
    if not saved:
        os.rename(run_folder(tmp_path), tmp_path / "lost_before_the_first_checkpoint")
    subprocess.run(command(tiny_teacher, tmp_path, *more), check=True, capture_output=True)
    expected, found = final_state(whole), final_state(tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    rows = [json.loads(line) for line in (run_folder(tmp_path) / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "resumed" not in row] == list(range(1, 15))
    assert [row["step"] for row in rows if "resumed" in row] == ([int(saved[-1].name)] if saved else [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signals_save_first_and_say_where(number: signal.Signals, tiny_teacher: Path, tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    given = command(tiny_teacher, tmp_path, "steps=5000", "save.grace=0.001")
    process = subprocess.Popen(given, stdout=pipe, stderr=pipe, text=True)
    wait_for_step(tmp_path, 4)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    last = sorted((run_folder(tmp_path) / "checkpoints").glob("0*"))[-1]
    assert process.returncode == 0
    assert f"stopped by {number.name}; saved in {last}" in said
    assert said.count("together more than save.grace=0.001") == 1
    assert said.rstrip().endswith(f"--out={tmp_path} --resume {run_folder(tmp_path)}")
    assert "Traceback" not in errors
    assert json.loads((last / "manifest.json").read_text())["step"] == int(last.name)


def test_a_grace_is_a_time() -> None:
    with pytest.raises(UserError, match=r"save\.grace is a number of seconds above 0, but -1"):
        SaveConfig(grace=-1)


def test_damaged_checkpoint_is_refused_and_the_one_before_offered(whole: Path, tiny_teacher: Path) -> None:
    checkpoints = sorted((run_folder(whole) / "checkpoints").glob("0*"))
    weights = checkpoints[-1] / "state.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:1000] + bytes([kept[1000] ^ 1]) + kept[1001:])
        found = subprocess.run(
            command(tiny_teacher, whole, "--resume", str(run_folder(whole))),
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        weights.write_bytes(kept)
    assert found.returncode == 2
    assert str(checkpoints[-1]) in found.stderr and f"--resume {checkpoints[-2]}" in found.stderr


def test_a_signal_during_a_checkpoint_stops_the_run_at_it(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No further step is played, and nothing saved a second time."""
    saved, save = [], checkpoint.save

    def signalled(folder: Path, step: int, *rest: Any) -> Path:
        saved.append(step)
        if len(saved) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", signalled)
    given = ["configs/scenes/dmd2.yaml", f"model.teacher={tiny_teacher}", "batch=4", "steps=50", "save.every=5"]
    assert cli.main(["train", *given, "evals.samples=0", f"--out={tmp_path}"]) == 0
    assert saved == [5] and "stopped by SIGTERM; saved in" in capsys.readouterr().out


def test_a_run_whose_folder_goes_between_two_writes_says_so(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look = checkpoint.verify

    def removed(path: Path) -> dict[str, Any]:
        shutil.rmtree(run_folder(tmp_path))
        return look(path)

    monkeypatch.setattr(checkpoint, "verify", removed)
    given = ["configs/scenes/dmd2.yaml", f"model.teacher={tiny_teacher}", "batch=4", "steps=50", "save.every=2"]
    assert cli.main(["train", *given, "save.keep=1", "evals.samples=0", f"--out={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "has gone while the run went on" in said and "damaged" not in said

"""Metrics during training: logged with their protocols, on the right weights, the best checkpoint kept."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewstep import cli, finish, hooks, metrics
from fewstep.core.errors import UserError
from fewstep.evals.extractors import sha256
from fewstep.export import load_run
from fewstep.hooks import Best, Hooks
from fewstep.models import tiny
from tests.evals.test_extractors import Base

CONFIG = """
name: hooked
steps: 6
batch: 4
model: {steps: 1}
objective: {name: dmd2, ratio: 1, gan_weight: 0.0}
players: {generator: {lr: 1.0e-2, ema: 0.5}, fake_score: {lr: 1.0e-3}}
data: {source: scenes, resolution: 16}
evals:
  every: 0
  samples: 0
  hooks:
    fid: {metric: frechet, extractor: inception, every: 2, samples: 30}
    raw: {metric: frechet, network: raw, every: 3, samples: 30}
    near: {metric: neighbours, every: 3, samples: 30}
  best: raw
save: {every: 100, keep: 1, export: false}
"""


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "inception-2015-12-05.pt"
    torch.jit.save(torch.jit.script(Base()), str(file))
    return file


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """References in a cache of their own, of few images; no pictures at the end of a run."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fewstep.hooks.REFERENCE_SAMPLES", 60)
    monkeypatch.setattr(finish, "finish", lambda run, folder: None)


def given(teacher: Path, inception: Path | str, tmp_path: Path, *more: str) -> list[str]:
    (tmp_path / "hooked.yaml").write_text(CONFIG)
    weights = f"evals.hooks.fid.weights={inception}"
    return ["train", str(tmp_path / "hooked.yaml"), f"model.teacher={teacher}", weights, *more]


def lines(folder: Path) -> dict[int, dict[str, float]]:
    return {row.pop("step"): row for row in map(json.loads, (folder / "evals.jsonl").read_text().splitlines())}


def test_numbers_are_logged_with_their_protocols(tiny_teacher: Path, inception: Path, tmp_path: Path) -> None:
    assert cli.main([*given(tiny_teacher, inception, tmp_path), f"--out={tmp_path / 'runs'}"]) == 0
    folder = next((tmp_path / "runs").iterdir())
    found = lines(folder)
    near = {f"near/{name}" for name in ("precision", "recall", "density", "coverage")}
    assert {step: set(row) for step, row in found.items()} == {
        2: {"fid"},
        3: {"raw", *near},
        4: {"fid"},
        6: {"fid", "raw", *near},
    }
    said = json.loads((folder / "protocols.json").read_text())
    assert said["fid"]["weights_sha256"] == sha256(inception) and said["fid"]["reference_samples"] == 60
    assert (said["raw"]["network"], said["near"]["network"]) == ("raw", "follower")
    assert len(list((tmp_path / "cache" / "references").iterdir())) == 1


def test_the_best_checkpoint_is_kept_and_can_be_used(tiny_teacher: Path, inception: Path, tmp_path: Path) -> None:
    """With a checkpoint at every step and one kept, the best one stays beside the newest."""
    more = ["save.every=1", "evals.hooks.raw.every=1", "evals.hooks.fid.every=50", "evals.hooks.near.every=50"]
    assert cli.main([*given(tiny_teacher, inception, tmp_path, *more), f"--out={tmp_path / 'runs'}"]) == 0
    folder = next((tmp_path / "runs").iterdir())
    values = {step: row["raw"] for step, row in lines(folder).items()}
    best = min(values, key=lambda step: values[step])
    assert len(set(values.values())) == 6
    noted = json.loads((folder / "best.json").read_text())
    before = noted.pop("before", None)
    assert noted == {"name": "raw", "value": values[best], "step": best}
    assert before is None or before["value"] == min(value for step, value in values.items() if step < best)
    kept = {int(path.name) for path in (folder / "checkpoints").iterdir()}
    assert kept == {best, 6}
    run = load_run(folder, "best")
    assert Hooks(run).measure(["raw"])[0]["raw"] == pytest.approx(values[best], rel=1e-5)


def test_absent_weights_end_a_run_before_it_begins(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*given(tiny_teacher, "/nowhere.pt", tmp_path), f"--out={tmp_path / 'runs'}"]) == 2
    said = capsys.readouterr().err
    assert "inception-2015-12-05.pt" in said and "nothing lies at /nowhere.pt" in said
    assert not list((tmp_path / "runs").rglob("log.jsonl"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["evals.best=fad"], "evals.best names one of evals.hooks (fid, raw, near), but 'fad' was given"),
        (["evals.hooks.raw.metric=fid"], f"a metric is one of {', '.join(metrics.METRICS)}, but 'fid' was given"),
        (["evals.hooks.raw.every=0"], "every is a number of steps from 1"),
        (["evals.hooks.raw.samples=3"], "samples is at least 24"),
    ],
)
def test_a_wrong_hook_ends_with_one_sentence(
    more: list[str], said: str, tiny_teacher: Path, inception: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*given(tiny_teacher, inception, tmp_path, *more), f"--out={tmp_path / 'runs'}"]) == 2
    assert said in capsys.readouterr().err


def test_a_value_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    evals = SimpleNamespace(best="raw", hooks={"raw": SimpleNamespace(metric="frechet")})
    run: Any = SimpleNamespace(config=SimpleNamespace(evals=evals))
    best = Best(run, tmp_path / "best.json", 0)
    values = [2.0, math.nan, 5.0, math.inf, 1.0]
    found = [best.improved(step, {"raw": value}) for step, value in enumerate(values, 1)]
    assert found == [True, False, False, False, True] and best.step == 5
    (tmp_path / "best.json").write_text('{"name": "raw", "value": NaN, "step": 3}')
    assert Best(run, tmp_path / "best.json", 9).step is None


def test_resumed_hooks_go_on_and_know_the_best(tiny_teacher: Path, inception: Path, tmp_path: Path) -> None:
    command = given(tiny_teacher, inception, tmp_path, "evals.hooks.raw.every=1", "save.every=2", "save.keep=3")
    assert cli.main([*command, f"--out={tmp_path / 'whole'}"]) == 0
    assert cli.main([*command, "steps=4", f"--out={tmp_path / 'parts'}"]) == 0
    whole, parts = next((tmp_path / "whole").iterdir()), next((tmp_path / "parts").iterdir())
    assert cli.main([*command, f"--resume={parts}"]) == 0
    assert lines(parts)[6] == lines(whole)[6]
    assert (parts / "best.json").read_text() == (whole / "best.json").read_text()


COMMAND = """
import sys
from fewstep import cli, finish, hooks
hooks.REFERENCE_SAMPLES, finish.finish = 60, lambda run, folder: None
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(tiny_teacher: Path, inception: Path, tmp_path: Path) -> None:
    """At a rate that moves nothing in float32, for two processes add gradients in another order."""
    (tmp_path / "command.py").write_text(COMMAND)
    still = ("players.generator.lr=1e-30", "players.fake_score.lr=1e-30", "players.generator.weight_decay=0", "steps=3")
    command = given(tiny_teacher, inception, tmp_path, *still)
    assert cli.main([*command, f"--out={tmp_path / 'one'}"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": "."}
    both = [*launch, str(tmp_path / "command.py"), *command, f"--out={tmp_path / 'two'}"]
    done = subprocess.run(both, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    one, two = (lines(next((tmp_path / name).iterdir())) for name in ("one", "two"))
    assert one.keys() == two.keys() == {2, 3}
    for step, row in one.items():
        assert two[step] == pytest.approx(row, rel=1e-6, abs=1e-6)


PROMPTED = """
name: prompted
steps: 2
batch: 4
model: {steps: 1}
objective: {name: dmd2, ratio: 1, gan_weight: 0.0}
players: {generator: {lr: 1.0e-3}, fake_score: {lr: 1.0e-3}}
data: {source: captioned, resolution: 16}
evals:
  every: 0
  samples: 0
  hooks:
    fid: {metric: frechet, extractor: inception, every: 1, samples: 24}
    clip: {metric: clip_score, every: 1, samples: 24}
  best: clip
save: {every: 100, export: false}
"""


def test_a_prompted_run_logs_fid_and_clip_score_and_keeps_the_best(inception: Path, tmp_path: Path) -> None:
    """With the built-in CLIP of scenes, which needs no path."""
    (tmp_path / "prompted.yaml").write_text(PROMPTED)
    tiny.make("sd15").save_pretrained(tmp_path / "teacher")
    given = [f"model.teacher={tmp_path / 'teacher'}", f"evals.hooks.fid.weights={inception}"]
    assert cli.main(["train", str(tmp_path / "prompted.yaml"), *given, f"--out={tmp_path / 'runs'}"]) == 0
    folder = next((tmp_path / "runs").iterdir())
    found = lines(folder)
    assert {step: set(row) for step, row in found.items()} == {1: {"fid", "clip"}, 2: {"fid", "clip"}}
    best = json.loads((folder / "best.json").read_text())
    assert best["value"] == max(row["clip"] for row in found.values())
    said = json.loads((folder / "protocols.json").read_text())
    weights = Path("assets/scenes_clip/open_clip_model.safetensors")
    assert said["clip"]["weights_sha256"] == sha256(weights) and said["clip"]["asked"] == "unseen captions"


def test_a_distance_to_the_teacher_needs_a_teacher() -> None:
    run = SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(teacher=None)))
    with pytest.raises(UserError, match="compares with a teacher, but this run has none"):
        hooks._teacher(run)  # type: ignore[arg-type]

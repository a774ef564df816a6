"""What is made before training: killed at any moment and made again it is the same to the byte, and never mixed up."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data.pictures import damage, picture
from torch import Tensor

from fewstep import build, cli, conditions, config, finish, latents, pairs
from fewstep import store as stores
from fewstep.core.errors import UserError
from fewstep.data.pictures import UNREADABLE
from fewstep.models import tiny
from fewstep.store import Store
from fewstep.train import checkpoint

COUNT = 20
CONFIG = f"""
name: made
steps: 3
batch: 2
model: {{steps: 1, guidance: 2.0}}
objective: {{name: dmd2, ratio: 1, gan_weight: 0.01, regression: 0.25}}
players: {{generator: {{lr: 1.0e-3}}, fake_score: {{lr: 1.0e-3}}}}
data: {{resolution: 16, cache: {COUNT}}}
pairs: {{count: 20, steps: 2}}
evals: {{every: 0, samples: 0}}
save: {{every: 3, export: false}}
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A config that reads latents, prompts and pairs, with a tiny teacher and pictures with captions, some the same."""
    root = tmp_path_factory.mktemp("made")
    (root / "one.yaml").write_text(CONFIG)
    tiny.make("sd15").save_pretrained(root / "teacher")
    (root / "images").mkdir()
    for i in range(COUNT):
        (root / "images" / f"{i:02d}.png").write_bytes(picture(10 * i))
        (root / "images" / f"{i:02d}.txt").write_text(f"disc {i % 15}")
    return [str(root / "one.yaml"), f"model.teacher={root / 'teacher'}", f"data.source={root / 'images'}"]


def small_shards(patch: pytest.MonkeyPatch) -> None:
    """Of four rows, in batches of two."""
    for module in (conditions, latents, pairs):
        patch.setattr(module, "SHARD", 4)
        patch.setattr(module, "BATCH", 2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without the pictures at the end of a run."""
    small_shards(monkeypatch)
    monkeypatch.setattr(finish, "finish", lambda run, folder: None)


def prepare(given: list[str], out: Path, *more: str) -> int:
    return cli.main(["prepare", *given, *more, f"--out={out}"])


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def whole(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted command has made."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        assert prepare(given, out) == 0
    return out


def built(given: list[str], *more: str) -> build.Run:
    return build.build(config.load(given[0], [*given[1:], *more])[0])


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
    assert len(said) == 1
    return said[0]


KILLED = """
import os, signal, sys
from fewstep import cli, conditions, latents, pairs, store
for module in (conditions, latents, pairs):
    module.SHARD, module.BATCH = 4, 2
written, left = store.write_state, int(sys.argv[1])
def write(path, state):
    global left
    left -= 1
    written(path, state)
    if not left:
        path.write_bytes(path.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
store.write_state = write
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_and_made_again_is_the_same_to_the_byte(given: list[str], whole: Path, tmp_path: Path) -> None:
    """By SIGKILL in the middle of a file: of the pairs, and then of the latents."""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    for finished in (2, 7):
        command = [sys.executable, "-c", KILLED, str(3 if finished == 2 else 6), "prepare", *given, f"--out={tmp_path}"]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL
        assert len(list(tmp_path.rglob("*.safetensors"))) == finished and len(list(tmp_path.rglob("*.partial"))) == 1
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert prepare(given, tmp_path) == 0
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())
    assert content(tmp_path) == content(whole) and len(list(whole.rglob("*.safetensors"))) == 5 + 5 + 4


def test_a_finished_folder_is_looked_at_and_repaired(given: list[str], whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    broken = tmp_path / "out" / "latents_20_seed1" / "shard-00003.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"\x55")
    (tmp_path / "out" / "pairs_20x2_seed7" / "shard-00000.safetensors").unlink()
    assert content(tmp_path / "out") != content(whole)
    assert prepare(given, tmp_path / "out") == 0
    assert content(tmp_path / "out") == content(whole)
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert prepare(given, tmp_path / "out") == 0
    assert stamps == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}


def test_training_reads_what_is_prepared(
    given: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same batches as without the folder; nothing is encoded and the teacher is not asked."""
    alone = built(given)
    build.prepare(alone, tmp_path)
    expected = [build.batches(alone)(step)[0] for step in range(2 * COUNT // 2)]
    run = built(given, f"data.prepared={whole}")
    monkeypatch.setattr(pairs, "make_pairs", None)
    monkeypatch.setattr(build.Run, "encode", None)
    monkeypatch.setattr(run.teacher.codec, "encode_prompts", None)
    build.prepare(run, tmp_path / "nothing")
    for step, there in enumerate(expected):
        here = build.batches(run)(step)[0]
        assert here.pair is not None and there.pair is not None and here.x0 is not None and there.x0 is not None
        assert torch.equal(here.x0, there.x0) and torch.equal(here.pair.x0, there.pair.x0)
        assert torch.equal(here.pair.noise, there.pair.noise)
        for mine, theirs in ((here.cond, there.cond), (here.pair.cond, there.pair.cond)):
            assert mine.inputs.keys() == theirs.inputs.keys() and len(mine.inputs) > 0
            assert all(torch.allclose(mine.inputs[name], theirs.inputs[name], atol=1e-6) for name in mine.inputs)
    assert not (tmp_path / "nothing").exists()


def test_trajectories_are_made_with_the_pairs(given: list[str], tmp_path: Path) -> None:
    """The states at the student's steps but the first; stopped and made again they are the same to the byte."""
    lines = [line for line in CONFIG.splitlines() if not line.startswith(("objective", "players", "data"))]
    own = ["objective: {name: rectified_flow, phase: distill, states: teacher}", "data: {resolution: 16}"]
    (tmp_path / "paths.yaml").write_text("\n".join([*lines, *own, "players: {generator: {lr: 1.0e-3}}"]))
    told = (str(tmp_path / "paths.yaml"), *given[1:], "model.steps=3")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert prepare([*told], whole) == 0
    assert {file.name for file in whole.iterdir()} == {"paths_20x2_seed7", "prompts_15"}
    shutil.copytree(whole, stopped)
    for file in sorted((stopped / "paths_20x2_seed7").glob("shard-*"))[2:]:
        file.unlink()
    assert prepare([*told], stopped) == 0 and content(stopped) == content(whole)
    run = built([*told], f"data.prepared={whole}")
    build.prepare(run, tmp_path / "nothing")
    (batch,) = build.batches(run)(0)
    assert batch.pair is not None and batch.pair.path is not None
    assert batch.pair.path.shape == (2, 2, *run.shape)
    assert cli.main(["train", *told, f"data.prepared={whole}", f"--out={tmp_path / 'runs'}"]) == 0


def test_a_run_with_a_prepared_folder_trains_and_resumes(given: list[str], whole: Path, tmp_path: Path) -> None:
    train = ["train", *given, f"data.prepared={whole}", "save.every=1", "save.keep=9"]
    assert cli.main([*train, f"--out={tmp_path}"]) == 0
    run = next(tmp_path.iterdir())
    end = run / "checkpoints" / "0000003"
    expected = checkpoint.sha256(end / "state.safetensors")
    end.rename(tmp_path / "gone")
    assert cli.main([*train, "data.workers=2", "--resume", str(run)]) == 0
    assert checkpoint.sha256(end / "state.safetensors") == expected
    assert not list(run.glob("*_seed*"))


def test_an_interrupted_start_of_a_run_goes_on(
    given: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs and latents of the run folder, as those that are prepared."""
    make, left = pairs.make_pairs, [3]

    def stopped(*args: object, **more: object) -> pairs.Pairs:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return make(*args, **more)  # type: ignore[arg-type]

    run = built(given)
    monkeypatch.setattr(pairs, "make_pairs", stopped)
    with pytest.raises(KeyboardInterrupt):
        build.prepare(run, tmp_path)
    assert left == [0] and len(list(tmp_path.rglob("*.safetensors"))) == 2
    build.prepare(run, tmp_path)
    assert left == [-3]
    expected = {name: file for name, file in content(whole).items() if not name.startswith("prompts")}
    assert content(tmp_path) == expected


def test_a_run_that_was_stopped_before_its_first_checkpoint_is_resumed(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its own folder, with the latents it has; a folder with nothing of a run is not."""
    train, make, seen = ["train", *given, "objective.regression=0", f"--out={tmp_path}"], latents.make, []

    def stopped(encode: object, images: object, rows: Tensor, *more: object) -> dict[str, Tensor]:
        if rows[0] >= 8 and len(seen) == 2:
            seen.append(-1)
            raise KeyboardInterrupt
        seen.append(int(rows[0]))
        return make(encode, images, rows, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(latents, "make", stopped)
    assert cli.main(train) == 130
    assert cli.main([*train, "--resume"]) == 0
    assert seen == [0, 4, -1, 8, 12, 16]
    (run,) = tmp_path.iterdir()
    assert [checkpoint.verify(path)["step"] for path in checkpoint.available(run / "checkpoints")] == [3]
    assert len((run / "log.jsonl").read_text().splitlines()) == 3
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    assert cli.main([*train, "--resume", str(tmp_path / "empty")]) == 2
    assert "nothing to resume" in sentence(capsys)


def test_a_folder_of_other_settings_is_refused(
    given: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(whole)
    assert prepare(given, whole, "model.guidance=3") == 2
    assert "was made by other settings (guidance was 2.0, is 3.0): use another folder, or delete it" in sentence(capsys)
    train = ["train", *given, f"data.prepared={whole}", f"--out={tmp_path / 'runs'}"]
    assert cli.main([*train, "data.resolution=32"]) == 2
    assert "data.resolution was 16, is 32" in sentence(capsys)
    assert cli.main([*train, "pairs.count=8"]) == 2
    assert f"data.prepared={whole} has no pairs_8x2_seed7: make it by fewstep prepare" in sentence(capsys)
    assert content(whole) == before


def test_an_unfinished_folder_is_refused(
    given: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "latents_20_seed1" / "shard-00004.safetensors").unlink()
    given = [*given, f"data.prepared={tmp_path / 'out'}"]
    assert cli.main(["train", *given, f"--out={tmp_path / 'runs'}"]) == 2
    assert "latents_20_seed1 is not finished: fewstep prepare with --out" in sentence(capsys)
    assert cli.main(["prepare", *given]) == 0  # data.prepared is where it belongs
    assert content(tmp_path / "out") == content(whole)


def test_stages_share_what_is_the_same(given: list[str], tmp_path: Path) -> None:
    given = [*given, "stages=[{},{start: {generator: previous.generator}, data: {seed: 2}}]", "steps=1"]
    assert prepare(given, tmp_path / "out") == 0
    made = sorted(str(file.parent.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("index.json"))
    kinds = ["latents_20_seed{}", "pairs_20x2_seed7", "prompts_15"]
    assert made == [f"stage_{i}/{kind.format(i)}" for i in (1, 2) for kind in kinds]  # another order of the captions
    assert cli.main(["train", *given, f"data.prepared={tmp_path / 'out'}", f"--out={tmp_path / 'runs'}"]) == 0
    again = [*given[:-2], "stages=[{},{start: {generator: previous.generator}}]", "steps=1"]
    assert prepare(again, tmp_path / "once") == 0
    assert {file.parents[1].name for file in (tmp_path / "once").rglob("index.json")} == {"stage_1"}


def test_damaged_pictures_are_listed_beside_what_is_made(given: list[str], tmp_path: Path) -> None:
    shutil.copytree(given[2].removeprefix("data.source="), tmp_path / "images")
    lost = damage(tmp_path / "images")
    given = [*given[:2], f"data.source={tmp_path / 'images'}"]
    assert prepare(given, tmp_path / "out") == 0
    assert (tmp_path / "out" / "skipped.txt").read_text().splitlines() == [f"{file}: {UNREADABLE}" for file in lost]


def test_nothing_to_make_is_said(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(["configs/scenes/dmd2.yaml", f"model.teacher={tiny_teacher}"], tmp_path / "out") == 0
    assert "reads nothing that can be made before" in capsys.readouterr().out and not (tmp_path / "out").exists()


def squares(rows: Tensor, progress: Callable[[int], object]) -> dict[str, Tensor]:
    progress(len(rows))
    return {"x": rows[:, None].float().square(), "y": -rows}


def test_rows_are_picked_across_shards(tmp_path: Path) -> None:
    store, seen = Store(tmp_path / "s", "{}", 10, 4), []
    store.fill(squares, seen.append)
    kept = store.tensors()
    assert seen == [4, 4, 2] and kept["x"].shape == (10, 1) and len(kept["y"]) == 10
    assert kept["x"][torch.tensor([9, 0, 4, 9])].flatten().tolist() == [81, 0, 16, 81]
    assert torch.equal(kept["y"][torch.arange(10)], store.read()["y"])


def test_a_full_disk_keeps_the_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, written = Store(tmp_path / "s", "{}", 10, 4), stores.write_state

    def full(path: Path, state: dict[str, Tensor]) -> None:
        if "00002" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(stores, "write_state", full)
        with pytest.raises(UserError, match=r"\(No space left on device\): make room .*, 2 of 3 shards are finished"):
            store.fill(squares, lambda done: None)
    assert store.ours() and not store.finished()
    asked: list[int] = []
    store.fill(lambda rows, progress: asked.extend(rows.tolist()) or squares(rows, progress), lambda done: None)
    assert asked == [8, 9] and store.finished()

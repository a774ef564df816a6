"""A run goes on in another world: other processes, another split of the batch, other workers, changed settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fewstep import cli

LIKE = 2e-5
"""Float32 sums in another order, over four steps, relative; what is no loss (a rate, a count) is the same."""
QUICK = ["batch=4", "save.every=4", "save.export=false", "evals.every=0", "evals.samples=0", "device=cpu"]


def command(teacher: Path, images: Path, *more: str) -> list[str]:
    return ["train", "configs/scenes/dmd2.yaml", f"model.teacher={teacher}", f"data.source={images}", *QUICK, *more]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures: a batch does not end with an epoch."""
    folder = tmp_path_factory.mktemp("images") / "a"
    folder.mkdir()
    for i in range(11):
        Image.new("RGB", (20, 16), (20 * i, 90, 255 - 20 * i)).save(folder / f"{i:02d}.png")
    return folder.parent


def played(out: Path, given: list[str], processes: int = 1) -> Path:
    """The run folder of a command."""
    given = [*given, f"--out={out}"]
    if processes == 1:
        assert cli.main(given) == 0
    else:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        settings = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*start, "-m", "fewstep.cli", *given], env=settings, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    (run,) = out.iterdir()
    return run


@pytest.fixture(scope="module")
def whole(tiny_teacher: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return played(tmp_path_factory.mktemp("whole"), command(tiny_teacher, images, "steps=8"))


@pytest.fixture(scope="module")
def half(tiny_teacher: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run of so many processes, of four steps."""
    made: dict[int, Path] = {}

    def of(processes: int) -> Path:
        if processes not in made:
            out = tmp_path_factory.mktemp(f"half_of_{processes}")
            made[processes] = played(out, command(tiny_teacher, images, "steps=4"), processes)
        return made[processes]

    return of


def losses(run: Path) -> list[dict[str, float]]:
    """What the log has of every step, but for the spread of samples: that is taken within each part of a batch."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    spread = ("/std", "/spread")
    kept = lambda name: name == "step" or ("/" in name and not name.endswith(spread))
    return [{k: v for k, v in row.items() if kept(k)} for row in rows if "resumed" not in row]


@pytest.mark.parametrize(
    "before, after, changes, told",
    [
        (1, 1, ["micro_batches=2"], "micro_batches was 1, is 2"),
        (1, 1, ["data.workers=2"], "data.workers was "),
        pytest.param(1, 2, [], "", marks=pytest.mark.slow),
        pytest.param(2, 1, ["micro_batches=2"], "micro_batches was 1, is 2", marks=pytest.mark.slow),
    ],
    ids=["another split", "other workers", "1 to 2 processes", "2 to 1 and another split"],
)
def test_a_run_goes_on_with_the_same_data_and_losses(
    before: int,
    after: int,
    changes: list[str],
    told: str,
    whole: Path,
    half: Callable[[int], Path],
    tiny_teacher: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "out" / half(before).name
    shutil.copytree(half(before), run)
    given = command(tiny_teacher, images, "steps=8", *changes, "--resume", str(run))
    capsys.readouterr()
    assert played(run.parent, given, after) == run
    if after == 1:
        said = capsys.readouterr().out
        assert "resumed with changes: " in said and "steps was 4, is 8" in said and told in said
    found, expected = losses(run), losses(whole)
    assert {"generator/loss", "fake_score/loss", "fake_score/grad_norm"} <= expected[0].keys()
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(1, 9))
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=LIKE)


def test_what_must_not_change_is_listed_and_refused(
    half: Callable[[int], Path], tiny_teacher: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["batch=8", "model.guidance=2", "data.seed=9", "players.generator.lr=1.0e-5"]
    before = sorted(path.name for path in half(1).rglob("*"))
    assert cli.main(command(tiny_teacher, images, "steps=8", *changes, "--resume", str(half(1)))) == 2
    said = capsys.readouterr().err
    for changed in ("batch was 4, is 8", "model.guidance was 1", "data.seed was "):
        assert changed in said
    assert "resume it with its own, or start a new run" in said and "players.generator.lr" not in said
    assert sorted(path.name for path in half(1).rglob("*")) == before

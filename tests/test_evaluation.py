"""`fewstep eval` over several targets and `fewstep compare`: files, numbers, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import cli
from fewstep.data.source import SceneSource
from fewstep.evals.extractors import ReaderFeatures
from fewstep.evals.frechet import Statistics, frechet_distance
from fewstep.evals.grid import save_grid
from fewstep.measure import truth_of

FLOW = "assets/teachers/scenes-flow"
WORLD = ["--reference", "scenes", "--resolution", "16"]


def evaluated(out: Path, *more: str) -> list[dict]:
    assert cli.main(["eval", *more, f"--out={out}"]) == 0
    return [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Thirty true scenes as PNG files."""
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(SceneSource(16, 77).images(torch.arange(30))):
        save_grid(image[None], tmp_path / "pictures" / f"{i:02d}.png", 1, scale=1)
        with Image.open(tmp_path / "pictures" / f"{i:02d}.png") as framed:
            framed.crop((2, 2, 18, 18)).save(tmp_path / "pictures" / f"{i:02d}.png")
    return tmp_path / "pictures"


def test_models_and_pictures_stand_in_one_table(pictures: Path, tmp_path: Path) -> None:
    few, many, true = evaluated(
        tmp_path, FLOW, "assets/teachers/scenes-vp", str(pictures), *WORLD, "--samples=60", "--steps=2"
    )
    assert (few["name"], few["passes"], true["name"], true["passes"]) == (FLOW, 2, str(pictures), None)
    assert [row["protocols"][0]["samples"] for row in (few, many, true)] == [60, 60, 30]
    shown = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in sorted(pictures.glob("*.png"))])
    features = ReaderFeatures(Path("assets/reader")).features(shown.permute(0, 3, 1, 2).float() / 127.5 - 1)
    expected = frechet_distance(Statistics.of(features), truth_of(SceneSource(16, 0)).statistics)
    assert true["numbers"]["frechet"] == pytest.approx(expected, rel=1e-4)
    assert Image.open(tmp_path / "eval.png").size[0] > 500


def test_a_repeated_evaluation_is_the_same_whatever_the_batch(tmp_path: Path) -> None:
    given = [FLOW, *WORLD, "--samples=50", "--steps=2", "--metrics=frechet,neighbours"]
    one, two, other = (
        evaluated(tmp_path / name, *given, f"--batch={batch}")[0]["numbers"]
        for name, batch in (("a", 20), ("b", 20), ("c", 7))
    )
    assert one == two and other == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([FLOW], "none of these is a run"),
        (["/nowhere", *WORLD], "/nowhere is no run, no pipeline folder and no folder of images"),
        ([FLOW, *WORLD, "--metrics=fid"], "a metric is one of"),
        ([FLOW, *WORLD, "--metrics=teacher_distance"], "measured during a run"),
        ([FLOW, *WORLD, "--extractor=inception"], "inception-2015-12-05.pt"),
        ([FLOW, *WORLD, "--samples=3"], "--samples is 0 for no table, or at least 24"),
    ],
)
def test_mistakes_end_with_one_sentence(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", *given, f"--out={tmp_path / 'evals'}"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "evals").exists()


def test_too_few_pictures_are_refused(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in sorted(pictures.iterdir())[1:]:
        file.unlink()
    assert cli.main(["eval", str(pictures), *WORLD, f"--out={tmp_path / 'evals'}"]) == 2
    assert f"{pictures} has 1 images, but at least 24 are needed" in capsys.readouterr().err


def test_compared_models_see_the_same_noise(tmp_path: Path) -> None:
    """A model beside itself: two equal rows."""
    out = tmp_path / "c.png"
    assert cli.main(["compare", FLOW, FLOW, "--labels", "red disc,blue square", "--count=2", f"--out={out}"]) == 0
    image = np.asarray(Image.open(out)).astype(int)
    rows = image[-2 * 132 : -132, 150:], image[-132:, 150:]
    assert (rows[0] == rows[1]).all() and rows[0].std() > 10


def test_models_that_are_told_other_things_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--out={tmp_path / 'c.png'}"
    assert cli.main(["compare", FLOW, "assets/teachers/scenes-t2i", out]) == 2
    assert "prompts, 4x16x16; 12 labels, 3x16x16" in capsys.readouterr().err

"""The built-in teachers: what is stored beside them is about these weights, and a spot check agrees with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewstep import build, config, measure
from fewstep.data.captioned import rows_of
from fewstep.data.scenes import ATTRIBUTES
from fewstep.data.source import HELD_OUT, SceneSource
from fewstep.evals.attributes import label_accuracy
from fewstep.evals.captions import caption_accuracy
from fewstep.evals.frechet import Statistics, frechet_distance

TEACHERS = ("scenes-flow", "scenes-vp")


@pytest.fixture(params=TEACHERS)
def folder(request: pytest.FixtureRequest) -> Path:
    return Path("assets/teachers") / request.param


def test_weights_are_small_and_the_stored_row_is_theirs(folder: Path) -> None:
    weights = list(folder.rglob("*.safetensors"))
    assert sum(w.stat().st_size for w in weights) < 8e6
    record = json.loads((folder / "evals.json").read_text())
    assert record["weights_sha256"] == measure.weights_sha256(folder)
    assert record["rows"]["2000"]["samples"] == 2000


def test_fifty_steps_draw_what_the_stored_row_says(folder: Path) -> None:
    """96 images at other noise; six standard errors of a binomial share at most."""
    stored = json.loads((folder / "evals.json").read_text())["rows"]["2000"]
    run = build.build(config.load("configs/scenes/dmd2.yaml", [f"model.teacher={folder}"])[0])
    labels = torch.arange(96) % 12
    images = measure.made(run, *measure.teacher(run, 50), 96, seed=5)
    read, _ = measure.reader_of(run.source).read(images)
    expected = stored["label_accuracy"]
    assert abs(label_accuracy(read, labels, ATTRIBUTES) - expected) < 6 * (expected * (1 - expected) / 96) ** 0.5 + 0.02
    assert images.min() >= -1 and images.max() <= 1


def test_truth_is_the_stored_truth() -> None:
    """2,000 fresh scenes lie at the floor that was stored with the statistics.

    They are the scenes that the floor was measured on, so that only rounding is left (1e-8 seen with other threads and
    without oneDNN); those of eight other seeds lie from 2.40 to 3.67.
    """
    truth = measure.truth_of(SceneSource(16, 0))
    source = SceneSource(16, HELD_OUT + 1)
    reader = measure.reader_of(source)
    features = torch.cat([reader.read(source.images(ids))[1] for ids in torch.arange(2000).split(500)])
    floor = json.loads(Path("assets/truth/scenes16.json").read_text())["floor"]["2000"]
    assert frechet_distance(Statistics.of(features), truth.statistics) == pytest.approx(floor, rel=1e-4)
    assert "50000" in truth.protocol


def test_the_text_to_image_teacher_draws_what_it_is_told() -> None:
    """Twenty steps at guidance 2 on 32 unseen captions: at least 29 all right (98.6 % of 500 were, at 50 steps)."""
    folder = Path("assets/teachers/scenes-t2i")
    assert all(w.stat().st_size < 8e6 for w in folder.rglob("*.safetensors"))
    record = json.loads((folder / "evals.json").read_text())
    assert record["weights_sha256"] == measure.weights_sha256(folder)
    assert all(row["one_object"] > 0.85 and row["two_objects"] > 0.6 for row in record["rows"].values())
    run = build.build(config.load("configs/t2i/dmd2.yaml", ["objective.gan_weight=0"])[0])
    images = measure.made(run, *measure.teacher(run, 20), 32, seed=5)
    said = rows_of(run.conditions.names(torch.arange(32)))
    assert caption_accuracy(measure.reader_of(run.source), images, said).all >= 29 / 32


@pytest.mark.slow
def test_the_flow_matching_sibling_draws_what_it_is_told() -> None:
    """Fifteen steps at guidance 2 on 24 unseen captions: at least 21 all right (24 were)."""
    folder = Path("assets/teachers/scenes-t2i-sd3")
    assert all(w.stat().st_size < 8e6 for w in folder.rglob("*.safetensors"))
    assert json.loads((folder / "evals.json").read_text())["weights_sha256"] == measure.weights_sha256(folder)
    given = ["objective.gan_weight=0", f"model.teacher={folder}"]
    run = build.build(config.load("configs/t2i/dmd2.yaml", given)[0])
    images = measure.made(run, *measure.teacher(run, 15), 24, seed=5)
    said = rows_of(run.conditions.names(torch.arange(24)))
    assert caption_accuracy(measure.reader_of(run.source), images, said).all >= 21 / 24

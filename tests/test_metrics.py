"""Metrics: their numbers against direct computation, and that they depend on nothing but the seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import metrics
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.data.source import SceneSource
from fewstep.evals import references
from fewstep.evals.extractors import ReaderFeatures
from fewstep.evals.frechet import Statistics, frechet_distance, kernel_distance
from fewstep.evals.neighbours import neighbours
from fewstep.evals.references import Reference
from fewstep.metrics import Wanted, evaluate
from fewstep.train.live_bytes import LiveBytes

COUNT = 40


class Scenery:
    """True scenes, or scenes with noise on them; what is asked for decides the scene, the row the noise."""

    passes, count = 1, None

    def __init__(self, noise: float, seed: int = 3):
        self.name, self.noise, self.seed, self.source = f"noise {noise}", noise, seed, {"seed": seed}
        self.scenes = SceneSource(16, seed)

    def make(self, rows: Tensor, asked: Tensor) -> Tensor:
        images = self.scenes.images(asked)
        return images + self.noise * Draw(self.seed, 0, rows).normal("noise", tuple(images.shape[1:]))

    def captions(self, asked: Tensor) -> list[str]:
        return self.scenes.captions(asked)


class Lengths:
    """Stands in for a CLIP: a caption is a direction in the plane by its length, an image one by its brightness."""

    name, sha256, resize = "lengths", "0" * 64, "none"

    def features(self, images: Tensor) -> Tensor:
        return self._at(images.mean((1, 2, 3)))

    def texts(self, captions: Any) -> Tensor:
        return self._at(torch.tensor([len(caption) / 4 for caption in captions]))

    def _at(self, angles: Tensor) -> Tensor:
        return torch.stack([angles.cos(), angles.sin()], 1)


def reader() -> ReaderFeatures:
    return ReaderFeatures(Path("assets/reader"))


def wanted() -> list[Wanted]:
    """Every metric there is."""
    extractor = reader()
    real = extractor.features(SceneSource(16, 9).images(torch.arange(COUNT)))
    reference = Reference.of(real, extractor, "scenes")
    parts = {"extractor": extractor, "reference": reference, "clip": Lengths(), "teacher": Scenery(0.0)}
    return [Wanted(name, COUNT, **{need: parts[need] for need in one.needs}) for name, one in metrics.METRICS.items()]


def numbers(batch: int) -> dict[str, float]:
    scores = evaluate(Scenery(0.1), wanted(), batch)
    return {name: value for score in scores for name, value in score.numbers.items()}


def test_each_number_is_that_of_its_definition() -> None:
    found, extractor, ids = numbers(7), reader(), torch.arange(COUNT)
    real = extractor.features(SceneSource(16, 9).images(ids))
    images = Scenery(0.1).make(ids, ids)
    made = extractor.features(images)
    assert found["frechet"] == pytest.approx(frechet_distance(Statistics.of(made), Statistics.of(real)), rel=1e-6)
    assert found["kernel"] == pytest.approx(kernel_distance(real, made), rel=1e-5)
    for name, value in vars(neighbours(real, made, 5)).items():
        assert found[name] == pytest.approx(value, abs=1e-9)
    noise = Draw(3, 0, ids).normal("noise", (3, 16, 16)) * 0.1
    assert found["teacher_distance"] == pytest.approx(noise.square().mean((1, 2, 3)).sqrt().mean().item(), rel=1e-5)
    captions = SceneSource(16, 3).captions(ids)
    angles = images.mean((1, 2, 3)) - torch.tensor([len(caption) / 4 for caption in captions])
    assert found["clip_score"] == pytest.approx(100 * angles.cos().clamp(min=0).mean().item(), rel=1e-5)
    groups = extractor.features(Scenery(0.1).make(ids, ids // 8)).double().split(8)
    spreads = [torch.nn.functional.pdist(group).mean() for group in groups]
    assert found["prompt_diversity"] == pytest.approx(torch.stack(spreads).mean().item(), rel=1e-5)


def test_numbers_do_not_depend_on_the_batch() -> None:
    whole, parts = numbers(COUNT), numbers(3)
    assert whole.keys() == parts.keys() and len(whole) == 9
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-6)


def test_a_protocol_says_what_the_number_is_of() -> None:
    said = {score.protocol["metric"]: score.protocol for score in evaluate(Scenery(0.1), wanted(), 20)}
    frechet = said["frechet"]
    assert frechet["samples"] == frechet["reference_samples"] == COUNT and frechet["seed"] == 3
    assert frechet["extractor"] == "reader" and len(frechet["weights_sha256"]) == len(frechet["reference_sha256"]) == 64
    assert said["neighbours"]["k"] == 5 and said["teacher_distance"]["teacher"] == "noise 0.0"
    assert said["prompt_diversity"]["images of a prompt"] == 8 and "max" in said["clip_score"]["score"]


def test_a_reference_is_stored_with_its_protocol_and_refused_for_other_weights(tmp_path: Path) -> None:
    extractor = reader()
    made = Reference.of(torch.randn(30, 64), extractor, "noise")
    made.save(tmp_path / "noise.npz")
    opened = references.load(tmp_path / "noise.npz", extractor)
    assert opened.sha256 == made.sha256 and opened.protocol == made.protocol
    assert torch.equal(opened.features, made.features) and opened.statistics.count == 30
    assert [file.name for file in tmp_path.iterdir()] == ["noise.npz"]
    with pytest.raises(UserError, match="with other weights than this lengths"):
        references.load(tmp_path / "noise.npz", Lengths())  # type: ignore[arg-type]
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="is no reference of fewstep"):
        references.load(tmp_path / "bad.npz", extractor)


def test_references_are_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    assert references.cached({"a": 1}).parent == tmp_path / "references"
    assert references.cached({"a": 1}) != references.cached({"a": 2})


ALONE = """
import json, torch
from fewstep.train import processes
from tests.test_metrics import numbers
torch.set_num_threads(1)
with processes.started(torch.device("cpu")):
    found = numbers(6)
    if processes.leads():
        print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(ALONE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run([*launch, str(tmp_path / "alone.py")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == pytest.approx(numbers(COUNT), rel=1e-6, abs=1e-6)


class Repeated:
    """As many images of 64x64 as are asked for, without making any: five hundred take turns."""

    name, passes, count, source = "repeated", None, None, {"seed": 0}

    def __init__(self) -> None:
        self.images = torch.rand(500, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def make(self, rows: Tensor, asked: Tensor) -> Tensor:
        return self.images[rows % 500]

    def captions(self, asked: Tensor) -> list[str]:
        return [""] * len(asked)


def frechet_of(count: int, extractor: ReaderFeatures) -> Wanted:
    reference = Reference.of(torch.randn(count, 64), extractor, "noise")
    return Wanted("frechet", count, extractor, reference)


@pytest.mark.slow
def test_ten_thousand_images_cost_hardly_more_than_their_forward_passes() -> None:
    """The Frechet distance of 10,000 images of 64x64: at most 1.2 times the reader alone; the best of three in turn."""
    subject, extractor = Repeated(), ReaderFeatures(Path("assets/caption_reader"))
    one, ratios = frechet_of(10_000, extractor), []
    for _ in range(3):
        began = time.process_time()
        evaluate(subject, [one], 250)
        between = time.process_time()
        for rows in torch.arange(10_000).split(250):
            extractor.features(subject.make(rows, rows))
        ratios.append((between - began) / (time.process_time() - between))
    assert min(ratios) < 1.2


def test_memory_is_flat_in_the_number_of_images() -> None:
    """Ten times the images: more by their features in float64, at most 2 KB an image, not by the 48 KB of each."""
    subject, extractor, peaks = Repeated(), ReaderFeatures(Path("assets/reader")), []
    for count in (200, 2000):
        one = frechet_of(count, extractor)
        with LiveBytes() as live:
            evaluate(subject, [one], 100)
        peaks.append(live.peak.total())
    assert peaks[1] - peaks[0] < 1800 * 256 * 8

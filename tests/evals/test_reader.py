from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from fewstep.data.scenes import ATTRIBUTES, Scenes
from fewstep.evals.reader import Reader, load_reader

FOLDER = Path(__file__).parents[2] / "assets" / "reader"
COUNT = 5000


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_reader(FOLDER)


def test_the_shipped_reader_reads_every_attribute(reader: Reader) -> None:
    scenes = Scenes(16, 123_456).sample(torch.arange(COUNT))
    right = reader.read(scenes.images)[0] == scenes.attributes
    assert (right.double().mean(0) >= 0.99).all()


def test_it_reads_rare_scenes(reader: Reader) -> None:
    scenes = Scenes(16, 654_321).sample(torch.arange(40_000))
    attributes = scenes.attributes
    rare = (attributes[:, 5] == 2) & ((attributes[:, 4] == 2) | (attributes[:, 2] == 1))
    assert rare.sum() > 100
    right = reader.read(scenes.images[rare])[0] == attributes[rare]
    assert (right.double().mean(0) >= 0.97).all()


def test_it_reads_other_resolutions(reader: Reader) -> None:
    scenes = Scenes(64, 77).sample(torch.arange(500))
    right = reader.read(scenes.images)[0] == scenes.attributes
    assert (right.double().mean(0) >= 0.99).all()


def test_it_bears_a_little_noise(reader: Reader) -> None:
    scenes = Scenes(16, 78).sample(torch.arange(1000))
    torch.manual_seed(0)
    right = reader.read(scenes.images + 0.1 * torch.randn_like(scenes.images))[0] == scenes.attributes
    assert (right.double().mean(0) >= 0.98).all()


def test_features_have_the_stated_shape_and_repeat(reader: Reader) -> None:
    images = Scenes(16, 79).sample(torch.arange(1003)).images
    attributes, features = reader.read(images)
    assert attributes.shape == (1003, 6) and attributes.dtype == torch.int64
    assert features.shape == (1003, 64) and features.dtype == torch.float32
    assert torch.equal(features, reader.read(images)[1])
    assert not reader.training


def test_the_protocol_describes_the_shipped_weights(reader: Reader) -> None:
    protocol = json.loads((FOLDER / "reader.json").read_text())
    weights = (FOLDER / "reader.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == protocol["sha256"]
    assert len(weights) <= 1_000_000
    assert reader.attributes == ATTRIBUTES
    assert min(protocol["accuracy"].values()) >= 0.99
    assert min(protocol["recall"].values()) >= 0.97


def test_an_absent_reader_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train_reader"):
        load_reader(tmp_path)

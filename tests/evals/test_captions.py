from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from fewstep.data.captioned import ATTRIBUTES, CaptionedScenes, canonical, rows_of
from fewstep.evals.captions import caption_accuracy
from fewstep.evals.reader import Reader, load_reader

FOLDER = Path(__file__).parents[2] / "assets" / "caption_reader"


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_reader(FOLDER)


def test_the_shipped_reader_reads_captioned_scenes(reader: Reader) -> None:
    scenes, ids = CaptionedScenes(64, 123_456), torch.arange(2000)
    images = scenes.images(ids)
    whole = caption_accuracy(reader, images, canonical(scenes.attributes(ids)))
    assert min(whole.attributes.values()) >= 0.99
    said = caption_accuracy(reader, images, rows_of(scenes.captions(ids)))
    assert said.one >= 0.99 and said.two >= 0.98
    assert said.one >= said.all >= said.two


def test_it_bears_a_little_noise(reader: Reader) -> None:
    scenes, ids = CaptionedScenes(64, 78), torch.arange(1000)
    torch.manual_seed(0)
    images = scenes.images(ids)
    noisy = images + 0.1 * torch.randn_like(images)
    assert caption_accuracy(reader, noisy, rows_of(scenes.captions(ids))).all >= 0.97


def test_images_of_other_captions_are_wrong(reader: Reader) -> None:
    scenes, ids = CaptionedScenes(64, 5), torch.arange(500)
    swapped = caption_accuracy(reader, scenes.images(ids), rows_of(scenes.captions(ids + 500)))
    assert swapped.one < 0.15 and swapped.two < 0.05


def test_what_is_unsaid_asks_for_nothing(reader: Reader) -> None:
    images = CaptionedScenes(64, 5).of_attributes(torch.arange(9), rows_of(["a large red ring"] * 9).clamp(min=0))
    for sentence, share in (("a red ring", 1.0), ("a large ring", 1.0), ("a ring", 1.0), ("a small ring", 0.0)):
        accuracy = caption_accuracy(reader, images, rows_of([sentence] * 9))
        assert accuracy.all == accuracy.one == share and math.isnan(accuracy.two)


def test_the_two_ways_to_say_a_relation_are_the_same(reader: Reader) -> None:
    row = rows_of(["a small red disc left of a large blue square"]).expand(20, -1)
    images = CaptionedScenes(64, 9).of_attributes(torch.arange(20), row)
    assert caption_accuracy(reader, images, rows_of(["a large blue square right of a red disc"] * 20)).two == 1
    assert caption_accuracy(reader, images, rows_of(["a large blue square left of a red disc"] * 20)).two == 0


def test_there_must_be_a_row_for_each_image(reader: Reader) -> None:
    with pytest.raises(ValueError, match="3 images need 3 rows"):
        caption_accuracy(reader, torch.zeros(3, 3, 64, 64), rows_of(["a disc"]))


def test_the_protocol_describes_the_shipped_weights(reader: Reader) -> None:
    protocol = json.loads((FOLDER / "reader.json").read_text())
    weights = (FOLDER / "reader.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == protocol["sha256"]
    assert len(weights) <= 4_000_000
    assert reader.attributes == ATTRIBUTES
    assert min(protocol["accuracy"].values()) >= 0.99
    assert protocol["captions"]["two"] >= 0.98
    assert protocol["date"] and protocol["commit"]

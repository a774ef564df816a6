from __future__ import annotations

import hashlib
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.data.altered import CHANGES, altered, holds
from fewstep.data.captioned import CaptionedScenes, canonical, caption
from fewstep.evals.clip import Clip

FOLDER = Path(__file__).parents[2] / "assets" / "scenes_clip"
CONFIG, WEIGHTS = FOLDER / "open_clip_config.json", FOLDER / "open_clip_model.safetensors"
SCENES, COUNT = CaptionedScenes(64, 123_456), 600


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(FOLDER)


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def by_hand(images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Features of bytes (N,3,H,W) and of captions, as open_clip's own example has it."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
    model.eval()
    with torch.no_grad():
        seen = model.encode_image(torch.stack([preprocess(picture) for picture in pictures(images)]))
        read = model.encode_text(open_clip.get_tokenizer(f"local-dir:{FOLDER}")(captions))
    return seen / seen.norm(dim=-1, keepdim=True), read / read.norm(dim=-1, keepdim=True)


def test_the_score_is_what_open_clip_gives(clip: Clip) -> None:
    ids = torch.arange(24)
    images, captions = ((SCENES.images(ids) + 1) * 127.5).round().byte(), SCENES.captions(ids.roll(8))
    captions[:8] = SCENES.captions(ids[:8])
    seen, read = by_hand(images, captions)
    cosines = (seen * read).sum(1)
    assert (cosines < 0).any() and (cosines > 0).any()
    score = clip.score(images / 127.5 - 1, captions)
    assert score == pytest.approx((100 * cosines).clamp(min=0).mean().item(), abs=1e-4, rel=1e-5)
    torch.testing.assert_close(clip.features(images / 127.5 - 1), seen, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.texts(captions), read, atol=1e-5, rtol=0)


def test_other_sizes_are_brought_to_its_own_as_open_clip_does(clip: Clip) -> None:
    images = CaptionedScenes(150, 5).images(torch.arange(8))[:, :, :120].mul(127.5).add(127.5).round().byte()
    seen, _ = by_hand(images, [""])
    assert (clip.features(images / 127.5 - 1) * seen).sum(1).min() > 0.999


def test_the_score_does_not_depend_on_the_batch(clip: Clip) -> None:
    ids = torch.arange(70)
    images, captions = SCENES.images(ids), SCENES.captions(ids)
    parts = [clip.score(images[i : i + 7], captions[i : i + 7]) for i in range(0, 70, 7)]
    assert clip.score(images, captions) == pytest.approx(sum(parts) / 10, rel=1e-6)


def test_features_have_the_stated_shape(clip: Clip) -> None:
    features = clip.features(SCENES.images(torch.arange(5)))
    assert features.shape == (5, clip.width) and features.dtype == torch.float32
    assert torch.allclose(features.norm(dim=1), torch.ones(5), atol=1e-5)
    assert clip.name == "scenes_clip" and "bicubic" in clip.resize and "64" in clip.resize


@pytest.fixture(scope="module")
def right(clip: Clip) -> tuple[Tensor, Tensor]:
    """Features of held-out scenes and their cosines with the right captions."""
    ids = torch.arange(COUNT)
    features = clip.features(SCENES.images(ids))
    return features, (features * clip.texts(SCENES.captions(ids))).sum(1)


def ranked(clip: Clip, right: tuple[Tensor, Tensor], rows: Tensor) -> float:
    """The share of scenes for which `rows` is wrong that have the right caption ranked above it."""
    wrong = ~holds(canonical(SCENES.attributes(torch.arange(COUNT))), canonical(rows))
    assert wrong.sum() > 150
    cosines = (right[0] * clip.texts([caption(row) for row in rows.tolist()])).sum(1)
    return (right[1] > cosines)[wrong].double().mean().item()


def test_it_ranks_the_right_caption_above_another_one(clip: Clip, right: tuple[Tensor, Tensor]) -> None:
    assert ranked(clip, right, SCENES.said(torch.arange(COUNT)).roll(1, 0)) >= 0.97


@pytest.mark.parametrize("change", CHANGES)
def test_it_ranks_the_right_caption_above_an_altered_one(clip: Clip, right: tuple[Tensor, Tensor], change: str) -> None:
    ids = torch.arange(COUNT)
    assert ranked(clip, right, altered(SCENES.said(ids), change, Draw(7, 0, ids))) >= 0.95


def test_the_protocol_describes_the_shipped_weights(clip: Clip) -> None:
    protocol = json.loads((FOLDER / "clip.json").read_text())
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == protocol["sha256"] == clip.sha256
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8_000_000
    assert protocol["another"]["ranked"] >= 0.95
    assert set(protocol["altered"]) == set(CHANGES)


def test_an_architecture_and_a_file_give_the_same_network(clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "scenes-architecture.json").write_text(json.dumps(json.loads(CONFIG.read_text())["model_cfg"]))
    open_clip.add_model_config(tmp_path)
    other = Clip("scenes-architecture", WEIGHTS)
    assert torch.equal(other.texts(["a red disc"]), clip.texts(["a red disc"]))
    assert other.name == "scenes-architecture" and other.sha256 == clip.sha256
    assert "0.48145466" in other.resize


def test_it_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    for door in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, door, refused)
    assert Clip(FOLDER).width == 128
    with pytest.raises(UserError, match="Hub"):
        Clip("roberta-ViT-B-32", WEIGHTS)


def copied(folder: Path, **changed: bytes | None) -> Path:
    """The shipped files in `folder` with some of them of other content or, for None, absent."""
    for file in (CONFIG, WEIGHTS):
        shutil.copy(file, folder)
    for name, content in changed.items():
        file = folder / {"config": CONFIG, "weights": WEIGHTS}[name].name
        file.unlink() if content is None else file.write_bytes(content)
    return folder


def sentence(source: Path | str, weights: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        Clip(source, weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_absent_files_are_named_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    absent = tmp_path / "absent"
    assert str(absent / CONFIG.name) in sentence(absent)
    assert str(tmp_path / WEIGHTS.name) in sentence(copied(tmp_path, weights=None))
    assert str(tmp_path / CONFIG.name) in sentence(copied(tmp_path, config=None))
    assert str(absent) in sentence("ViT-B-32", absent)


@pytest.mark.parametrize("kept", [0, 100, 100_000, -1000])
def test_damaged_weights_are_refused(tmp_path: Path, kept: int) -> None:
    said = sentence(copied(tmp_path, weights=WEIGHTS.read_bytes()[:kept]))
    assert str(tmp_path / WEIGHTS.name) in said and "cannot be read" in said


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"model_cfg": 3}', b'{"model_cfg": {"text_cfg": 3}}', b"\xff"]
)
def test_a_damaged_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    said = sentence(copied(tmp_path, config=content))
    assert str(tmp_path / CONFIG.name) in said and "no configuration" in said


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    config = json.loads(CONFIG.read_text())
    config["model_cfg"]["text_cfg"]["width"] = 64
    assert "cannot be read as a CLIP" in sentence(copied(tmp_path, config=json.dumps(config).encode()))


def test_an_unknown_architecture_is_refused() -> None:
    assert "did you mean 'ViT-B-32'" in sentence("ViT-B-332", WEIGHTS)
    assert "knows no architecture 'hf-hub:someone/clip'" in sentence("hf-hub:someone/clip", WEIGHTS)


def test_there_must_be_a_caption_for_each_image(clip: Clip) -> None:
    with pytest.raises(ValueError, match="2 images need 2 captions"):
        clip.score(torch.zeros(2, 3, 64, 64), ["a disc"])


def told(folder: Path, **changed: dict[str, Any]) -> Path:
    """The shipped CLIP in `folder`, with more in parts of its configuration."""
    described = json.loads(CONFIG.read_text())
    for part, more in changed.items():
        described["model_cfg"][part] |= more
    return copied(folder, config=json.dumps(described).encode())


@pytest.mark.parametrize("kwargs", [{"trust_remote_code": True}, {"use_fast": False, "clean": "lower"}, ["code"]])
def test_a_folder_tells_the_tokenizer_nothing_that_brings_code(tmp_path: Path, kwargs: Any) -> None:
    (tmp_path / "tok.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Tok: pass\n")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tok.Tok", null]}}')
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    said = sentence(told(tmp_path, text_cfg={"hf_tokenizer_name": "x", "tokenizer_kwargs": kwargs}))
    assert f"{tmp_path / CONFIG.name} tells the tokenizer" in said and "strip_sep_token; remove the rest" in said
    assert not (tmp_path / "mark").exists()


def test_a_tokenizer_of_its_own_brings_no_code(tmp_path: Path) -> None:
    (tmp_path / "tok.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Tok: pass\n")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tok.Tok", null]}}')
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    assert "cannot be read as a CLIP" in sentence(told(tmp_path, text_cfg={"hf_tokenizer_name": "x"}))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("seen", [{"timm_model_name": "hf-hub:a/b"}, {"timm_model_pretrained": True}])
def test_a_folder_has_timm_fetch_nothing(tmp_path: Path, seen: dict[str, Any]) -> None:
    assert "would have timm fetch its image model" in sentence(told(tmp_path, vision_cfg=seen))

"""Extractors against the libraries whose protocol they follow, and their refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.data.scenes import Scenes
from fewstep.evals.extractors import Dinov2, Inception, ReaderFeatures, as_bytes, open_extractor
from tests.faults import weights

CPU = torch.device("cpu")


class Layers(nn.Module):
    """Stands in for Inception's layers: 2048 features that depend on every third of the picture."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.pool, self.linear = nn.AdaptiveAvgPool2d(4), nn.Linear(48, 2048)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(x).flatten(1))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the interface of inception-2015-12-05.pt, in a folder where clean-fid looks for that name."""
    file = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    torch.jit.save(torch.jit.script(Base()), str(file))
    return file


def images(count: int, side: int) -> Tensor:
    return Scenes(side, 0).sample(torch.arange(count)).images


def test_inception_sees_what_clean_fid_shows_it(inception: Path) -> None:
    """Resizing and scaling included: features of the same bytes agree to 1e-5 of the largest."""
    shown = images(3, 48)
    resize = build_resizer("clean")
    bytes_ = as_bytes(shown).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    resized = torch.from_numpy(np.stack([resize(picture) for picture in bytes_])).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = InceptionV3W(str(inception.parent), download=False)(resized)
    ours = Inception(inception, CPU).features(shown)
    assert ours.shape == (3, 2048) and (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_bytes_are_those_of_a_png() -> None:
    values = torch.tensor([-1.2, -1.0, -0.999, 0.0, 1.0, 1.3])
    assert as_bytes(values).tolist() == [0, 0, 0, 128, 255, 255]


def test_dinov2_is_the_class_token_of_normalised_pixels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    net = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    net.save_pretrained(tmp_path)
    shown = images(2, 224)  # of the network's size, so that nothing is resized
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        theirs = net(((as_bytes(shown) / 255) - mean) / std).last_hidden_state[:, 0]
    extractor = Dinov2(tmp_path, CPU)
    assert torch.allclose(extractor.features(shown), theirs, atol=1e-5)
    assert extractor.sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_features_are_those_of_each_image_alone(inception: Path) -> None:
    shown = images(4, 16)
    for extractor in (Inception(inception, CPU), ReaderFeatures(Path("assets/reader"))):
        apart = torch.cat([extractor.features(image[None]) for image in shown])
        assert torch.allclose(extractor.features(shown), apart, rtol=1e-5, atol=1e-5)


def test_what_is_absent_or_wrong_ends_with_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt .* but no path was given"):
        open_extractor("inception", None, CPU)
    with pytest.raises(UserError, match=r"but nothing lies at /nowhere\.pt"):
        open_extractor("inception", "/nowhere.pt", CPU)
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        open_extractor("dinov2", str(tmp_path), CPU)
    with pytest.raises(UserError, match="one of reader, clip, inception, dinov2"):
        open_extractor("vgg", None, CPU)
    (tmp_path / "broken.pt").write_bytes(b"not a network")
    with pytest.raises(UserError, match="is not the TorchScript file of Inception"):
        open_extractor("inception", str(tmp_path / "broken.pt"), CPU)
    (tmp_path / "model.safetensors").write_bytes(b"not a network")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is no folder of a DINOv2"):
        open_extractor("dinov2", str(tmp_path), CPU)


def test_a_dinov2_without_one_of_its_weights_is_refused(tmp_path: Path) -> None:
    weights.make_dinov2(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({name: value for name, value in state.items() if name != "layernorm.weight"}, file)
    with pytest.raises(UserError, match=r"1 of its weights are missing, layernorm\.weight among them"):
        open_extractor("dinov2", str(tmp_path), torch.device("cpu"))

"""Networks that turn images into features to compare: the reader of scenes, Inception, DINOv2 and, in clip.py, CLIP.

A distance between features is comparable only where extractor, weights and resizing are the same, so each says what it
is. Weights are read from the path that the user gives and never fetched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep import reading
from fewstep.core.errors import UserError
from fewstep.evals.reader import load_reader


class Extractor(Protocol):
    """`features(images)`: images (N, 3, H, W) in [-1, 1] -> (N, D) float32, each image by itself."""

    name: str
    sha256: str
    """of the weights"""
    resize: str
    """how an image is brought to the size that the network takes, in words"""

    def features(self, images: Tensor) -> Tensor: ...


class TextExtractor(Extractor, Protocol):
    """One whose features of images and of texts, all of length 1, can be compared."""

    def texts(self, captions: Sequence[str]) -> Tensor: ...


class ReaderFeatures:
    """The built-in reader of a world of scenes, from its folder."""

    resize = "bilinear with antialiasing to the reader's side, not rounded to bytes"

    def __init__(self, folder: Path):
        self.reader = load_reader(folder)
        self.name, self.sha256 = folder.name, sha256(folder / "reader.safetensors")

    def features(self, images: Tensor) -> Tensor:
        return self.reader.read(images)[1]


class Inception:
    """Inception v3 as clean-fid reads it: bytes, resized to 299 by PIL's bicubic filter, the 2048 pooled features.

    `weights` is the TorchScript file inception-2015-12-05.pt of StyleGAN2-ADA, whose parts are called `layers`.
    """

    name = "inception"
    resize = "rounded to bytes, bicubic with antialiasing to 299x299 in float, clamped (clean-fid's `clean`)"

    def __init__(self, weights: Path, device: torch.device):
        self.device = device
        try:
            reading.unpacks(weights)
            self.sha256 = sha256(weights)
            self.layers = torch.jit.load(str(weights), map_location=device).eval().layers
        except Exception as error:
            raise UserError(f"{weights} is not the TorchScript file of Inception: {_first_line(error)}") from None

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        pixels = as_bytes(images).to(self.device)
        pixels = F.interpolate(pixels, (299, 299), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        return self.layers((pixels - 128) / 128).reshape(len(images), -1).float().cpu()


class Dinov2:
    """The class token of a DINOv2 in transformers' format: bytes, resized to 224 by the bicubic filter, normalised.

    `weights` is the folder with its config.json and model.safetensors; the protocol is that of FD-DINOv2 (Stein et
    al. 2023).
    """

    name = "dinov2"
    resize = "rounded to bytes, bicubic with antialiasing to 224x224, normalised by ImageNet's mean and deviation"
    _MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, weights: Path, device: torch.device):
        from transformers import Dinov2Model

        self.device, file = device, weights / "model.safetensors"
        try:
            reading.safetensors(file)
            reading.described(weights / "config.json")
            net, told = Dinov2Model.from_pretrained(
                weights, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            if lacking := sorted(map(str, (*told["missing_keys"], *told["mismatched_keys"]))):
                raise ValueError(f"{len(lacking)} of its weights are missing, {lacking[0]} among them")
        except Exception as error:
            raise UserError(f"{weights} is no folder of a DINOv2: {_first_line(error)}") from None
        self.sha256 = sha256(file)
        self.net: Any = net.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        pixels = as_bytes(images).to(self.device)
        pixels = F.interpolate(pixels, (224, 224), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (self._MEAN, self._STD))
        return self.net((pixels / 255 - mean) / std).last_hidden_state[:, 0].float().cpu()


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as the whole numbers from 0 to 255, float32, that a PNG file holds."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255)


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_EXPECTED: dict[str, str] = {
    "inception": "the TorchScript file inception-2015-12-05.pt (StyleGAN2-ADA's, which clean-fid uses)",
    "dinov2": "the folder of a DINOv2 in transformers' format, with config.json and model.safetensors",
}
_MAKERS: dict[str, Callable[[Path, torch.device], Extractor]] = {"inception": Inception, "dinov2": Dinov2}


def open_extractor(name: str, weights: str | None, device: torch.device) -> Extractor:
    """`inception` or `dinov2` with `weights` from a local path; `clip` is opened by `fewstep.evals.clip`.

    Raises UserError, which says what is expected where, when they are not there; nothing is downloaded.
    """
    if name not in _MAKERS:
        raise UserError(f"an extractor is one of reader, clip, {', '.join(_MAKERS)}, but '{name}' was given")
    if weights is None or not Path(weights).exists():
        found = "no path was given" if weights is None else f"nothing lies at {weights}"
        raise UserError(f"the extractor {name} needs {_EXPECTED[name]} as its weights, but {found}: fetch it once")
    if name == "dinov2" and not (Path(weights) / "model.safetensors").is_file():
        raise UserError(f"the extractor dinov2 needs {_EXPECTED[name]}, but {weights} has no model.safetensors")
    return _MAKERS[name](Path(weights), device)

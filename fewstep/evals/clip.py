"""CLIP through open_clip, from files alone: features of images and of captions, and the CLIP score."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import reading
from fewstep.core.errors import UserError

_CONFIG, _WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_BATCH = 64
_TOKENIZER = {"clean", "strip_sep_token", "language"}
"""what a folder may tell open_clip's tokenizer; the rest would go to transformers, code to be trusted among it"""


class Clip:
    """A CLIP in eval mode and float32, whose images are prepared as its own numbers say.

    `source` is a folder with open_clip_config.json and open_clip_model.safetensors; or, with a file of `weights`, the
    name of one of open_clip's architectures, as ViT-B-32. Nothing is downloaded: UserError says what is missing where.

    `name` is that of the folder or architecture, `sha256` the hash of the weights, `resize` how images are brought to
    its side and scale, `width` the number of features D.
    """

    def __init__(
        self, source: Path | str, weights: Path | str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        folder = Path(source) if weights is None else None
        file = Path(source) / _WEIGHTS if weights is None else Path(weights).resolve()
        for needed in (folder / _CONFIG, file) if folder else (file,):
            if not needed.is_file():
                raise UserError(f"the CLIP {source} needs the file {needed}: put it there, for nothing is downloaded")
        _refuse_hub(str(source), folder)
        if folder:
            _refuse_code(folder)
        self.name, self._device = Path(source).resolve().name, torch.device(device)
        with _refused(file):
            self._model, self._tokenizer = _load(str(source), folder, str(file))
            self._model.to(device).eval().requires_grad_(False)
            self._prepare, self.resize = _preparation(self._model.visual.preprocess_cfg)
            self.width = self.texts([""]).shape[1]
            self.features(torch.zeros(1, 3, 8, 8))  # numbers that no image can be prepared by are known at once
        with file.open("rb") as stream:
            self.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N,D) float32 of length 1 on the CPU, of images (N,3,H,W) in [-1,1]; beyond that they are clamped."""
        chunks = [self._prepare(chunk.to(self._device)) for chunk in images.split(_BATCH)]
        return torch.cat([self._model.encode_image(chunk, normalize=True).cpu() for chunk in chunks])

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """(N,D) float32 of length 1 on the CPU; what does not fit into the model's context is cut off."""
        chunks = self._tokenizer(list(captions)).to(self._device).split(_BATCH)
        return torch.cat([self._model.encode_text(chunk, normalize=True).cpu() for chunk in chunks])

    def score(self, images: Tensor, captions: Sequence[str]) -> float:
        """The mean of max(100 cos, 0) over images (N,3,H,W) in [-1,1] and their captions; larger is better.

        CLIP-S of Hessel et al. (2021) with w = 100, as it is usually reported, in place of the paper's 2.5, and with no
        prompt before the caption. Raises ValueError when there is not one caption for each image.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images need {len(images)} captions, not {len(captions)}.")
        cosines = (self.features(images) * self.texts(captions)).sum(1)
        return (100 * cosines).clamp(min=0).double().mean().item()


def _refuse_hub(source: str, folder: Path | None) -> None:
    """Raises UserError for an architecture that open_clip does not know or of which it would fetch a part."""
    text = _of_folder(folder) if folder else _of_architecture(source)
    if text.get("hf_model_name") or (not folder and text.get("hf_tokenizer_name")):
        raise UserError(
            f"the CLIP {source} would fetch its text model or tokenizer from the Hub, and nothing is downloaded here: "
            "take one with open_clip's own, as ViT-B-32, or a folder that holds the tokenizer's files too"
        )


def _refuse_code(folder: Path) -> None:
    """Raises UserError for a folder whose parts would bring code, or have timm fetch weights."""
    told, seen = _of_folder(folder).get("tokenizer_kwargs") or {}, _of_folder(folder, "vision_cfg")
    if not isinstance(told, dict) or (foreign := sorted(set(told) - _TOKENIZER)):
        foreign = foreign if isinstance(told, dict) else [told]
        raise UserError(
            f"{folder / _CONFIG} tells the tokenizer {reading.shown(', '.join(map(str, foreign)), 100)}: allowed in "
            f"tokenizer_kwargs are {', '.join(sorted(_TOKENIZER))}; remove the rest"
        )
    if seen.get("timm_model_pretrained") or ":" in str(seen.get("timm_model_name", "")):
        raise UserError(
            f"{folder / _CONFIG} would have timm fetch its image model, and nothing is downloaded here: take a CLIP "
            f"whose weights are all in {_WEIGHTS}"
        )


def _of_folder(folder: Path, part: str = "text_cfg") -> dict[str, Any]:
    """The description of one part of the model in a folder. Raises UserError."""
    try:
        return dict(reading.described(folder / _CONFIG)["model_cfg"][part])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / _CONFIG} is no configuration of open_clip: {type(error).__name__}, {error}"
        ) from error


def _of_architecture(name: str) -> dict[str, Any]:
    """The description of the text model of an architecture. Raises UserError."""
    import open_clip

    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), 1)
        hint = f"did you mean '{near[0]}'?" if near else "open_clip.list_models() has their names"
        raise UserError(f"open_clip knows no architecture '{name}': {hint}")
    return open_clip.get_model_config(name)["text_cfg"]


def _load(source: str, folder: Path | None, file: str) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    import open_clip

    name, weights = (f"local-dir:{folder}", None) if folder else (source, file)
    model = open_clip.create_model(name, weights, require_pretrained=True)
    return model, open_clip.get_tokenizer(name, **_unlinked(folder))


@contextmanager
def _refused(file: Path) -> Iterator[None]:
    """A damaged file fails in any of several libraries, each with errors of its own: one sentence for all."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"the weights {file} cannot be read as a CLIP: {reason}") from error


def _unlinked(folder: Path | None) -> dict[str, bool]:
    """What keeps transformers from code and from the Hub, where a folder has one of its tokenizers."""
    own = folder is not None and _of_folder(folder).get("hf_tokenizer_name")
    return {"trust_remote_code": False, "local_files_only": True} if own else {}


def _preparation(numbers: dict[str, Any]) -> tuple[Callable[[Tensor], Tensor], str]:
    """What open_clip's transforms make of images in [-1,1], and how they do it in words. Raises UserError."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if numbers["resize_mode"] == "longest":
        raise UserError("a CLIP with resize_mode 'longest' pads its images; allowed here: shortest, squash")
    *frame, normalise = image_transform_v2(PreprocessCfg(**numbers), is_train=False).transforms

    def prepare(images: Tensor) -> Tensor:
        images = (images.float() / 2 + 0.5).clamp(0, 1)
        for step in frame:
            images = step(images)
        return normalise(images.clamp(0, 1))

    words = "{interpolation}, antialiased, {resize_mode} side to {size}, mean {mean}, std {std}"
    return prepare, words.format_map(numbers)

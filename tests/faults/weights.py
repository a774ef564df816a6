"""Sound examples of networks, LoRA files and tables from somebody else, the smallest that there are."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fewstep.data.table import TableSource
from fewstep.evals.clip import Clip
from fewstep.evals.extractors import Dinov2
from fewstep.models import lora_files, tiny

_HALF = [0.5, 0.5, 0.5]
_CLIP = {
    "model_cfg": {
        "embed_dim": 2,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 4, "head_width": 2, "patch_size": 4},
        "text_cfg": {"context_length": 4, "vocab_size": 49408, "width": 1, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {"mean": _HALF, "std": _HALF, "interpolation": "bicubic", "resize_mode": "shortest", "size": 8},
}


def make_clip(folder: Path) -> None:
    from open_clip.model import CLIP

    net = CLIP(*_CLIP["model_cfg"].values())  # type: ignore[arg-type]
    save_file({name: value.half() for name, value in net.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(_CLIP))


def read_clip(folder: Path) -> None:
    clip = Clip(folder)
    clip.score(torch.zeros(1, 3, 9, 7), ["a disc"])


def make_dinov2(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "mlp_ratio": 1, "image_size": 28}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)


def read_dinov2(folder: Path) -> None:
    Dinov2(folder, torch.device("cpu")).features(torch.zeros(1, 3, 8, 8))


@functools.cache
def _pipeline() -> Any:
    return tiny.make("sd15")


def make_lora(folder: Path) -> None:
    layers = {f"unet.{name}": layer for name, layer in _pipeline().unet.named_modules() if name.endswith("attn1.to_q")}
    name, layer = next(iter(layers.items()))
    halves = {"A": torch.ones(2, layer.in_features), "B": torch.ones(layer.out_features, 2)}
    save_file({f"{name}.lora_{half}.weight": value for half, value in halves.items()}, folder / "lora.safetensors")


def read_lora(folder: Path) -> None:
    pipeline = copy.deepcopy(_pipeline())
    lora_files.fuse(pipeline, pipeline.unet, str(folder / "lora.safetensors"))


def make_table(folder: Path, pictures: list[bytes]) -> None:
    import datasets

    kinds = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["a", "b"]),
    }
    rows = {
        "image": [{"bytes": content, "path": None} for content in pictures],
        "text": ["a disc", *([None] * (len(pictures) - 1))],
        "label": [i % 2 for i in range(len(pictures))],
    }
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).save_to_disk(folder)


def read_table(folder: Path) -> None:
    source, ids = TableSource(str(folder), 4, 0), torch.arange(2)
    source.images(ids), source.captions(ids), source.label_of(ids)

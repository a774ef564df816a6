"""The codec of a pipeline: of one that is open, or of one in a folder or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from fewstep.core.errors import UserError
from fewstep.models import loading
from fewstep.models.codec import Codec
from fewstep.models.experts import models_of
from fewstep.models.families import CODECS


def _family(name: str) -> type[Codec]:
    if name not in CODECS:
        raise UserError(f"fewstep has no codec for the pipeline '{name}': it can use {', '.join(CODECS)}")
    return CODECS[name]


def codec_of(pipeline: Any) -> Codec:
    """The codec of a diffusers pipeline that is already built; freezes its encoders and its VAE.

    Raises UserError for another family or a component that is not there.
    """
    return _family(type(pipeline).__name__)(pipeline)


def open_codec(
    source: str, revision: str | None = None, dtype: torch.dtype = torch.float32, weights: bool = True
) -> Codec:
    """The codec of the pipeline in a folder or of a hub id; its denoiser is only shaped and costs no memory.

    `dtype` is that of the text encoders: some of the VAEs overflow in half precision, so they are float32. Without
    `weights` all of its networks are only shaped, on the meta device.
    Raises UserError where nothing is found, for another family and for a component that is not there.
    """
    found = loading.find(source, revision)
    name = str(found.index.get("_class_name"))
    family = _family(name)
    named = [part for part in found.index if found.class_of(part)]
    family.refuse_absent(f"the pipeline at {source}", _lying(found.source, named), named)
    for part in named:
        loading.check(found.source, part, None, found.where)
    shaped = loading.denoiser(found, weights=False)
    lacking = {part: None for part in family.MAY_LACK if part not in named}
    shapes = {} if weights else {part: _shape(found, part, dtype) for part in named if part.startswith(_NETWORKS)}
    pipeline = loading.pretrained(
        getattr(diffusers, name),
        found.source,
        dtype={"default": dtype, "vae": torch.float32},
        use_safetensors=True,
        **dict(zip(found.parts, models_of(shaped.net), strict=True)),
        **{"scheduler": shaped.scheduler, **shapes, **lacking, **family.UNUSED, **found.where},
    )
    return family(pipeline)


_NETWORKS = ("vae", "text_encoder")


def _shape(pipeline: loading.Pipeline, part: str, dtype: torch.dtype) -> nn.Module:
    shape = loading.shape_of(pipeline, part)
    return shape if part == "vae" else shape.to(dtype)


def _lying(source: str, named: list[str]) -> list[str]:
    """The components that are there; the hub's are known only once they are asked for."""
    folder = Path(source)
    return [part for part in named if (folder / part).is_dir()] if folder.is_dir() else named

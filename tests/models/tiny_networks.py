"""A tiny random network of each of the five diffusers classes, as a Backbone with something to ask it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.schedule import Flow
from fewstep.models import tiny
from fewstep.models.codecs import codec_of
from fewstep.models.diffusers import DiffusersBackbone

CLASSES = ("unet2d", "dit", "unet2d_condition", "sd3", "wan")
T = torch.tensor([0.3, 0.8])


def _unet2d() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=[8, 8],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=5,
    )


def _dit() -> nn.Module:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 3, "num_embeds_ada_norm": 4}
    return diffusers.DiTTransformer2DModel(in_channels=3, out_channels=6, sample_size=8, patch_size=2, **sizes)


@functools.cache
def _made(name: str) -> tuple[nn.Module, Tensor, Condition]:
    if name in ("unet2d", "dit"):
        torch.manual_seed(0)
        net = (_unet2d() if name == "unet2d" else _dit()).eval()
        return net, torch.randn(2, 3, 8, 8), Condition({"class_labels": torch.tensor([0, 3])})
    pipeline: Any = tiny.make({"unet2d_condition": "sd15"}.get(name, name))
    net = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    codec = codec_of(pipeline)
    shape = codec.latent_shape(16, 16, 5 if name == "wan" else None)
    return net, torch.randn(2, *shape), codec.encode_prompts(["a red cat", "two dogs"])


def ask(name: str) -> tuple[DiffusersBackbone, Tensor, Condition]:
    """A backbone of its own on the flow process, an input (2, *S) and a condition; the same numbers every time."""
    net, x, cond = _made(name)
    return DiffusersBackbone(copy.deepcopy(net).requires_grad_(), Flow(), "flow_prediction"), x.clone(), cond

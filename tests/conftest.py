"""Seeds, one thread, no network, and the tiny networks and processes that many tests share."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.core.schedule import EDM, VP, Flow, NoiseSchedule, Trig, vp_from_betas

torch.set_num_threads(1)

PROCESSES: dict[str, NoiseSchedule] = {
    "vp_linear": vp_from_betas("linear", 1e-4, 0.02),
    "vp_scaled": vp_from_betas("scaled_linear", 0.00085, 0.012),
    "vp_zero_snr": vp_from_betas("scaled_linear", 0.00085, 0.012, zero_terminal_snr=True),
    "flow": Flow(),
    "edm": EDM(),
    "trig": Trig(),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=PROCESSES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    """Every forward process, one after the other."""
    return PROCESSES[request.param]


@pytest.fixture
def processes() -> dict[str, NoiseSchedule]:
    """Every forward process by name."""
    return PROCESSES


@pytest.fixture
def vp() -> VP:
    """The process of most latent VP teachers."""
    vp = PROCESSES["vp_scaled"]
    assert isinstance(vp, VP)
    return vp


@pytest.fixture
def tiny_unet() -> Callable[..., nn.Module]:
    """Makes random UNet2DModels of 19 thousand weights, 8x8 pixels, 4 classes and a null class."""
    import diffusers

    def make(seed: int = 0, **changes: Any) -> nn.Module:
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": [8, 8],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            "num_class_embeds": 5,
        }
        return diffusers.UNet2DModel(**{**sizes, **changes}).eval()

    return make


@pytest.fixture
def tiny_dit() -> Callable[..., nn.Module]:
    """Makes random DiTs of two blocks with a learned variance, 8x8 pixels, 4 classes and the null class."""
    import diffusers

    def make(seed: int = 0, **changes: Any) -> nn.Module:
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 3,
            "out_channels": 6,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 4,
        }
        return diffusers.DiTTransformer2DModel(**{**sizes, **changes}).eval()

    return make


@pytest.fixture(scope="session")
def tiny_sizes() -> dict[str, Any]:
    """The arguments of a UNet2DModel with the shapes of the built-in teachers and few weights."""
    return {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8, 8, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "num_class_embeds": 13,
    }


@pytest.fixture(scope="session")
def tiny_teacher(tiny_sizes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random flow teacher for 16x16 scenes, as a pipeline folder."""
    import diffusers

    from fewstep.models import schedulers

    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**tiny_sizes)
    diffusers.ConsistencyModelPipeline(unet=net, scheduler=schedulers.flow_scheduler()).save_pretrained(folder)
    return folder

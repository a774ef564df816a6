"""The tiny pipelines of the text families, their own loops, and the same steps by our backbone and codec."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.schedule import VP
from fewstep.models import schedulers, tiny
from fewstep.models.backbone import Guided
from fewstep.models.codec import Codec
from fewstep.models.codecs import codec_of
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.loading import part_of

FAMILIES = tuple(tiny.MAKERS)
PROMPTS = ["a red cat", "two dogs"]
T = torch.tensor([0.3, 0.8])


def denoiser(pipeline: Any) -> nn.Module:
    return getattr(pipeline, part_of(pipeline))


def video(pipeline: Any) -> bool:
    return isinstance(pipeline, diffusers.WanPipeline)


def backbone_of(pipeline: Any, negative: str = "") -> DiffusersBackbone:
    schedule, kind = schedulers.read(pipeline.scheduler)
    row = codec_of(pipeline).unconditional(negative)
    return DiffusersBackbone(denoiser(pipeline), schedule, kind, unconditional=row)


def sized(pipeline: Any) -> dict[str, int]:
    """The size that the tiny networks and the default conditions are made for."""
    return {"height": 16, "width": 16, **({"num_frames": 5} if video(pipeline) else {})}


def noise_for(pipeline: Any) -> Tensor:
    shape = codec_of(pipeline).latent_shape(16, 16, 5 if video(pipeline) else None)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))


def asked(pipeline: Any) -> tuple[DiffusersBackbone, Tensor, Condition]:
    """The backbone of a pipeline and something to ask it."""
    return backbone_of(pipeline), noise_for(pipeline), codec_of(pipeline).encode_prompts(PROMPTS)


def their_walk(pipeline: Any, steps: int, negative: str | None, **given: Any) -> list[Tensor]:
    """The latents after every step of the pipeline's own loop."""
    seen: list[Tensor] = []

    def keep(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].clone())
        return tensors

    pipeline(
        PROMPTS,
        negative_prompt=None if negative is None else [negative] * len(PROMPTS),
        num_inference_steps=steps,
        output_type="latent",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents"],
        **{"guidance_scale": 5.0, "latents": noise_for(pipeline), **sized(pipeline), **given},
    )
    return seen


def our_walk(pipeline: Any, steps: int, negative: str | None) -> list[Tensor]:
    """The latents after every step of the pipeline's scheduler with our guided backbone."""
    return walk(backbone_of(pipeline, negative or ""), codec_of(pipeline), pipeline.scheduler, steps)


@torch.no_grad()
def walk(backbone: DiffusersBackbone, codec: Codec, scheduler: Any, steps: int) -> list[Tensor]:
    guided, cond, seen = Guided(backbone, 5.0), codec.encode_prompts(PROMPTS), []
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    x = noise_for(codec.pipeline) * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        told = (timestep + 1 if isinstance(guided.schedule, VP) else timestep) / 1000
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        value = guided(scaled, told.float().expand(len(x)), cond).value
        x = scheduler.step(value, timestep, x, return_dict=False)[0]
        seen.append(x)
    return seen

"""The tiny pipelines of the text families, their own loops, and the same steps by our backbone and codec."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.schedule import VP
from fewstep.models import schedulers, tiny
from fewstep.models.backbone import Guided
from fewstep.models.codec import Codec
from fewstep.models.codecs import codec_of
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.loading import network_of

FAMILIES = tuple(tiny.MAKERS)
PROMPTS = ["a red cat", "two dogs"]
T = torch.tensor([0.3, 0.8])
SIDE, FRAMES = 16, 9


def denoiser(pipeline: Any) -> nn.Module:
    return network_of(pipeline)


def backbone_of(pipeline: Any, negative: str = "") -> DiffusersBackbone:
    schedule, kind = schedulers.read(pipeline.scheduler)
    row = codec_of(pipeline).unconditional(negative)
    return DiffusersBackbone(denoiser(pipeline), schedule, kind, unconditional=row)


def sized(pipeline: Any) -> dict[str, int]:
    """The size that the tiny networks and the default conditions are made for."""
    return {"height": SIDE, "width": SIDE, **({"num_frames": FRAMES} if codec_of(pipeline).VIDEOS else {})}


def shape_of(codec: Codec) -> tuple[int, ...]:
    """Of one sample of that size."""
    return codec.latent_shape(SIDE, SIDE, FRAMES if codec.VIDEOS else None)


def noise_for(pipeline: Any) -> Tensor:
    return torch.randn(2, *shape_of(codec_of(pipeline)), generator=torch.Generator().manual_seed(1))


def asked(pipeline: Any) -> tuple[DiffusersBackbone, Tensor, Condition]:
    """The backbone of a pipeline and something to ask it."""
    return backbone_of(pipeline), noise_for(pipeline), codec_of(pipeline).encode_prompts(PROMPTS)


def their_walk(pipeline: Any, steps: int, negative: str | None, guidance: float = 5.0) -> list[Tensor]:
    """The latents after every step of the pipeline's own loop."""
    codec, seen = codec_of(pipeline), []
    asked, step = codec.guided_by(guidance), pipeline.scheduler.step
    if negative is None and "true_cfg_scale" in asked:
        negative = ""  # such a pipeline does not guide without one
    if guidance > 1:
        asked["negative_prompt"] = None if negative is None else [negative] * len(PROMPTS)

    @functools.wraps(step)
    def kept(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        seen.append(codec.unpacked(found[0].clone(), shape_of(codec)))
        return found

    pipeline.scheduler.step = kept
    latents = codec.packed(noise_for(pipeline))
    try:
        pipeline(PROMPTS, num_inference_steps=steps, output_type="latent", latents=latents, **sized(pipeline), **asked)
    finally:
        del pipeline.scheduler.step
    return seen


def our_walk(pipeline: Any, steps: int, negative: str | None) -> list[Tensor]:
    """The latents after every step of the pipeline's scheduler with our guided backbone."""
    return walk(backbone_of(pipeline, negative or ""), codec_of(pipeline), pipeline.scheduler, steps)


@torch.no_grad()
def walk(backbone: DiffusersBackbone, codec: Codec, scheduler: Any, steps: int) -> list[Tensor]:
    guided, cond, seen = Guided(backbone, 5.0), codec.encode_prompts(PROMPTS), []
    scheduler = copy.deepcopy(scheduler)
    given: dict[str, Any] = {"sigmas": np.linspace(1, 1 / steps, steps)} if codec.EVEN_SIGMAS else {}
    if scheduler.config.get("use_dynamic_shifting"):
        given["mu"] = math.log(codec.time_shift(scheduler, shape_of(codec)))
    scheduler.set_timesteps(steps, **given)
    x = noise_for(codec.pipeline) * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        told = (timestep + 1 if isinstance(guided.schedule, VP) else timestep) / 1000
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        value = guided(scaled, told.float().expand(len(x)), cond).value
        x = scheduler.step(value, timestep, x, return_dict=False)[0]
        seen.append(x)
    return seen

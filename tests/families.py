"""The tiny pipelines of the text families, their own loops, and the same steps by our backbone and codec."""

from __future__ import annotations

import copy
import functools
import inspect
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
LABELS, NULL = [0, 3], 1000


def denoiser(pipeline: Any) -> nn.Module:
    return network_of(pipeline)


def backbone_of(pipeline: Any, negative: str = "") -> DiffusersBackbone:
    schedule, kind = schedulers.read(pipeline.scheduler)
    codec = codec_of(pipeline)
    if not codec.PROMPTED:
        return DiffusersBackbone(denoiser(pipeline), schedule, kind, null_label=NULL)
    return DiffusersBackbone(denoiser(pipeline), schedule, kind, unconditional=codec.unconditional(negative))


def told(codec: Codec) -> Condition:
    """Two prompts, or two labels."""
    if not codec.PROMPTED:
        return Condition({"class_labels": torch.tensor(LABELS)})
    return codec.encode_prompts(PROMPTS, size=(side_of(codec), side_of(codec)))


def side_of(codec: Codec) -> int:
    """Of the squares that are made, in pixels."""
    return max(SIDE, codec.MULTIPLE)


def sized(pipeline: Any) -> dict[str, int]:
    """The size that is asked of a pipeline."""
    codec = codec_of(pipeline)
    return dict.fromkeys(("height", "width"), side_of(codec)) | ({"num_frames": FRAMES} if codec.VIDEOS else {})


def shape_of(codec: Codec) -> tuple[int, ...]:
    """Of one sample of that size."""
    return codec.latent_shape(side_of(codec), side_of(codec), FRAMES if codec.VIDEOS else None)


def noise_for(pipeline: Any) -> Tensor:
    return torch.randn(2, *shape_of(codec_of(pipeline)), generator=torch.Generator().manual_seed(1))


def asked(pipeline: Any) -> tuple[DiffusersBackbone, Tensor, Condition]:
    """The backbone of a pipeline and something to ask it."""
    return backbone_of(pipeline), noise_for(pipeline), told(codec_of(pipeline))


def starting(pipeline: Any) -> dict[str, Any]:
    """The arguments of a pipeline's call that ask for two samples, from the noise of `noise_for`."""
    codec = codec_of(pipeline)
    if not codec.PROMPTED:
        return {"class_labels": LABELS, "generator": torch.Generator().manual_seed(1)}
    return {"prompt": list(PROMPTS), "latents": codec.packed(noise_for(pipeline)), **sized(pipeline)}


def takes_negatives(pipeline: Any) -> bool:
    """Whether its call can be told what guidance leads away from."""
    return "negative_prompt" in inspect.signature(pipeline.__call__).parameters


def their_walk(pipeline: Any, steps: int, negative: str | None, guidance: float = 5.0) -> list[Tensor]:
    """The latents after every step of the pipeline's own loop."""
    codec, seen = codec_of(pipeline), []
    asked, step = codec.guided_by(guidance), pipeline.scheduler.step
    if negative is None and "true_cfg_scale" in asked:
        negative = ""  # such a pipeline does not guide without one
    if guidance > 1 and negative is not None and takes_negatives(pipeline):
        asked["negative_prompt"] = [negative] * len(PROMPTS)

    @functools.wraps(step)
    def kept(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        seen.append(codec.unpacked(found[0][: len(PROMPTS)].clone(), shape_of(codec)))  # DiT's are there twice
        return found

    pipeline.scheduler.step = kept
    try:
        pipeline(**starting(pipeline), num_inference_steps=steps, output_type="latent", **asked)
    finally:
        del pipeline.scheduler.step
    return seen


def our_walk(pipeline: Any, steps: int, negative: str | None) -> list[Tensor]:
    """The latents after every step of the pipeline's scheduler with our guided backbone."""
    negative = (negative or "") if takes_negatives(pipeline) else ""
    return walk(backbone_of(pipeline, negative), codec_of(pipeline), pipeline.scheduler, steps)


@torch.no_grad()
def walk(backbone: DiffusersBackbone, codec: Codec, scheduler: Any, steps: int) -> list[Tensor]:
    # What guides is asked by another scale in another way.
    guides = codec.guided_by(5.0) != codec.guided_by(1.0)
    guided, cond, seen = Guided(backbone, 5.0 if guides else 1.0), told(codec), []
    scheduler = copy.deepcopy(scheduler)
    given: dict[str, Any] = {"sigmas": np.linspace(1, 1 / steps, steps)} if codec.EVEN_SIGMAS else {}
    if scheduler.config.get("use_dynamic_shifting"):
        given["mu"] = math.log(codec.time_shift_in(scheduler, shape_of(codec), steps))
    scheduler.set_timesteps(steps, **given)
    x = noise_for(codec.pipeline) * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        t = (timestep + 1 if isinstance(guided.schedule, VP) else timestep) / 1000
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        value = guided(scaled, t.float().expand(len(x)), cond).value
        x = scheduler.step(value, timestep, x, return_dict=False)[0]
        seen.append(x)
    return seen

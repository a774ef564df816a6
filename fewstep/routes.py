"""The stock diffusers pipelines a student can be saved as, and how each is walked to see that it was saved right."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from fewstep.build import Run
from fewstep.carried import carry, is_carried
from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.models.backbone import Routed
from fewstep.models.codec import Codec
from fewstep.models.codecs import codec_of
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.experts import models_of
from fewstep.models.loading import parts_of
from fewstep.rollout import COUNT


class Pixels:
    """A class-conditional network on pixels, as ConsistencyModelPipeline."""

    tag = "unconditional-image-generation"

    def pipeline(self, net: nn.Module, scheduler: Any, cast: Callable[[nn.Module], nn.Module]) -> Any:
        return diffusers.ConsistencyModelPipeline(unet=net, scheduler=scheduler)

    def walk(self, pipeline: Any, steps: int) -> Tensor:
        """What the pipeline makes of the noise of seed 0, not clamped: (1, C, H, W)."""
        states: list[Tensor] = []
        pipeline(
            class_labels=[0] if self._labelled(pipeline) else None,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            callback=lambda i, t, x: states.append(x),
        )
        return states[-1]

    def told(self, pipeline: Any) -> Condition:
        """What `walk` told the network."""
        return Condition({"class_labels": torch.zeros(1, dtype=torch.long)} if self._labelled(pipeline) else {})

    def _labelled(self, pipeline: Any) -> bool:
        return pipeline.unet.config.num_class_embeds is not None


def draws(scheduler: Any) -> bool:
    """Whether the scheduler needs noise for which its pipeline hands it no generator, as those of flows do not."""
    if is_carried(scheduler):
        said = scheduler.config
        return said.use_flow_sigmas and not said.again and any(row[-1] for row in said.table)
    return type(scheduler).__name__ == "FlowMatchLCMScheduler"


def draw_from(pipeline: Any, generator: torch.Generator) -> None:
    """Lets a scheduler that renoises draw from `generator`: pipelines of flows leave it to the global one."""
    if draws(pipeline.scheduler):
        pipeline.scheduler.step = partial(pipeline.scheduler.step, generator=generator)


class Prompted:
    """A network that reads prompts, as its teacher's own pipeline with everything around the denoiser."""

    tag = "text-to-image"

    def __init__(self, codec: Codec, size: tuple[int, int], frames: int | None, tokens: int | None):
        self.codec, self.teacher, self.size, self.frames = codec, codec.pipeline, size, frames
        self.tokens = {} if tokens is None else {"max_sequence_length": tokens}
        if frames is not None:
            self.tag = "text-to-video"

    def pipeline(self, net: nn.Module, scheduler: Any, cast: Callable[[nn.Module], nn.Module]) -> Any:
        parts, denoisers = self.teacher.components, parts_of(self.teacher)
        around = {k: cast(part) for k, part in parts.items() if isinstance(part, nn.Module) and k not in denoisers}
        parts = {**around, **dict(zip(denoisers, models_of(net), strict=True)), "scheduler": scheduler}
        # Unasked, `from_pipe` turns every part into float32.
        return type(self.teacher).from_pipe(self.teacher, dtype=next(net.parameters()).dtype, **parts)

    def walk(self, pipeline: Any, steps: int) -> Tensor:
        """What the pipeline makes of an empty prompt and the noise of seed 0: latents (1, *S)."""
        height, width = self.size
        generator = torch.Generator().manual_seed(0)
        draw_from(pipeline, generator)
        latents = pipeline(
            prompt="",
            height=height,
            width=width,
            **({} if self.frames is None else {"num_frames": self.frames}),
            num_inference_steps=steps,
            generator=generator,
            output_type="latent",
            return_dict=False,
            **self.codec.guided_by(1.0),
            **self.tokens,
        )[0]
        return self.codec.unpacked(latents, self.codec.latent_shape(height, width, self.frames))

    def told(self, pipeline: Any) -> Condition:
        """What `walk` told the network."""
        return codec_of(pipeline).like(self.codec).encode_prompts([""], size=self.size)


class Latents:
    """A class-conditional network on latents, as its teacher's own pipeline."""

    tag = "unconditional-image-generation"

    def __init__(self, codec: Codec):
        self.codec = codec

    def pipeline(self, net: nn.Module, scheduler: Any, cast: Callable[[nn.Module], nn.Module]) -> Any:
        teacher = self.codec.pipeline
        return type(teacher)(net, cast(teacher.vae), scheduler)

    def walk(self, pipeline: Any, steps: int) -> Tensor:
        """What the pipeline makes of label 0 and the noise of seed 0: latents (1, *S)."""
        states: list[Tensor] = []
        step = pipeline.scheduler.step

        @wraps(step)
        def kept(*args: Any, **kwargs: Any) -> Any:
            moved = step(*args, **kwargs)
            states.append(moved[0] if isinstance(moved, tuple) else moved.prev_sample)
            return moved

        pipeline.scheduler.step = kept
        generator = torch.Generator().manual_seed(0)
        pipeline([0], num_inference_steps=steps, generator=generator, output_type="np", **self.codec.guided_by(1.0))
        del pipeline.scheduler.step
        return states[-1]

    def told(self, pipeline: Any) -> Condition:
        """What `walk` told the network."""
        return Condition({"class_labels": torch.zeros(1, dtype=torch.long)})


Route = Pixels | Latents | Prompted


def exportable(run: Run) -> DiffusersBackbone:
    """The generator without adapters, if stock diffusers can run it. Raises UserError with the reason."""
    backbone = run.evaluated()
    if isinstance(backbone, Routed):
        raise UserError(
            f"a generator of {len(backbone.experts)} experts has no stock diffusers pipeline: train with "
            "model.experts=1 to export, or sample with fewstep"
        )
    if not isinstance(backbone, DiffusersBackbone):
        raise UserError(f"a {type(backbone).__name__} has no stock diffusers pipeline: sample with fewstep")
    if run.rollout.two_times and len(run.rollout) > 1:
        raise UserError(
            f"this network is told where each of its {len(run.rollout)} steps ends, for which stock diffusers has no "
            "input: set model.steps=1 to export, or sample with fewstep"
        )
    backbone = backbone.fused()
    if run.rollout.two_times:
        backbone = backbone.folded("to", 0.0)
    if run.rollout.count:
        backbone = backbone.folded(COUNT, 1 / run.rollout.count)
    for name, value in run.rollout.tells.items():
        backbone = backbone.folded(name, value)
    if told := ", ".join(name for name in backbone.dials if name not in run.objective.dials):
        raise UserError(
            f"this network is told more than the time ({told}), for which stock diffusers has no input: "
            "sample with fewstep"
        )
    return backbone


def route_of(run: Run, net: nn.Module) -> Route:
    """The pipeline that runs `net`. Raises UserError where there is none."""
    if run.teacher.codec is not None and not run.teacher.prompted:
        return Latents(run.teacher.codec)
    if run.teacher.codec is not None:
        side, frames = run.config.data.resolution, run.config.data.frames
        return Prompted(run.teacher.codec, (side, side), frames, run.config.model.max_sequence_length)
    if not isinstance(net, diffusers.UNet2DModel):
        raise UserError(
            f"no stock diffusers pipeline runs a {type(net).__name__} on pixels (DiTPipeline needs a VAE): "
            "use a UNet2DModel to export, or sample with fewstep"
        )
    return Pixels()


def left_out(pipeline: Any) -> dict[str, None]:
    """The parts that `pipeline` does without and `from_pretrained` has to be told so, as keyword arguments.

    Stable Diffusion 3 without its third text encoder is such a one.
    """
    return {
        k: None for k, part in pipeline.components.items() if part is None and k not in pipeline._optional_components
    }


def save_plainly(pipeline: Any, folder: Path) -> None:
    """Writes `pipeline` so that an unasked `from_pretrained` opens it in float32, whatever it is stored in.

    diffusers turns its own networks into float32, but transformers opens a text encoder in the precision that its
    config names, and the pipeline would then mix two. Where the parts came from stays out of their configs.
    """
    pipeline.save_pretrained(folder)
    if is_carried(pipeline.scheduler):
        carry(folder)
    for name, node in json.loads((folder / "model_index.json").read_text()).items():
        config = folder / name / "config.json"
        if isinstance(node, list) and config.is_file():
            said = json.loads(config.read_text())
            said.pop("_name_or_path", None)
            said |= {"dtype": "float32"} if node[0] == "transformers" else {}
            config.write_text(json.dumps(said, indent=2) + "\n")


def stock(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `net` on the CPU in `dtype`. Raises UserError for weights that are not finite in it."""
    # diffusers' own `to` warns about modules to keep in float32, even where there are none.
    net = nn.Module.to(copy.deepcopy(net).cpu().eval().requires_grad_(False), dtype)
    if not all(weight.isfinite().all() for weight in net.state_dict().values()):
        raise UserError(f"the weights are not finite in {dtype}: export in torch.float32, or an earlier checkpoint")
    return net

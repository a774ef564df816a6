"""A generator that was trained as a LoRA, as LoRA files beside its fused export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewstep import reading
from fewstep.build import Run
from fewstep.models.experts import TimeExperts
from fewstep.models.loading import named, part_of
from fewstep.models.lora import Factors

BOTH = "pytorch_lora_weights.safetensors"
"""goes onto the plain teacher; the name that `load_lora_weights` looks for in a folder"""
EXPERTS = ("high_noise_lora_weights.safetensors", "low_noise_lora_weights.safetensors")
"""of a pipeline with two experts, one for each"""
ALONE = "distillation_lora_weights.safetensors"
"""goes onto a teacher that wears model.lora"""


def write(run: Run, pipeline: Any, folder: Path, dtype: torch.dtype) -> None:
    """Puts the LoRA files of the evaluated generator into `folder`, if it is a LoRA that diffusers can load."""
    for name, parts in _files(run).items():
        from fewstep.models import lora_files

        lora_files.write(pipeline, folder, parts, dtype, name)


def _files(run: Run) -> dict[str, dict[str, Factors]]:
    """File -> what each part of the pipeline gains by it."""
    codec, net = run.teacher.codec, run.evaluated()
    if run.config.players["generator"].lora is None or codec is None or not codec.PROMPTED:
        return {}
    from fewstep.models import lora_files  # peft, which only adapters need

    learned = lora_files.factors_of(net.net, net.voice)  # type: ignore[arg-type]
    assert learned is not None
    part = part_of(codec.pipeline)
    if isinstance(net.net, TimeExperts):
        return {file: {part: _of_expert(i, learned)} for i, file in enumerate(EXPERTS)}
    own = {part: learned}
    if run.config.model.lora is None:
        return {BOTH: own}
    gained = run.teacher.gained
    return {ALONE: own} | ({BOTH: lora_files.added(gained, own)} if gained is not None else {})


def _of_expert(index: int, learned: Factors) -> Factors:
    prefix = f"experts.{index}."
    return {name.removeprefix(prefix): pair for name, pair in learned.items() if name.startswith(prefix)}


def how(run: Run) -> str:
    """What a model card says of the files; empty for a generator that is no LoRA."""
    if run.config.players["generator"].lora is None:
        return ""
    if not run.teacher.prompted:
        net = type(run.teacher.net).__name__
        return (
            f"## As a LoRA\n\nThe LoRA is fused into the weights and not a file, for diffusers loads none into a {net}."
        )
    worn, scheduler = run.config.model.lora, type(run.scheduler).__name__
    if run.scheduler is None:
        opened = 'DiffusionPipeline.from_pretrained(".", trust_remote_code=True).scheduler'
    else:
        opened = f'{scheduler}.from_pretrained(".", subfolder="scheduler")'
    code = "\n".join(
        [
            f"from diffusers import DiffusionPipeline{'' if run.scheduler is None else f', {scheduler}'}\n",
            f"pipeline = DiffusionPipeline.from_pretrained({_quoted(run.config.model.teacher)})  # the teacher",
            f"pipeline.scheduler = {opened}  # this folder",
            *_loads(run),
        ]
    )
    notes = ["Then it is sampled as above."] if worn is None else _notes(run, named(worn))
    return "\n\n".join([f"## As a LoRA\n\n```python\n{code}\n```", *notes])


def _quoted(place: str | None) -> str:
    return reading.literal(named(str(place)))


_EXPERTS = [
    f'pipeline.load_lora_weights(".", weight_name="{EXPERTS[0]}", adapter_name="high")',
    f'pipeline.load_lora_weights(".", weight_name="{EXPERTS[1]}", adapter_name="low", load_into_transformer_2=True)',
]
_ONE = 'pipeline.load_lora_weights(".")'


def _loads(run: Run) -> list[str]:
    """The lines that put the LoRA onto the teacher."""
    worn = run.config.model.lora
    if isinstance(run.teacher.net, TimeExperts):
        return _EXPERTS
    return [_ONE] if worn is None or run.teacher.gained is not None else _two(worn, run.config.model.lora_scale)


def _two(worn: str, scale: float) -> list[str]:
    return [
        f'pipeline.load_lora_weights({_quoted(worn)}, adapter_name="worn")',
        f'pipeline.load_lora_weights(".", weight_name="{ALONE}", adapter_name="distillation")',
        f'pipeline.set_adapters(["worn", "distillation"], [{scale:g}, 1.0])',
    ]


def _notes(run: Run, worn: str) -> list[str]:
    own = f"`{ALONE}` is the distillation alone: it goes onto a teacher that wears `{worn}`"
    if run.teacher.gained is None:
        return [f"{own}, as above. One file of both cannot be made, for `{worn}` is not of low-rank products alone."]
    scale = f"at a scale of {run.config.model.lora_scale:g}"
    return [f"`{BOTH}` is `{worn}` {scale} and the distillation, for the plain teacher.", f"{own} {scale}."]

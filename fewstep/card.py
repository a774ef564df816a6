"""The model card of an export: a header that is read again, what this is, how to sample it with diffusers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from fewstep import adapter, reading
from fewstep.build import Run
from fewstep.carried import is_carried, scheduler_of
from fewstep.core.errors import UserError
from fewstep.models import hub
from fewstep.models.loading import locate, named
from fewstep.routes import Pixels, draws, left_out

CARD = "README.md"


def card(run: Run, dtype: torch.dtype, tag: str = Pixels.tag, licence: str | None = None) -> str:
    """The model card: YAML header, what this is, how to sample it with diffusers alone."""
    model = run.config.model
    header = ModelCardData(
        library_name="diffusers",
        license=licence or _licence(model.teacher, model.revision),
        base_model=named(model.teacher) if model.teacher else None,
        pipeline_tag=tag,
        tags=["fewstep", *(["few-step", "distillation"] if _distilled(run) else [])],
        num_inference_steps=len(run.rollout),
        max_sequence_length=model.max_sequence_length,
        embedded_guidance=model.embedded_guidance,
        resolution=run.config.data.resolution if run.teacher.codec else None,
        num_frames=run.config.data.frames,
        id2label=dict(enumerate(run.source.labels)) or None,
        null_label=run.teacher.null_label,
    )
    rows = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _facts(run, dtype).items())])
    told = "\n\n".join(part for part in (rows, _how(run), adapter.how(run)) if part)
    return f"---\n{header.to_yaml()}\n---\n\n# {run.config.name}\n\n{told}\n"


def _facts(run: Run, dtype: torch.dtype) -> dict[str, str]:
    config, model, player = run.config, run.config.model, run.players["generator"]
    steps, side = len(run.rollout), config.data.resolution
    kept = "EMA of the weights" if config.players["generator"].ema else "last weights"
    method = f"`{config.objective.name}` with fewstep"  # type: ignore[attr-defined]
    origin = "teacher" if _distilled(run) or not model.teacher else "started from"
    facts = {origin: f"`{named(model.teacher)}`" if model.teacher else "none: trained from data"}
    if model.lora:
        facts[origin] += f" with the LoRA `{named(model.lora)}` at a scale of {model.lora_scale:g}"
    facts["method"] = f"{method}, {player.moves} optimizer steps, {kept}, stored in {str(dtype).split('.')[-1]}"
    frames = f", {config.data.frames} frames" if config.data.frames else ""
    facts["images"] = f"{side} x {side} pixels{frames}, trained on `{Path(config.data.source).name}`"
    facts["steps"] = f"{steps} network pass{'es' if steps > 1 else ''}"
    if steps > 1:
        facts["transition"] = f"`{model.transition}`"
    if _distilled(run):
        facts["guidance"] = f"{model.guidance:g}, the teacher's; the student has it inside and needs one pass a step"
    else:
        facts["guidance"] = "none in the plain pipeline"
    return facts


def _distilled(run: Run) -> bool:
    """Whether this is a student; otherwise it is a teacher, made or fine-tuned from data."""
    return run.config.objective.name != "diffusion"  # type: ignore[attr-defined]


def _how(run: Run) -> str:
    return _how_to_prompt(run) if run.teacher.prompted else _how_to_label(run)


def _how_to_prompt(run: Run) -> str:
    side, frames = run.config.data.resolution, run.config.data.frames
    length = "" if frames is None else f"    num_frames={frames},\n"
    if tokens := run.config.model.max_sequence_length:
        length += f"    max_sequence_length={tokens},  # as in training\n"
    codec = run.teacher.codec
    assert codec is not None
    asks = codec.guided_by(1.0 if _distilled(run) else 2.0)
    scales = "".join(f"    {name}={value},\n" for name, value in asks.items())
    lacking = "".join(f", {part}=None" for part in left_out(codec.pipeline))
    lacking += _trust(run)
    code = (
        "import torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("."{lacking})  # this folder\n'
        f"made = pipeline(\n    {reading.literal(run.conditions.names(torch.zeros(1, dtype=torch.long))[0])},\n"
        f"    height={side},\n    width={side},\n{length}    num_inference_steps={len(run.rollout)},\n"
        f"{scales}    generator=torch.Generator().manual_seed(0),\n)\n"
    )
    said = " and ".join(f"`{name}={value}`" for name, value in asks.items())
    note = f"{said} is needed: guidance is inside already, and the pipeline would apply its own on top."
    if not _distilled(run):
        note = f"`{next(iter(asks))}` is free: 1 asks for one pass a step, more follows the prompt more closely."
    note += _why_trust(run)
    if len(run.rollout) > 1 and draws(scheduler_of(run)):
        note += " The noise between the steps comes from the global generator: `torch.manual_seed` fixes it."
    return f"## Sampling\n\n```python\n{code}```\n\n{note}"


def _how_to_label(run: Run) -> str:
    steps, labels, null = len(run.rollout), run.source.labels, run.teacher.null_label
    count = min(4, len(labels)) or 4
    asked = f"    class_labels={list(range(count))},  # one for each image\n" if labels else ""
    # The pipelines on latents count the labels, and would guide unasked.
    many, scale = (f"    batch_size={count},\n", "") if run.teacher.codec is None else ("", "    guidance_scale=1.0,\n")
    code = (
        "import torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("."{_trust(run)})  # this folder\n'
        f"images = pipeline(\n{many}{asked}    num_inference_steps={steps},\n{scale}"
        "    generator=torch.Generator().manual_seed(0),\n).images\n"
    )
    notes = [f"`num_inference_steps={steps}` is needed: the pipeline's own default is 1."] if steps > 1 else []
    if labels and run.teacher.codec is None:
        meaning = "" if null is None else f', class {null} included, which means "no class"'
        notes.append(f"Without `class_labels` the pipeline draws labels at random{meaning}; no generator seeds them.")
    if labels:
        notes.append("Labels: " + ", ".join(f"{i} {reading.shown(name, 200)}" for i, name in enumerate(labels)) + ".")
    notes[:1] = [notes[0] + _why_trust(run)] if notes else []
    return f"## Sampling\n\n```python\n{code}```\n\n" + "\n\n".join(notes)


def _trust(run: Run) -> str:
    return ", trust_remote_code=True" if is_carried(scheduler_of(run)) else ""


def _why_trust(run: Run) -> str:
    if not is_carried(scheduler_of(run)):
        return ""
    return (
        f" diffusers has no scheduler of its own for the transition `{run.config.model.transition}` of this model, so "
        "this folder holds one, `scheduler/few_step_scheduler.py`, which is what is to be trusted."
    )


def _licence(teacher: str | None, revision: str | None) -> str:
    """The licence in the teacher's model card, or `unknown`; nothing is downloaded."""
    if teacher is None:
        return "unknown"
    found: Any = locate(teacher) / CARD
    if not locate(teacher).exists() and teacher.count("/") == 1:
        found = try_to_load_from_cache(teacher, CARD, revision=hub.commit_of(teacher, revision) or revision)
    header = read_card(Path(found)) if isinstance(found, (str, Path)) else {}
    return str(header.get("license") or "unknown")


def read_card(path: Path) -> dict[str, Any]:
    """The YAML header of a model card; empty when there is none that can be read."""
    try:
        said = ModelCard(reading.text(path), ignore_metadata_errors=True).data.to_dict()
    except Exception:
        return {}
    for key, kind in _TOLD.items():
        if said.get(key) is not None and (isinstance(said[key], bool) or not isinstance(said[key], kind)):
            raise UserError(f"{path} says {key}: {reading.shown(str(said[key]), 40)}, which it cannot be: correct it")
    return said


_TOLD: dict[str, type | tuple[type, ...]] = {
    "num_inference_steps": int,
    "max_sequence_length": int,
    "embedded_guidance": (int, float),
    "resolution": int,
    "num_frames": int,
    "id2label": dict,
    "null_label": int,
}
"""what a card says that is used, and what it is"""

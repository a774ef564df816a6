"""A run becomes a folder that plain diffusers loads, with the right times inside; and a run folder a run again."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep import adapter, reading
from fewstep import build as building
from fewstep import config as configs
from fewstep.build import Run
from fewstep.carried import is_carried, scheduler_of, trusted
from fewstep.config import Config, RoleConfig
from fewstep.core.errors import UserError
from fewstep.models import hub
from fewstep.models.codec import Codec
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.loading import locate, named, network_of
from fewstep.rollout import Rollout
from fewstep.routes import Pixels, Route, draws, exportable, left_out, route_of, save_plainly, stock
from fewstep.train import checkpoint, stored
from fewstep.train.stored import Stored

CARD = "README.md"
# Far above rounding (1e-6 for eight steps), far below what a wrong time costs (1e-2 and more).
_TOLERANCE = 1e-3


def export(run: Run, folder: Path, dtype: torch.dtype = torch.float32, licence: str | None = None) -> Path:
    """Writes the evaluated generator as a diffusers pipeline in `folder`, which appears whole or not at all.

    The folder is re-opened and walked beside the run's own rollout before it gets its name; an earlier export
    there is replaced. `licence` is an identifier for the model card; default: the teacher's, where its card is at
    hand. Raises UserError for a run without a route in stock diffusers and for a place that cannot be written.
    """
    backbone, scheduler = exportable(run), scheduler_of(run)
    route, net = route_of(run, backbone.net), stock(backbone.net, dtype)
    if net.config.get("sample_size", 0) is None:
        net.register_to_config(sample_size=run.shape[-1])
    folder = Path(folder).absolute()
    aside = folder.with_name(f".{folder.name}.partial")
    _refuse_foreign(folder)
    try:
        _remove(aside)
        folder.parent.mkdir(parents=True, exist_ok=True)
        pipeline = route.pipeline(net, scheduler, partial(stock, dtype=dtype))
        save_plainly(pipeline, aside)
        adapter.write(run, pipeline, aside, dtype)
        _check(run, backbone, net, route, aside)
        (aside / CARD).write_text(card(run, dtype, route.tag, licence))
        _replace(aside, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"the export to {folder} could not be written ({reason}): make room or choose another place"
        ) from None
    finally:
        _remove(aside)
    return folder


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not (folder / "model_index.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and is no earlier export: choose a new or an empty folder")


def _replace(aside: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    if folder.is_symlink():
        folder = folder.resolve()
    if folder.exists():
        _remove(old)
        folder.rename(old)
    aside.rename(folder)
    _remove(old)


def _remove(path: Path) -> None:
    """A folder, or the link that stands in its place."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


class SameNoise:
    """Stands in for Draw where a pipeline's noise is wanted: `count` rows a draw from one torch generator.

    It is drawn for latents as the pipeline of `codec` packs them: the start, which has no purpose, only where it is
    packed there too.
    """

    def __init__(self, seed: int, count: int, codec: Codec | None = None):
        self.generator, self.count, self.codec = torch.Generator().manual_seed(seed), count, codec

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(self.count, *shape, generator=self.generator)
        if self.codec is None or not (purpose or self.codec.STARTS_PACKED):
            return drawn
        return self.codec.scattered(drawn)


@torch.no_grad()
def _check(run: Run, backbone: DiffusersBackbone, net: nn.Module, route: Route, folder: Path) -> None:
    """Re-opens `folder` and walks it beside the run's rollout. Raises OSError or UserError if they differ."""
    lacking: dict[str, Any] = left_out(run.teacher.codec.pipeline) if run.teacher.codec is not None else {}
    lacking |= trusted(scheduler_of(run))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **lacking)
    pipeline.set_progress_bar_config(disable=True)
    opened, meant = network_of(pipeline).eval(), net.state_dict()
    if any(not torch.equal(value, meant[name].to(value.dtype)) for name, value in opened.state_dict().items()):
        raise OSError("its weights are not those that were written")
    theirs = route.walk(pipeline, len(run.rollout))
    noise = SameNoise(0, 1, run.teacher.codec)
    plain = DiffusersBackbone(opened, backbone.schedule, backbone.kind)
    walk = Rollout(run.rollout.steps, run.rollout.step)  # a second time is folded into the weights
    ours = walk(plain, noise.normal("", run.shape), route.told(pipeline), noise).x0  # type: ignore[arg-type]
    apart = ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1)).item()
    if not apart < _TOLERANCE:
        raise UserError(
            f"{type(pipeline.scheduler).__name__} does not walk these {len(run.rollout)} steps as the run does "
            f"(relative difference {apart:.1e}), so nothing was exported: use fewer steps or another model.transition"
        )


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
        f'made = pipeline(\n    "{run.conditions.names(torch.zeros(1, dtype=torch.long))[0]}",\n'
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
        notes.append("Labels: " + ", ".join(f"{i} {name}" for i, name in enumerate(labels)) + ".")
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


def load_run(folder: Path, step: int | str | None = None, last: bool = True) -> Run:
    """The run of a run folder with the generator of its newest checkpoint, of `step` or of the "best": to be used.

    Of a run of stages the last one with a checkpoint is meant. The checkpoint is verified before anything is
    built; a critic gets no memory. Without the `last` weights the generator is its average, where the run keeps one.
    Raises UserError for an absent folder, no checkpoint, no such step, and Damaged for a damaged checkpoint.
    """
    place = stage_of(Path(folder))
    # All of it before anything is built: a run that still trains removes its old checkpoints.
    path, manifest, state = checkpoint.steady(lambda: _checkpoint(place, step), _opened)
    weights = checkpoint.network_in(state, path, "generator", None if last else "ema")
    (config,) = configs.load(place / "config.yaml")
    hub.pin_as_recorded(place / "origin.json")
    used = _for_use(config)
    run = building.build(used if last else _without_average(used), idle=("fake_score",))
    run.config, player = used, run.players["generator"]
    building.load_weights(run.triad.generator, weights, str(path))
    if "ema" in player.followers:
        averaged = checkpoint.network_in(state, path, "generator", "ema")
        building.load_weights(player.followers["ema"].module, averaged, str(path))
    for name, other in run.players.items():
        other.moves = manifest["moves"].get(name, 0)
    return run


def _opened(path: Path) -> tuple[Path, dict[str, Any], Stored]:
    return path, checkpoint.verify(path), stored.files([path / checkpoint.STATE])


def _for_use(config: Config) -> Config:
    """The config without what only training needs: where weights started, and a GPU that may not be here.

    What networks compute in is a part of them; by which kernels is not.
    """
    precise = {role: RoleConfig(precision=own.precision) for role, own in config.model.roles.items()}
    model = dataclasses.replace(config.model, attention="sdpa", checkpointing=False, compile=False, roles=precise)
    device = "auto" if config.device == "cuda" else config.device
    return dataclasses.replace(config, start={}, device=device, model=model)


def _without_average(config: Config) -> Config:
    generator = dataclasses.replace(config.players["generator"], ema=0.0)
    return dataclasses.replace(config, players={**config.players, "generator": generator})


def stage_of(folder: Path) -> Path:
    """The folder itself, or that of its last stage which has a checkpoint. Raises UserError for no run folder."""
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}: give one that `fewstep train` has made")
    stages = sorted(folder.glob("stage_*"), key=lambda p: (len(p.name), p.name))
    saved = [stage for stage in stages if checkpoint.available(stage / "checkpoints")]
    place = saved[-1] if saved else folder
    if not (place / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder, it has no config.yaml: give one that `fewstep train` has made")
    return place


def _checkpoint(place: Path, step: int | str | None) -> Path:
    if step is None:
        return building.latest(place)
    best: dict[str, Any] | None = None
    if step == "best":
        if not (place / "best.json").is_file():
            raise UserError(f"{place} has no best checkpoint: a run keeps one where evals.best names a hook")
        best = reading.fields(place / "best.json")
        step = _counted(best)
    found = {int(path.name): path for path in checkpoint.available(place / "checkpoints")}
    if step not in found and best is not None and isinstance(best.get("before"), dict):
        step = _counted(best["before"])  # the new one is still being written
    if step not in found:
        raise UserError(f"{place} has no checkpoint of step {step}: it has {', '.join(map(str, found)) or 'none'}")
    return found[step]


def _counted(row: dict[str, Any]) -> int | None:
    return step if isinstance(step := row.get("step"), int) else None

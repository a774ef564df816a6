"""Images from a run folder or a diffusers folder: which labels, which steps, one picture of them all."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fewstep import build, config, measure, reading
from fewstep.card import CARD, read_card
from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.evals.grid import picture
from fewstep.export import load_run, stage_of
from fewstep.models import loading, schedulers
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.bank import Bank, Partition
from fewstep.models.codec import Codec
from fewstep.models.codecs import open_codec
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.families import CODECS
from fewstep.models.negative import NegativeAttention
from fewstep.rollout import Rollout, TransitionName, transition
from fewstep.sampling_arguments import add_arguments

__all__ = ["Sampler", "add_arguments", "labelled_grid", "main", "open_folder"]

MANY_STEPS = 50
"""passes for a folder that does not say how many it was made for"""
_PIXELS_AT_ONCE = 250
_LATENTS_AT_ONCE = 4  # each becomes an image of a million pixels
_COLUMNS = 20
_TILE = 64
_GAP = 4
_WRITTEN = 300
"""characters of a prompt that stand above its image"""
_NAMED = 100
"""bytes of a prompt that are part of the name of its file"""


Asked = int | str
"""A label, or a prompt."""


def _clamped(x: Tensor) -> Tensor:
    return x.clamp(-1, 1)


@dataclass(frozen=True)
class Sampler:
    """A generator with its rollout. `names` of the labels 0, 1, ..; `classes` counts them where there are no names.

    A generator that reads prompts has `encode` instead; without any of them it is told nothing. `shape` is that of one
    sample, which `decode` makes an image.
    """

    net: Backbone
    rollout: Rollout
    shape: tuple[int, ...]
    names: tuple[str, ...]
    classes: int
    decode: Callable[[Tensor], Tensor] = _clamped
    encode: Callable[[list[str]], Condition] | None = None
    at_once: int = _PIXELS_AT_ONCE

    def name(self, asked: Asked) -> str:
        if isinstance(asked, str):
            return asked
        return self.names[asked] if asked < len(self.names) else f"class {asked}"

    def draw(self, asked: Sequence[Asked], count: int, seed: int) -> Tensor:
        """Images (N, C, H, W) in [-1, 1]; the labels or prompts `asked` take turns. Raises UserError."""
        told = self._told(asked)

        def at(rows: Tensor) -> Condition:
            return told.to(rows.device)[rows % len(asked)] if asked else told

        return measure.generate(
            self.net, self.rollout, at, count, self.shape, seed, batch=self.at_once, progress=True, decode=self.decode
        )

    def led_away(self, scale: float, prompt: str) -> Sampler:
        """The same, whose cross-attention loses `scale` times what it finds of a negative prompt. Raises UserError."""
        if self.encode is None:
            raise UserError("--negative is for generators that read prompts, and this one does not: leave it out")
        negative = self.encode([prompt]).inputs["encoder_hidden_states"]
        return dataclasses.replace(self, net=NegativeAttention(self.net, scale, negative))

    def _told(self, asked: Sequence[Asked]) -> Condition:
        if self.encode is not None:
            return self.encode([str(prompt) for prompt in asked])
        return Condition({"class_labels": torch.tensor(asked)}) if asked else Condition()


def open_folder(
    folder: Path,
    steps: int | None = None,
    guidance: float | None = None,
    checkpoint: int | str | None = None,
    base_first: int | None = None,
) -> Sampler:
    """The generator of a run folder or of a diffusers pipeline folder; `base_first` steps are left to the teacher.

    Raises UserError for a folder that is neither, too many steps, guidance without a null class, and a pipeline folder
    with `base_first`.
    """
    folder = loading.locate(str(folder))
    if (folder / "model_index.json").is_file():
        if checkpoint is not None:
            raise UserError(f"{folder} is a pipeline folder and has no checkpoints: leave --checkpoint out")
        if base_first is not None:
            raise UserError(f"{folder} is a pipeline folder, with no teacher beside it: give --base-first with a run")
        return _of_pipeline(folder, steps, 1.0 if guidance is None else guidance)
    return _of_run(folder, steps, guidance, checkpoint, base_first)


def open_bank(
    folders: Sequence[Path],
    steps: int | None = None,
    guidance: float | None = None,
    checkpoint: int | str | None = None,
) -> Sampler:
    """The generators of several run folders, each of which is asked for its own part of the labels.

    Raises UserError for runs that are not those of all parts, each once, or that walk different steps.
    """
    told = [config.load(stage_of(folder) / "config.yaml")[0].objective for folder in folders]
    of = [tuple(getattr(objective, name, 0) for name in ("parts", "labels", "part")) for objective in told]
    whole = Partition(len(folders), of[0][1])
    if sorted(of) != [(whole.parts, whole.labels, part + 1) for part in range(whole.parts)]:
        given = ", ".join(f"part {part} of {parts} of {labels} labels" for parts, labels, part in of)
        raise UserError(f"a bank has the run of each part of the same labels, but {given} was given")
    samplers = [open_folder(folder, steps, guidance, checkpoint) for _, folder in sorted(zip(of, folders, strict=True))]
    if len({(sampler.rollout.steps, sampler.rollout.step, sampler.shape) for sampler in samplers}) > 1:
        raise UserError("the runs of a bank make the same images by the same steps, but these differ: give such runs")
    return dataclasses.replace(samplers[0], net=Bank([sampler.net for sampler in samplers], whole))


def _of_run(
    folder: Path, steps: int | None, guidance: float | None, checkpoint: int | str | None, base_first: int | None
) -> Sampler:
    run = load_run(folder, checkpoint)
    net, rollout = measure.student(run)
    if guidance is not None:
        net = _guided(run.evaluated(), run.teacher.guides, guidance)
    if steps is not None and steps != len(rollout):
        _allowed(steps, run.teacher.scheduler)
        rollout = measure.walked(run, steps)
    if base_first is not None:
        rollout = measure.relay(run, rollout, base_first)
    codec = run.teacher.codec
    if not run.teacher.prompted:
        at_once = _PIXELS_AT_ONCE if codec is None else _LATENTS_AT_ONCE
        labels = run.source.labels
        return Sampler(net, rollout, run.shape, labels, len(labels), run.decode, at_once=at_once)
    assert codec is not None
    encode = _encoder(codec, run.config.data.resolution)
    return Sampler(net, rollout, run.shape, (), 0, run.decode, encode, _LATENTS_AT_ONCE)


def _encoder(codec: Codec, side: int) -> Callable[[list[str]], Condition]:
    return lambda prompts: codec.encode_prompts(prompts, size=(side, side))


def _of_pipeline(folder: Path, steps: int | None, guidance: float) -> Sampler:
    found, header = loading.find(str(folder)), read_card(folder / CARD)
    loaded = loading.denoiser(found)
    assert loaded.scheduler is not None
    schedule, kind = schedulers.read(loaded.scheduler)
    scheduler, known = loaded.scheduler, loaded.scheduler.config
    if steps is None:
        steps = int(known.get("original_inference_steps") or header.get("num_inference_steps") or MANY_STEPS)
    _allowed(steps, scheduler)
    step: TransitionName = "renoise" if type(scheduler).__name__.endswith("LCMScheduler") else "ode"
    device = build.pick_device("auto")
    codec = _codec(folder, header).to(device) if found.index.get("_class_name") in CODECS else None
    shape, side = _size(folder, loaded.net, codec, header)
    prompted = codec is not None and codec.PROMPTED
    unconditional = codec.unconditional() if codec is not None and prompted else None
    net = DiffusersBackbone(loaded.net.eval(), schedule, kind, header.get("null_label"), unconditional)
    generator = _guided(net, net.null_label is not None or prompted, guidance).to(device)
    if codec is None:
        shift, even = schedulers.time_shift(scheduler), False
    else:
        shift, even = codec.time_shift(scheduler, shape), codec.EVEN_SIGMAS
    same = schedulers.student_scheduler(scheduler, kind, step, steps, shift, prompted, even)
    rollout = Rollout(schedulers.steps_of(same, steps, even), transition(step))
    decode = _clamped if codec is None else lambda x: codec.decode(x).clamp(-1, 1)
    at_once = _PIXELS_AT_ONCE if codec is None else _LATENTS_AT_ONCE
    if codec is not None and prompted:
        return Sampler(generator, rollout, shape, (), 0, decode, _encoder(codec, side), at_once)
    names = tuple(str(name) for name in (header.get("id2label") or {}).values())
    classes = len(names) or net.family.classes(loaded.net) or 0
    return Sampler(generator, rollout, shape, names, classes, decode, at_once=at_once)


def _codec(folder: Path, header: dict[str, Any]) -> Codec:
    """The codec of a pipeline folder, as its card says that it is used."""
    codec = open_codec(str(folder))
    if header.get("max_sequence_length"):
        codec.give_tokens(int(header["max_sequence_length"]))
    if header.get("embedded_guidance") is not None:
        codec.give_guidance(float(header["embedded_guidance"]))
    return codec


def _size(folder: Path, net: nn.Module, codec: Codec | None, header: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """The shape of one sample and the side of its image. Raises UserError where nothing says them."""
    if codec is not None:
        side = int(header.get("resolution") or codec.side)
        return codec.latent_shape(side, side, header.get("num_frames") or codec.frames), side
    side = net.config.sample_size
    if not isinstance(side, int):
        raise UserError(f"the network of {folder} does not say its image size: set sample_size in its config.json")
    return (net.config.in_channels, side, side), side


def _guided(net: Backbone, guides: bool, guidance: float) -> Backbone:
    if guidance == 1:
        return net
    if not guides:
        raise UserError(f'--guidance {guidance:g} needs a class that means "no class", and this model names none')
    return Guided(net, guidance)


def _allowed(steps: int, scheduler: object) -> None:
    most = scheduler.config.num_train_timesteps  # type: ignore[attr-defined]
    if not 1 <= steps <= most:
        raise UserError(f"--steps is from 1 to the {most} of this model's schedule, but {steps} was given")


def chosen(args: argparse.Namespace, sampler: Sampler) -> list[Asked]:
    """The labels or prompts that were asked for, in that order. Raises UserError for what this generator cannot."""
    return list(chosen_labels(args, sampler)) if sampler.encode is None else list(chosen_prompts(args))


def chosen_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that were asked for. Raises UserError for labels, or without any prompt."""
    if args.labels or args.label_ids:
        raise UserError("this generator reads prompts: give --prompt or --prompts-file instead of labels")
    prompts = args.prompt or (_lines(Path(args.prompts_file)) if args.prompts_file else [])
    if not prompts:
        raise UserError('this generator reads prompts: give --prompt "..." or --prompts-file')
    return prompts


def chosen_labels(args: argparse.Namespace, sampler: Sampler) -> list[int]:
    """The labels that were asked for, in that order; without any, all of them. Raises UserError for an unknown one."""
    if args.prompt:
        instead = "use --labels" if sampler.classes else "leave --prompt out"
        raise UserError(f"this generator reads no prompts: {instead}")
    asked = args.labels or args.label_ids or args.prompts_file
    if asked and not sampler.classes:
        raise UserError("this generator takes no labels: leave --labels, --label-ids and --prompts-file out")
    if args.labels:
        return [_label(name, sampler, "") for name in _split(args.labels, "--labels")]
    if args.label_ids:
        return [_id(number, sampler) for number in _split(args.label_ids, "--label-ids")]
    if args.prompts_file:
        return _read_labels(Path(args.prompts_file), sampler)
    return list(range(min(sampler.classes, _COLUMNS)))


def _split(given: str, option: str) -> list[str]:
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if not parts:
        raise UserError(f"{option} is a list with commas between, but '{given}' was given")
    return parts


def _id(given: str, sampler: Sampler) -> int:
    if not given.isdecimal() or int(given) >= sampler.classes:
        raise UserError(f"label ids are from 0 to {sampler.classes - 1}, but '{given}' was given")
    return int(given)


def _label(given: str, sampler: Sampler, where: str) -> int:
    """The label of a name. `where` opens the sentence of the error."""
    places = {name.casefold(): i for i, name in enumerate(sampler.names)}
    if not places:
        raise UserError(f"{where}this model has no label names: use --label-ids from 0 to {sampler.classes - 1}")
    if given.casefold() in places:
        return places[given.casefold()]
    near = difflib.get_close_matches(given.casefold(), places, 1)
    hint = f"did you mean '{sampler.names[places[near[0]]]}'? " if near else ""
    shown = ", ".join(sampler.names[:_COLUMNS]) + (", .." if len(sampler.names) > _COLUMNS else "")
    raise UserError(f"{where}there is no label '{given}': {hint}use any of {shown}")


def _read_labels(path: Path, sampler: Sampler) -> list[int]:
    """One label a line, by name or, where the model has no names, by number; empty lines are skipped."""
    labels = []
    for number, text in enumerate(_read_text(path), 1):
        if not text:
            continue
        if text.isdecimal() and int(text) < sampler.classes and not sampler.names:
            labels.append(int(text))
        else:
            labels.append(_label(text, sampler, f"{path}, line {number}: "))
    if not labels:
        raise UserError(f"the prompts file {path} names no label: write one a line")
    return labels


def _lines(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines are skipped."""
    if prompts := [text for text in _read_text(path) if text]:
        return prompts
    raise UserError(f"the prompts file {path} has no prompt: write one a line")


def _read_text(path: Path) -> list[str]:
    try:
        return [line.strip() for line in reading.text(path, reading.LINES).splitlines()]
    except UserError as error:
        raise UserError(f"the prompts file {error}") from None


def labelled_grid(images: Tensor, captions: Sequence[str], columns: int) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1] in rows of `columns`, a caption above each; a row like the one above has none."""
    scale = max(1, round(_TILE / images.shape[-1]))
    height, width = (side * scale for side in images.shape[-2:])
    font = ImageFont.load_default(11)
    rows = [list(captions[start : start + columns]) for start in range(0, len(images), columns)]
    above: list[str] = []
    lines: list[list[list[str]]] = []
    for row in rows:
        named = any(row) and row != above[: len(row)]
        lines.append([wrapped(text, width - 2, font) for text in row] if named else [])
        above = row
    heads = [13 * max((len(text) for text in row), default=0) for row in lines]
    canvas = Image.new(
        "RGB", (columns * (width + _GAP) + _GAP, sum(heads) + len(rows) * (height + _GAP) + _GAP), "white"
    )
    pen, top = ImageDraw.Draw(canvas), _GAP
    for index, (head, texts) in enumerate(zip(heads, lines, strict=True)):
        for column, text in enumerate(texts):
            place = (_GAP + column * (width + _GAP) + width / 2, top + head - 3)
            pen.multiline_text(place, "\n".join(text), fill="black", font=font, anchor="md", align="center", spacing=1)
        for column, image in enumerate(images[index * columns : (index + 1) * columns]):
            tile = picture(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (_GAP + column * (width + _GAP), top + head))
        top += head + height + _GAP
    return canvas


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """`text` in lines of at most `width` pixels; a word that is too long is cut."""
    lines: list[str] = []
    for word in reading.shown(text, _WRITTEN).split():
        while font.getlength(word) > width and len(word) > 2:
            word = word[:-2] + "…"
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def writable(out: Path) -> None:
    """Raises UserError before any work is done for a picture that could not be saved."""
    probe = out.with_name(f".{out.name}.probe")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if out.is_dir():
            raise IsADirectoryError(21, "it is a folder")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): choose another place") from None


def _save_individually(images: Tensor, captions: Sequence[str], out: Path) -> Path:
    folder = out.with_suffix("")
    folder.mkdir(exist_ok=True)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        words = re.sub(r"[^\w]+", "-", caption[:_NAMED]).strip("-").encode()[:_NAMED].decode(errors="ignore")
        picture(image).save(folder / f"{i:05d}{'_' if words else ''}{words}.png")
    return folder


def main(args: argparse.Namespace) -> None:
    """Samples as the arguments of `add_arguments` say, saves the picture and says how long it took."""
    out = Path(args.out)
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise UserError(f"--guidance is a number from 0, 1 for none, but {args.guidance} was given")
    if args.count is not None and args.count < 1:
        raise UserError(f"--count is at least 1, but {args.count} was given")
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch is at least 1, but {args.batch} was given")
    if (args.negative is None) != (args.negative_attention is None):
        raise UserError('--negative "what not to show" and --negative-attention 0.2 go together: give both or neither')
    if args.negative_attention is not None and not 0 <= args.negative_attention <= 1:
        raise UserError(f"--negative-attention is a number from 0 to 1, but {args.negative_attention} was given")
    out = out if out.suffix.lower() == ".png" else out.with_name(f"{out.name}.png")
    writable(out)
    folders = [Path(folder) for folder in (args.run, *args.bank)]
    given = (args.steps, args.guidance, args.checkpoint)
    if args.base_first is not None and (args.bank or args.negative is not None):
        raise UserError("--base-first goes with one run and without --negative: leave one of them out")
    sampler = open_bank(folders, *given) if args.bank else open_folder(folders[0], *given, args.base_first)
    if args.negative is not None:
        sampler = sampler.led_away(args.negative_attention, args.negative)
    asked = chosen(args, sampler)
    count = args.count or (len(asked) * (1 if args.prompts_file else 4) or 16)
    began = time.perf_counter()
    if args.batch is not None:
        sampler = dataclasses.replace(sampler, at_once=args.batch)
    images = sampler.draw(asked, count, args.seed)
    seconds = time.perf_counter() - began
    captions = [sampler.name(asked[i % len(asked)]) if asked else "" for i in range(count)]
    columns = min(len(asked) or 4, count, _COLUMNS)
    try:
        labelled_grid(images, captions, columns).save(out)
        folder = _save_individually(images, captions, out) if args.individual else None
    except OSError as error:
        raise UserError(f"{out} could not be written ({error.strerror or error}): choose another place") from None
    passes = len(sampler.rollout)
    print(f"{count} images, {passes} step{'s' if passes > 1 else ''}: {count / seconds:.1f} images/s")
    print(f"{out}{f' and {folder}/' if folder else ''}")

"""Looking at generators: sample grids at fixed noise, and the table of fidelity, diversity and speed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep import reading
from fewstep.build import Run, stock_scheduler
from fewstep.config import FEWEST_SAMPLES
from fewstep.core.batch import Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.data.captioned import attributes_of, rows_of
from fewstep.data.scenes import ATTRIBUTES, LABELS, law
from fewstep.data.source import HELD_OUT, CaptionedSource, SceneSource, Source
from fewstep.evals.attributes import label_accuracy, law_distance, rare_kept
from fewstep.evals.captions import caption_accuracy
from fewstep.evals.diversity import same_label_diversity
from fewstep.evals.frechet import Statistics, frechet_distance
from fewstep.evals.grid import picture, save_grid
from fewstep.evals.neighbours import neighbours
from fewstep.evals.reader import Reader, load_reader
from fewstep.models import schedulers
from fewstep.models.backbone import Backbone, Guided
from fewstep.models.loading import DENOISERS, locate
from fewstep.perception import reader_folder
from fewstep.relay import Relay
from fewstep.rollout import Rollout, TransitionName, transition
from fewstep.train import interrupts, processes
from fewstep.train.checkpoint import sha256, write_text

GRID_SEED = 20_000
SAMPLE_SEED = 30_000
TRUTH_SAMPLES = 10_000
TEACHER_STEPS = 50
PROMPTS, EACH, TRUE_EACH = 50, 8, 40
PAIRS = 24
COLUMNS = (
    "frechet",
    "precision",
    "recall",
    "density",
    "coverage",
    "label_accuracy",
    "caption_accuracy",
    "one_object",
    "two_objects",
    "law_distance",
    "rare_kept",
    "diversity",
    "prompt_diversity",
    "passes",
    "images_per_second",
    "samples",
)


def labels_of(run: Run, count: int) -> Tensor:
    """Labels 0, 1, .., K-1, 0, .. for `count` images; zeros for data without labels."""
    return torch.arange(count) % max(1, len(run.source.labels))


Asked = Callable[[Tensor], Condition]
"""Rows (B,) of what is made -> what the network is told of them."""


@torch.no_grad()
def generate(
    net: Backbone,
    rollout: Rollout,
    asked: Asked,
    count: int,
    shape: tuple[int, ...],
    seed: int,
    batch: int = 250,
    progress: bool = False,
    decode: Callable[[Tensor], Tensor] = lambda x: x.clamp(-1, 1),
    device: torch.device | None = None,
) -> Tensor:
    """Images (N, C, H, W) in [-1, 1]; image i depends on (seed, i) and on what is asked of it alone.

    They are made on `device`, by default where the weights of `net` lie.
    """
    device = device or next(net.parameters()).device
    images = []
    for rows in tqdm(torch.arange(count).split(batch), desc="images", unit="batch", disable=not progress, leave=False):
        interrupts.poll()
        draw = Draw(seed, 0, rows.to(device))
        images.append(decode(rollout(net, draw.normal("noise", shape), asked(draw.ids), draw).x0).cpu())
    return torch.cat(images)


def student(run: Run) -> tuple[Backbone, Rollout]:
    """The generator to look at and its rollout; a network trained from nothing is guided as the teacher it is."""
    net = run.evaluated()
    if run.config.model.network is not None and run.config.model.guidance != 1:
        net = Guided(net, run.config.model.guidance)
    return net, run.rollout


def walked(run: Run, steps: int) -> Rollout:
    """The student's rollout in another number of steps. Raises UserError where its objective refuses that."""
    model = replace(run.config.model, steps=steps)
    scheduler = stock_scheduler(replace(run.config, model=model), run.teacher)
    taught = run.teacher
    rollout = run.rollout.over(schedulers.student_steps(taught.schedule, scheduler, steps, taught.shift, taught.even))
    run.objective.refuse(rollout)
    return rollout


def teacher(run: Run, steps: int, how: TransitionName = "ode") -> tuple[Backbone, Rollout]:
    """The guided teacher and a rollout of `steps` steps, deterministic unless told otherwise."""
    scheduler = schedulers.student_scheduler(run.teacher.scheduler, run.teacher.kind, "ode", steps, run.teacher.shift)
    return run.guided(), Rollout(schedulers.steps_of(scheduler, steps), transition(how))


def relay(run: Run, rollout: Rollout, first: int) -> Relay:
    """The student's `rollout`, its first steps left to the teacher. Raises UserError for a run without a teacher."""
    if run.config.model.teacher is None:
        raise UserError("--base-first lets the teacher begin, but this run was trained without one: leave it out")
    return Relay(*teacher(run, TEACHER_STEPS), rollout, first)


def made(run: Run, net: Backbone, rollout: Rollout, count: int, seed: int, progress: bool = False) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] of what is asked for in this run."""
    asked = run.conditions.asked
    return generate(net, rollout, asked, count, run.shape, seed, run.at_once, progress, run.decode, run.device)


def save_student_grid(run: Run, path: Path, count: int = 48) -> None:
    """A grid at fixed noise and labels, the same throughout the run; made by all processes, written by the leader."""
    net, rollout = student(run)
    images = made(run, net, rollout, count, GRID_SEED)
    if processes.leads():
        save_grid(images, path, columns=12)


def save_comparison(run: Run, path: Path, columns: int = 12) -> None:
    """Two rows from the same noise and labels for each block: the teacher at 50 steps, the student below.

    The first PAIRS of them also one by one, in a folder of the same name.
    """
    count = 3 * columns
    above = made(run, *teacher(run, TEACHER_STEPS), count, GRID_SEED)
    below = made(run, *student(run), count, GRID_SEED)
    rows = [part for pair in zip(above.split(columns), below.split(columns), strict=True) for part in pair]
    passes = len(run.rollout)
    names = [f"teacher, {TEACHER_STEPS} steps", f"student, {passes} step{'s' if passes > 1 else ''}"] * 3
    save_grid(torch.cat(rows), path, columns=columns, scale=5, row_labels=names)
    asked = run.conditions.names(torch.arange(PAIRS))
    save_pairs(path.with_suffix(""), {"teacher": (names[0], above), "student": (names[1], below)}, asked)


def save_pairs(folder: Path, models: Mapping[str, tuple[str, Tensor]], asked: Sequence[str]) -> None:
    """Single pictures of several models from the same noise, for the page, with what was asked for in pairs.json.

    `models`: a short key -> a name for the reader and images (N, C, H, W) in [-1, 1], N at least that of `asked`.
    """
    folder.mkdir(exist_ok=True)
    for key, (_, images) in models.items():
        for i in range(len(asked)):
            picture(images[i]).save(folder / f"{key}_{i:02d}.png")
    told = {"names": {key: name for key, (name, _) in models.items()}, "asked": list(asked)}
    write_text(folder / "pairs.json", json.dumps(told, indent=1))


@dataclass(frozen=True)
class Truth:
    """Reader features of real images: `statistics` over all of them, `features` (N, D) with `labels` (N,)."""

    statistics: Statistics
    features: Tensor
    labels: Tensor
    protocol: str


@cache
def _reader(folder: Path) -> Reader:
    return load_reader(folder)


def reader_of(source: Source) -> Reader:
    return _reader(reader_folder(source))


def read_truth(source: Source, count: int) -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N,) of `count` real images that the training never sees.

    A finite source has no such images and no more than it has: they are its own, each once.
    """
    reader, unseen = reader_of(source), source.held_out()
    ids = torch.arange(count if source.size is None else min(count, source.size))
    features = [reader.read(unseen.images(rows))[1] for rows in ids.split(500)]
    return torch.cat(features), unseen.label_of(ids)


def truth_file(source: SceneSource | CaptionedSource) -> Path:
    """Where the truth of a world is stored, its record beside it as .json."""
    world = "captioned" if isinstance(source, CaptionedSource) else "scenes"
    return locate(f"assets/truth/{world}{source.resolution}.safetensors")


def truth_of(source: Source) -> Truth:
    """The stored truth of a world where it fits the reader, else computed now."""
    weights = sha256(reader_folder(source) / "reader.safetensors")
    if isinstance(source, SceneSource | CaptionedSource):
        stored = truth_file(source)
        record = stored.with_suffix(".json")
        if record.exists() and (known := reading.fields(record)).get("reader_sha256") == weights:
            state, count = reading.tensors(stored), known["samples"]
            statistics = Statistics(state["mean"], state["covariance"], count)
            return Truth(statistics, state["features"].float(), state["labels"], f"{count} true scenes")
    features, labels = read_truth(source, TRUTH_SAMPLES)
    which = "true images" if source.size is None else "images of the training set"
    return Truth(Statistics.of(features), features, labels, f"{len(features)} {which}")


def row(name: str, images: Tensor, labels: Tensor, truth: Truth, source: Source) -> dict[str, Any]:
    """Every measure of `images` (N, 3, H, W) made for `labels` (N,). Neighbours compare N with N true images."""
    read, features = reader_of(source).read(images)
    count = len(images)
    near = asdict(neighbours(truth.features[:count], features)) if len(truth.features) >= FEWEST_SAMPLES else {}
    result: dict[str, Any] = {
        "name": name,
        "frechet": frechet_distance(Statistics.of(features), truth.statistics),
        **near,
        "diversity": same_label_diversity(features, labels, (truth.features[:2000], truth.labels[:2000])),
        "samples": count,
    }
    if source.labels == LABELS:
        rare = rare_kept(read, ATTRIBUTES, law())
        result |= {
            "label_accuracy": label_accuracy(read, labels, ATTRIBUTES),
            "law_distance": law_distance(read, ATTRIBUTES, law()),
            "rare_kept": f"{sum(not r.lost for r in rare)} / {len(rare)}",
            "rare": [asdict(r) for r in rare],
        }
    return result


def measure(name: str, run: Run, net: Backbone, rollout: Rollout, truth: Truth, count: int) -> dict[str, Any]:
    """Generates `count` images at the fixed seed and measures them; passes count both halves of guidance."""
    labels = labels_of(run, count)
    began = time.perf_counter()
    images = made(run, net, rollout, count, SAMPLE_SEED, progress=True)
    seconds = time.perf_counter() - began
    measured = row(name, images, labels, truth, run.source)
    if isinstance(run.source, CaptionedSource):
        measured |= _captions(run, images) | {"prompt_diversity": prompt_diversity(run, net, rollout, run.source)}
    return measured | {"passes": rollout.passes(net), "images_per_second": round(count / seconds, 2)}


def _captions(run: Run, images: Tensor) -> dict[str, float]:
    """Shares of images that show all that their captions say."""
    said = rows_of(run.conditions.names(torch.arange(len(images))))
    right = caption_accuracy(reader_of(run.source), images, said)
    return {"caption_accuracy": right.all, "one_object": right.one, "two_objects": right.two}


def prompt_diversity(run: Run, net: Backbone, rollout: Rollout, source: CaptionedSource) -> float:
    """How much images of one prompt differ, as a share of how much true scenes of it do: the mean over prompts."""
    prompts = torch.arange(PROMPTS).repeat_interleave(EACH)
    asked = lambda rows: run.conditions.asked(prompts.to(rows.device)[rows])
    images = generate(
        net, rollout, asked, len(prompts), run.shape, SAMPLE_SEED, run.at_once, decode=run.decode, device=run.device
    )
    others = torch.arange(PROMPTS).repeat_interleave(TRUE_EACH)
    said = torch.tensor([attributes_of(caption) for caption in run.conditions.names(others)])
    scenes, ids = source.held_out().scenes, torch.arange(len(others))
    true = scenes.of_attributes(ids, scenes.given(ids, said))
    own, real = (reader_of(source).read(pictures)[1] for pictures in (images, true))
    return same_label_diversity(own, prompts, (real, others))


def stored_row(run: Run, count: int) -> dict[str, Any] | None:
    """The 50-step row that lies beside the teacher, when it was measured by this protocol on these weights."""
    folder = locate(str(run.config.model.teacher))
    record = folder / "evals.json"
    if run.config.model.lora is not None or not record.is_file():
        return None
    stored = reading.fields(record)
    fits = stored.get("guidance") == run.config.model.guidance
    fits = fits and stored.get("weights_sha256") == weights_sha256(folder)
    source = stored.get("resolution") == run.config.data.resolution and run.config.data.source == "scenes"
    if not (fits and source):
        return None
    rows = stored.get("rows")
    row = rows.get(str(count)) if isinstance(rows, dict) else None
    if not (row is None or isinstance(row, dict)):
        raise UserError(f"{record} cannot be read: its row of {count} images is no row, so remove the file")
    return row


def weights_sha256(folder: Path) -> str:
    """The hash of the denoiser's weights in a pipeline folder."""
    return sha256(next(f for part in DENOISERS for f in (folder / part).glob("diffusion_pytorch_model*.safetensors")))


def protocol(run: Run, truth: Truth, count: int) -> str:
    asked = "unseen captions" if run.teacher.prompted else "labels in turn"
    return (
        f"{count} images at seed {SAMPLE_SEED}, {asked}, against {truth.protocol} (seed {HELD_OUT}); "
        f"features of assets/{reader_folder(run.source).name}; precision to coverage with k = 5 on "
        f"{min(count, len(truth.features))} each; teacher guidance {run.config.model.guidance:g}, deterministic sampler"
    )


def table(run: Run, count: int) -> dict[str, Any]:
    """Teacher at 50 steps, teacher at the student's step count, student; the format of table.json."""
    truth = truth_of(run.source)
    steps = len(run.rollout)
    rows = []
    if run.config.model.teacher is not None:
        name = f"teacher, {TEACHER_STEPS} steps"
        many = stored_row(run, count) or measure(name, run, *teacher(run, TEACHER_STEPS), truth, count)
        rows.append({**many, "name": name})
        if run.config.evals.baseline:
            name = f"teacher, {steps} step{'s' if steps > 1 else ''}"
            rows.append(measure(name, run, *teacher(run, steps), truth, count))
    rows.append(measure(f"student, {steps} step{'s' if steps > 1 else ''}", run, *student(run), truth, count))
    return {"protocol": protocol(run, truth, count), "columns": list(COLUMNS), "rows": rows}

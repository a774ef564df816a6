"""`fewstep eval`: runs, pipeline folders and folders of pictures measured side by side, by one protocol."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep import build, measure
from fewstep.build import Run
from fewstep.config import FEWEST_SAMPLES, check_samples
from fewstep.core.errors import UserError
from fewstep.data.source import WORLDS, PromptSource, Source, open_source
from fewstep.export import load_run
from fewstep.hooks import extractor_of, reference_of
from fewstep.metrics import METRICS, Subject, Wanted, evaluate, metric
from fewstep.models.loading import locate
from fewstep.plan import aligned
from fewstep.sampling import open_folder
from fewstep.subjects import Generated, Pictures, of_run, of_sampler
from fewstep.train.checkpoint import write_text

DEFAULT = ("frechet", "kernel", "neighbours")


@dataclass(frozen=True)
class Row:
    """What was found of one target."""

    name: str
    passes: float | None
    images_per_second: float
    numbers: Mapping[str, float]
    protocols: Sequence[Mapping[str, Any]]


class Timed:
    """A subject that counts the seconds it takes to make images."""

    def __init__(self, subject: Subject):
        self.subject, self.seconds, self.made = subject, 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.subject, name)

    def make(self, rows: Tensor, asked: Tensor) -> Tensor:
        began = time.perf_counter()
        images = self.subject.make(rows, asked)
        self.seconds, self.made = self.seconds + time.perf_counter() - began, self.made + len(images)
        return images


def is_run(target: Path) -> bool:
    return (target / "config.yaml").is_file() or any(target.glob("stage_*/config.yaml"))


def subjects(args: argparse.Namespace) -> tuple[list[Subject], Source]:
    """What the targets are, and the world that they are compared with. Raises UserError for one that is nothing."""
    targets = {target: locate(target) for target in args.targets}
    runs = {name: load_run(target, args.step) for name, target in targets.items() if is_run(target)}
    world = _world(args, [run.source for run in runs.values()])
    prompts = PromptSource(args.prompts_file, world.resolution, 0) if args.prompts_file else world.held_out()
    found: list[Subject] = []
    for name, target in targets.items():
        if name in runs:
            found.append(_generated(name, runs[name], args.base_first))
        elif (target / "model_index.json").is_file():
            sampler = open_folder(target, args.steps, base_first=args.base_first)
            found.append(of_sampler(name, sampler, prompts.captions, measure.SAMPLE_SEED))
        elif target.is_dir():
            found.append(_pictures(target, world.resolution))
        else:
            raise UserError(f"{target} is no run, no pipeline folder and no folder of images")
    return found, world


def _generated(name: str, run: Run, base_first: int | None) -> Generated:
    """The student of a run, or with `base_first` the teacher before it."""
    net, rollout = measure.student(run)
    return of_run(name, run, net, rollout if base_first is None else measure.relay(run, rollout, base_first))


def _pictures(folder: Path, resolution: int) -> Pictures:
    pictures = Pictures(folder, resolution)
    if (pictures.count or 0) < FEWEST_SAMPLES:
        raise UserError(f"{folder} has {pictures.count} images, but at least {FEWEST_SAMPLES} are needed: add more")
    return pictures


def _world(args: argparse.Namespace, sources: Sequence[Source]) -> Source:
    """The world that --reference names, or that of the first run."""
    resolution = args.resolution or next((source.resolution for source in sources), None)
    if args.reference is None and sources:
        return sources[0]
    if args.reference is None or resolution is None:
        raise UserError(
            f"none of these is a run, which says what it is of: give --reference ({', '.join(WORLDS)}, a folder of "
            "images or an .npz of statistics) and --resolution"
        )
    if args.reference.endswith(".npz"):
        return sources[0] if sources else open_source(next(iter(WORLDS)), resolution, 0)
    return open_source(args.reference, resolution, 0)


def wanted(args: argparse.Namespace, world: Source) -> list[Wanted]:
    device = build.pick_device("auto")
    names = tuple(args.metrics.split(",")) if args.metrics else DEFAULT
    needs = {need for name in names for need in metric(name).needs}
    if "teacher" in needs:
        raise UserError("teacher_distance is measured during a run, by evals.hooks: leave it out of --metrics")
    parts: dict[str, Any] = {}
    if "extractor" in needs:
        parts["extractor"] = extractor_of(args.extractor, args.weights, args.model, world, device)
    if "clip" in needs:
        parts["clip"] = extractor_of("clip", args.clip, args.model, world, device)
    if "reference" in needs:
        statistics = args.reference if (args.reference or "").endswith(".npz") else None
        parts["reference"] = reference_of(statistics, world, parts["extractor"])
    return [Wanted(name, args.samples, **{need: parts[need] for need in METRICS[name].needs}) for name in names]


def rows(args: argparse.Namespace) -> list[Row]:
    check_samples("--samples", args.samples)
    found, world = subjects(args)
    asked, result = wanted(args, world), []
    for subject in found:
        timed = Timed(subject)
        scores = evaluate(timed, asked, args.batch, progress=True)
        numbers = {name: value for score in scores for name, value in score.numbers.items()}
        speed = round(timed.made / max(timed.seconds, 1e-9), 2)
        result.append(Row(subject.name, subject.passes, speed, numbers, [score.protocol for score in scores]))
    return result


def table(found: Sequence[Row]) -> str:
    columns = list(found[0].numbers)
    lines = [["target", "passes", *columns, "images/s"]]
    for row in found:
        passes = "-" if row.passes is None else str(row.passes)
        lines.append([row.name, passes, *(f"{row.numbers[c]:.4g}" for c in columns), f"{row.images_per_second:g}"])
    return "\n".join(aligned(lines))


def plot(found: Sequence[Row], path: Path) -> None:
    """Every number against the network passes of an image; pictures without a number of passes are lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = list(found[0].numbers)
    ticks = sorted({row.passes for row in found if row.passes is not None})
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure, panels = pyplot.subplots(down, across, figsize=(4 * across, 3 * down), squeeze=False)
    for panel, column in zip(panels.flat, columns, strict=False):
        for i, row in enumerate(found):
            colour = f"C{i % 10}"
            if row.passes is None:
                panel.axhline(row.numbers[column], color=colour, linestyle="--", label=row.name)
            else:
                panel.plot(row.passes, row.numbers[column], "o", color=colour, label=row.name)
        panel.set(xlabel="network passes an image", title=column, xscale="log")
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
    for panel in list(panels.flat)[len(columns) :]:
        panel.set_axis_off()
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize="small")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(args: argparse.Namespace) -> None:
    """Measures what `args` names; writes eval.jsonl and eval.png and prints the table."""
    out = Path(args.out)
    found = rows(args)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(dataclasses.asdict(row)) for row in found]
        write_text(out / "eval.jsonl", "".join(line + "\n" for line in lines))
        plot(found, out / "eval.png")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from None
    print(table(found))
    print(f"numbers and protocols: {out / 'eval.jsonl'}, plot: {out / 'eval.png'}")

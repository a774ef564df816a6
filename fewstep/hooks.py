"""Metrics during training: what `evals.hooks` names, each at its own cadence, on the same noise and prompts throughout.

Everything that a hook needs is opened before the first step, so that an absent file ends a run before it begins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep import measure, reading
from fewstep.build import Run
from fewstep.config import HookConfig
from fewstep.core.errors import UserError
from fewstep.data.source import FolderSource, Source
from fewstep.evals import references
from fewstep.evals.extractors import Extractor, ReaderFeatures, open_extractor
from fewstep.evals.references import Reference
from fewstep.metrics import METRICS, Subject, Wanted, evaluate, metric
from fewstep.models.loading import locate
from fewstep.subjects import of_run
from fewstep.train import processes
from fewstep.train.checkpoint import write_text

REFERENCE_SAMPLES = 10_000
SCENES_CLIP = "assets/scenes_clip"


def extractor_of(name: str, weights: str | None, model: str | None, source: Source, device: torch.device) -> Extractor:
    """The extractor that a config or a command names. Raises UserError for one that is not there."""
    if name == "reader":
        return ReaderFeatures(measure.reader_folder(source))
    if name == "clip":
        from fewstep.evals.clip import Clip

        return Clip(model, weights, device) if model else Clip(weights or locate(SCENES_CLIP), device=device)
    return open_extractor(name, weights, device)


def reference_of(where: str | None, source: Source, extractor: Extractor, batch: int = 100) -> Reference:
    """What is compared with: an .npz file, a folder of images, or by default the world or the images of `source`.

    Statistics of images are kept in the cache folder of references.
    """
    if where is not None and where.endswith(".npz"):
        return references.load(Path(where), extractor)
    if where is not None:
        source = FolderSource(where, source.resolution, 0)
    elif isinstance(extractor, ReaderFeatures):
        truth = measure.truth_of(source)
        said = {"of": truth.protocol, "extractor": extractor.name, "weights": extractor.sha256}
        return Reference(truth.statistics, truth.features[: references.MOST_FEATURES], said)
    count = REFERENCE_SAMPLES if source.size is None else source.size
    of = {"world": type(source).__name__, "resolution": source.resolution, "checksum": source.checksum()}
    file = references.cached({**of, "extractor": extractor.sha256, "resize": extractor.resize, "count": count})
    if not file.is_file():
        unseen = source.held_out()
        features = [extractor.features(unseen.images(ids)) for ids in torch.arange(count).split(batch)]
        what = f"{count} images of {where or type(source).__name__} at {source.resolution} pixels"
        made = Reference.of(torch.cat(features), extractor, what)
        if processes.leads():
            made.save(file)
        return made
    return references.load(file, extractor)


def wanted_of(hook: HookConfig, run: Run, opened: dict[str, Any]) -> Wanted:
    """The measurement that `hook` describes; extractors and references that are in `opened` are used again."""
    needs = metric(hook.metric).needs
    parts: dict[str, Any] = {}
    if "teacher" in needs:
        parts["teacher"] = _teacher(run)
    for need in {"extractor", "clip"} & set(needs):
        name = "clip" if need == "clip" else hook.extractor
        key = json.dumps([name, hook.weights, hook.model])
        if key not in opened:
            opened[key] = extractor_of(name, hook.weights, hook.model, run.source, run.device)
        parts[need] = opened[key]
    if "reference" in needs:
        both = f"{key} {hook.reference}"
        if both not in opened:
            opened[both] = reference_of(hook.reference, run.source, opened[key])
        parts["reference"] = opened[both]
    return Wanted(hook.metric, hook.samples, **parts)


def _teacher(run: Run) -> Subject:
    """The run's own teacher at many steps. Raises UserError for a run without."""
    if run.config.model.teacher is None:
        raise UserError("the metric teacher_distance compares with a teacher, but this run has none: remove the hook")
    return of_run(f"teacher, {measure.TEACHER_STEPS} steps", run, *measure.teacher(run, measure.TEACHER_STEPS))


class Hooks:
    """The hooks of a run. Raises UserError for what a hook names and is not there."""

    def __init__(self, run: Run):
        self.run, self.hooks = run, run.config.evals.hooks
        opened: dict[str, Any] = {}
        self.wanted = {name: wanted_of(hook, run, opened) for name, hook in self.hooks.items()}

    def due(self, done: int) -> list[str]:
        last = done == self.run.config.steps
        return [name for name, hook in self.hooks.items() if done % hook.every == 0 or last]

    def measure(self, names: list[str]) -> tuple[dict[str, float], dict[str, Any]]:
        """The numbers of the hooks `names`, and their protocols by hook."""
        numbers: dict[str, float] = {}
        protocols: dict[str, Any] = {}
        for network in sorted({self.hooks[name].network for name in names}):
            mine = [name for name in names if self.hooks[name].network == network]
            scores = evaluate(self._subject(network), [self.wanted[name] for name in mine], self.run.at_once)
            for name, score in zip(mine, scores, strict=True):
                one = len(score.numbers) == 1
                numbers |= {name if one else f"{name}/{column}": value for column, value in score.numbers.items()}
                protocols[name] = {**score.protocol, "network": network}
        return numbers, protocols

    def _subject(self, network: str) -> Subject:
        raw = self.run.triad.generator if network == "raw" else measure.student(self.run)[0]
        return of_run("student", self.run, raw, self.run.rollout)  # type: ignore[arg-type]


class Best:
    """The checkpoint with the best value so far of the number that `evals.best` names, kept in best.json.

    There with the one `before` it: the file is written first, and until the checkpoint is, that one is the best.
    """

    def __init__(self, run: Run, file: Path, done: int):
        self.name, self.file = run.config.evals.best, file
        self.kept: dict[str, Any] | None = None
        if self.name is not None:
            hook = run.config.evals.hooks[self.name.split("/")[0]]
            self.sign = -1 if METRICS[hook.metric].better == "higher" else 1
            before = reading.fields(file, finite=False) if file.is_file() else {}
            rows = [row for row in (before, before.get("before")) if isinstance(row, dict) and _is_best(row)]
            self.kept = next((row for row in rows if row["step"] <= done), None)

    @property
    def step(self) -> int | None:
        """Of the checkpoint that is to be kept."""
        return None if self.kept is None else int(self.kept["step"])

    def improved(self, done: int, numbers: Mapping[str, float]) -> bool:
        """Whether `numbers` of this step are the best so far; if so they are noted."""
        if self.name is None or self.name not in numbers:
            return False
        value = numbers[self.name]
        if not math.isfinite(value):
            return False
        if self.kept is not None and self.sign * value >= self.sign * self.kept["value"]:
            return False
        before = {k: v for k, v in (self.kept or {}).items() if k != "before"}
        self.kept = {"name": self.name, "value": value, "step": done, **({"before": before} if before else {})}
        if processes.leads():
            write_text(self.file, json.dumps(self.kept, indent=1))
        return True


def _is_best(row: Mapping[str, Any]) -> bool:
    value = row.get("value")
    return isinstance(row.get("step"), int) and isinstance(value, int | float) and -math.inf < value < math.inf

"""Metrics of generated images: what each reads of an image, how its number is made, and the protocol beside it.

Images are made in small batches and forgotten; what is kept of each is a row of numbers. A number depends on the
seed and on which images were asked for, not on batches or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.core.errors import UserError
from fewstep.evals.diversity import same_label_diversity
from fewstep.evals.extractors import Extractor, TextExtractor
from fewstep.evals.frechet import Statistics, frechet_distance, kernel_distance
from fewstep.evals.neighbours import neighbours
from fewstep.evals.references import MOST_FEATURES, Reference
from fewstep.train import processes

NEAREST = 5
EACH = 8
"""images of one prompt, for the diversity among them"""


class Subject(Protocol):
    """What is measured: a generator, or a folder of pictures.

    `make(rows, asked)` gives the images (B, 3, H, W) in [-1, 1] of the noises `rows` (B,) and of what is asked for in
    the places `asked` (B,), which `captions(asked)` says in words. `count` is how many there are, None for no end.
    """

    @property
    def name(self) -> str: ...

    @property
    def passes(self) -> float | None:
        """Network passes an image, where that is known."""
        ...

    @property
    def count(self) -> int | None: ...

    @property
    def source(self) -> Mapping[str, Any]:
        """Seed, and what else decides which images are made."""
        ...

    def make(self, rows: Tensor, asked: Tensor) -> Tensor: ...

    def captions(self, asked: Tensor) -> list[str]: ...


@dataclass(frozen=True)
class Wanted:
    """One measurement: a metric of `METRICS` on so many images, with what it needs."""

    metric: str
    samples: int
    extractor: Extractor | None = None
    reference: Reference | None = None
    clip: TextExtractor | None = None
    teacher: Subject | None = None

    def __post_init__(self) -> None:
        for need in METRICS[self.metric].needs:
            if getattr(self, need) is None:
                raise ValueError(f"{self.metric} needs {need}")


@dataclass(frozen=True)
class Score:
    """Numbers by name, and the protocol that they are of."""

    numbers: Mapping[str, float]
    protocol: Mapping[str, Any]


Read = Callable[[Subject, Tensor, Tensor, Tensor], Tensor]
"""(subject, images, rows, asked) -> a row of numbers for each image (B, K)."""


@dataclass(frozen=True)
class Metric:
    """`read(wanted)` says what is kept of an image and under which name; `score(wanted, kept, subject)` its numbers.

    `better` is higher or lower; `each` images are made of one prompt.
    """

    better: str
    needs: tuple[str, ...]
    read: Callable[[Wanted], tuple[str, Read]]
    score: Callable[[Wanted, Tensor], dict[str, float]]
    each: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)
    """what the protocol says beside extractor and reference"""


def _features(wanted: Wanted) -> tuple[str, Read]:
    extractor = wanted.extractor
    assert extractor is not None
    return f"features {extractor.sha256}", lambda subject, images, rows, asked: extractor.features(images)


def _similarity(wanted: Wanted) -> tuple[str, Read]:
    clip = wanted.clip
    assert clip is not None

    def read(subject: Subject, images: Tensor, rows: Tensor, asked: Tensor) -> Tensor:
        pictures, texts = clip.features(images), clip.texts(subject.captions(asked))
        return (pictures * texts).sum(1, keepdim=True)

    return f"similarity {clip.sha256}", read


def _distance(wanted: Wanted) -> tuple[str, Read]:
    teacher = wanted.teacher
    assert teacher is not None

    def read(subject: Subject, images: Tensor, rows: Tensor, asked: Tensor) -> Tensor:
        apart = images - teacher.make(rows, asked)
        return apart.flatten(1).square().mean(1, keepdim=True).sqrt()

    return f"distance to {teacher.name}", read


def _frechet(wanted: Wanted, kept: Tensor) -> dict[str, float]:
    assert wanted.reference is not None
    return {"frechet": frechet_distance(Statistics.of(kept), wanted.reference.statistics)}


def _kernel(wanted: Wanted, kept: Tensor) -> dict[str, float]:
    assert wanted.reference is not None
    return {"kernel": kernel_distance(wanted.reference.features, kept[:MOST_FEATURES])}


def _neighbours(wanted: Wanted, kept: Tensor) -> dict[str, float]:
    assert wanted.reference is not None
    count = min(len(kept), len(wanted.reference.features))
    return dict(vars(neighbours(wanted.reference.features[:count], kept[:count], NEAREST)))


def _clip_score(wanted: Wanted, kept: Tensor) -> dict[str, float]:
    return {"clip_score": (100 * kept.double()).clamp(min=0).mean().item()}


def _diversity(wanted: Wanted, kept: Tensor) -> dict[str, float]:
    return {"prompt_diversity": same_label_diversity(kept, torch.arange(len(kept)) // EACH)}


def _teacher_distance(wanted: Wanted, kept: Tensor) -> dict[str, float]:
    return {"teacher_distance": kept.double().mean().item()}


METRICS: dict[str, Metric] = {
    "frechet": Metric("lower", ("extractor", "reference"), _features, _frechet),
    "kernel": Metric("lower", ("extractor", "reference"), _features, _kernel, facts={"kernel": "(x.y / D + 1)^3"}),
    "neighbours": Metric("higher", ("extractor", "reference"), _features, _neighbours, facts={"k": NEAREST}),
    "clip_score": Metric("higher", ("clip",), _similarity, _clip_score, facts={"score": "mean of max(100 cos, 0)"}),
    "prompt_diversity": Metric("higher", ("extractor",), _features, _diversity, EACH, {"images of a prompt": EACH}),
    "teacher_distance": Metric(
        "lower", ("teacher",), _distance, _teacher_distance, facts={"distance": "root mean square over values"}
    ),
}


def metric(name: str) -> Metric:
    """Raises UserError for a name that is none."""
    if name not in METRICS:
        raise UserError(f"a metric is one of {', '.join(METRICS)}, but '{name}' was given")
    return METRICS[name]


def evaluate(subject: Subject, wanted: Sequence[Wanted], batch: int, progress: bool = False) -> list[Score]:
    """Makes as many images as the most demanding of `wanted` needs, once, and scores each; over all processes."""
    kept: dict[tuple[int, str], list[Tensor]] = {}
    readers = [(METRICS[one.metric].each, one, *METRICS[one.metric].read(one)) for one in wanted]
    for each in sorted({each for each, *_ in readers}):
        mine = [(one, name, read) for its, one, name, read in readers if its == each]
        most = max(_count(subject, one) for one, _, _ in mine)
        for rows in _shown(_batches(most, batch), subject.name, progress):
            asked = rows // each
            images = subject.make(rows, asked)
            done: set[str] = set()
            for _, name, read in mine:
                if name not in done:
                    kept.setdefault((each, name), []).append(read(subject, images, rows, asked).cpu())
                    done.add(name)
    whole = {key: processes.together(torch.cat(parts)) for key, parts in kept.items()}
    return [
        Score(
            METRICS[one.metric].score(one, whole[each, name][: _count(subject, one)]),
            protocol(subject, one),
        )
        for each, one, name, _ in readers
    ]


def _count(subject: Subject, wanted: Wanted) -> int:
    return wanted.samples if subject.count is None else min(wanted.samples, subject.count)


def _batches(count: int, batch: int) -> Iterable[Tensor]:
    """The rows of this process, a batch at a time; as many for each, so that the last ones may lie beyond `count`."""
    each = -(-count // processes.size())
    return (torch.arange(each) + processes.rank() * each).split(batch)


def _shown(batches: Iterable[Tensor], name: str, progress: bool) -> Iterator[Tensor]:
    yield from tqdm(list(batches), desc=name, unit="batch", disable=not progress, leave=False, dynamic_ncols=True)


def protocol(subject: Subject, wanted: Wanted) -> dict[str, Any]:
    """What a number has to be quoted with."""
    chosen = METRICS[wanted.metric]
    said: dict[str, Any] = {"metric": wanted.metric, "samples": _count(subject, wanted), **subject.source}
    for part in (wanted.extractor, wanted.clip):
        if part is not None:
            said |= {"extractor": part.name, "weights_sha256": part.sha256, "resize": part.resize}
    if wanted.reference is not None:
        count, digest = wanted.reference.statistics.count, wanted.reference.sha256
        said |= {"reference": wanted.reference.protocol["of"], "reference_samples": count, "reference_sha256": digest}
    if wanted.teacher is not None:
        said["teacher"] = wanted.teacher.name
    return {**said, **chosen.facts}

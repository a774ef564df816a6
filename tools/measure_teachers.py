"""Stores the truth's statistics and the 50-step row of each built-in teacher beside its weights.

    python tools/measure_teachers.py [--samples 2000 10000] [assets/teachers/scenes-flow ...]

A teacher's row costs 50 network passes an image, so runs read it instead of measuring it again; it is only used
while the hash of the weights, the guidance and the resolution are the stored ones. A text-to-image teacher has a row
for each guidance from 1 to 3, of the smallest count of images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fewstep import build, config, measure
from fewstep.data.source import HELD_OUT, CaptionedSource, SceneSource
from fewstep.evals.frechet import Statistics
from fewstep.train.checkpoint import sha256

TRUTH_SAMPLES, PROMPTED_TRUTH_SAMPLES = 50_000, 20_000
KEPT_FEATURES = 10_000


def store_truth(source: SceneSource | CaptionedSource, count: int) -> None:
    """Mean and covariance of `count` true images, and the features of the first 10,000."""
    features, labels = measure.read_truth(source, count)
    statistics = Statistics.of(features)
    state = {
        "mean": statistics.mean,
        "covariance": statistics.covariance,
        "features": features[:KEPT_FEATURES].half(),
        "labels": labels[:KEPT_FEATURES],
    }
    target = measure.truth_file(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, target)
    record = {
        "samples": count,
        "seed": HELD_OUT,
        "reader_sha256": sha256(measure.reader_folder(source) / "reader.safetensors"),
        "floor": floor(source, statistics),
    }
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def floor(world: SceneSource | CaptionedSource, truth: Statistics) -> dict[str, float]:
    """Frechet distance of fresh true images to the stored truth, by sample count."""
    source, reader = type(world)(world.resolution, HELD_OUT + 1), measure.reader_of(world)
    features = torch.cat([reader.read(source.images(ids))[1] for ids in torch.arange(10_000).split(500)])
    return {str(n): measure.frechet_distance(Statistics.of(features[:n]), truth) for n in (2000, 10_000)}


def store_row(folder: Path, samples: list[int], guidance: float) -> None:
    """Generates the largest count once; smaller counts are its first images."""
    overrides = [f"model.teacher={folder}", f"model.guidance={guidance}"]
    run = build.build(config.load("configs/quickstart.yaml", overrides)[-1])
    truth, most = measure.truth_of(run.source), max(samples)
    net, rollout = measure.teacher(run, measure.TEACHER_STEPS)
    labels = measure.labels_of(run, most)
    images = measure.made(run, net, rollout, most, measure.SAMPLE_SEED, progress=True)
    speed = measure.measure("speed", run, net, rollout, truth, 100)
    rows = {}
    for count in samples:
        measured = measure.row("teacher, 50 steps", images[:count], labels[:count], truth, run.source)
        rows[str(count)] = measured | {k: speed[k] for k in ("passes", "images_per_second")}
        print(folder.name, count, {k: v for k, v in rows[str(count)].items() if k != "rare"})
    record = {
        "weights_sha256": measure.weights_sha256(folder),
        "guidance": guidance,
        "resolution": run.config.data.resolution,
        "protocol": measure.protocol(run, truth, most),
        "rows": rows,
    }
    (folder / "evals.json").write_text(json.dumps(record, indent=1) + "\n")


def store_prompted(folder: Path, count: int) -> None:
    """Whether 50 steps show what unseen captions say, at three guidances; each is stored when it is measured."""
    rows = {}
    for guidance in (1.0, 2.0, 3.0):
        overrides = [f"model.teacher={folder}", f"model.guidance={guidance}"]
        run = build.build(config.load("configs/t2i/dmd2.yaml", overrides)[-1])
        truth = measure.truth_of(run.source)
        rows[f"guidance {guidance:g}"] = measure.measure(
            "teacher, 50 steps", run, *measure.teacher(run, measure.TEACHER_STEPS), truth, count
        )
        print(folder.name, guidance, rows[f"guidance {guidance:g}"])
        record = {
            "weights_sha256": measure.weights_sha256(folder),
            "resolution": run.config.data.resolution,
            "protocol": measure.protocol(run, truth, count).split("; teacher guidance")[0] + ", deterministic sampler",
            "rows": rows,
        }
        (folder / "evals.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "teachers",
        nargs="*",
        default=sorted(p.parent for p in Path("assets/teachers").glob("scenes-*/model_index.json")),
        type=Path,
    )
    parser.add_argument("--samples", nargs="+", type=int, default=[2000, 10_000])
    parser.add_argument("--guidance", type=float, default=1.0)
    args = parser.parse_args()
    plain = [folder for folder in args.teachers if not (folder / "tokenizer").is_dir()]
    if plain:
        store_truth(SceneSource(16, 0), TRUTH_SAMPLES)
    if len(plain) < len(args.teachers):
        store_truth(CaptionedSource(64, 0), PROMPTED_TRUTH_SAMPLES)
    for folder in args.teachers:
        if folder in plain:
            store_row(folder, args.samples, args.guidance)
        else:
            store_prompted(folder, min(args.samples))


if __name__ == "__main__":
    main()

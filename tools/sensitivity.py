"""Which metric sees which damage first: true scenes are spoiled on purpose, little by little, and measured.

    python tools/sensitivity.py [--samples 2000] [--draws 8] [--out assets/benchmarks/sensitivity.json]

The yardstick is what other draws of true scenes score: a number is the distance from their mean in their standard
deviations, positive where it is worse. A metric sees a damage where that is above 4. Writes the numbers and a plot.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep import measure
from fewstep.data.scenes import ATTRIBUTES, LABELS, Scenes, law
from fewstep.data.source import HELD_OUT, SceneSource
from fewstep.evals.frechet import kernel_distance

SEEN = 4.0
BETTER = {
    "frechet": "lower",
    "kernel": "lower",
    "precision": "higher",
    "recall": "higher",
    "density": "higher",
    "coverage": "higher",
    "diversity": "higher",
    "label_accuracy": "higher",
    "law_distance": "lower",
    "rare_lost": "lower",
}


def blur(images: Tensor, rows: Tensor, strength: float) -> Tensor:
    """A Gaussian of `strength` pixels."""
    reach = torch.arange(-4, 5).float()
    kernel = torch.exp(-0.5 * (reach / strength).square())
    kernel = (kernel / kernel.sum()).view(1, 1, 9, 1).repeat(3, 1, 1, 1)
    padded = F.pad(images, (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def shifted_colour(images: Tensor, rows: Tensor, strength: float) -> Tensor:
    """`strength` of red taken away and given to blue."""
    return (images + strength * torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)).clamp(-1, 1)


def dropped_modes(images: Tensor, rows: Tensor, strength: float) -> Tensor:
    """The rarest looks whose shares add up to `strength` are replaced by other scenes of the same label."""
    gone, total = set(), 0.0
    for cell, share in sorted(law().items(), key=lambda item: item[1]):
        if total + share > strength:
            break
        gone.add(cell)
        total += share
    values = list(ATTRIBUTES.values())[2:]
    looks = [tuple(names[i] for names, i in zip(values, row[2:], strict=True)) for row in rows.tolist()]
    lost = torch.tensor([look in gone for look in looks])
    result, labels = images.clone(), rows[:, 0] * 3 + rows[:, 1]
    for label in labels[lost].unique():
        there = ((labels == label) & ~lost).nonzero().squeeze(1)
        places = ((labels == label) & lost).nonzero().squeeze(1)
        result[places] = images[there[torch.arange(len(places)) % len(there)]]
    return result


def duplicates(images: Tensor, rows: Tensor, strength: float) -> Tensor:
    """The share `strength` of the images are copies of others of their label."""
    result, labels = images.clone(), rows[:, 0] * 3 + rows[:, 1]
    for label in labels.unique():
        here = (labels == label).nonzero().squeeze(1)
        copies = round(strength * len(here))
        originals = here[copies:]
        result[here[:copies]] = images[originals[torch.arange(copies) % max(1, len(originals) // 4)]]
    return result


DAMAGES: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], tuple[float, ...]]] = {
    "blur (pixels)": (blur, (0.2, 0.3, 0.4, 0.6)),
    "dropped modes (share)": (dropped_modes, (0.01, 0.05, 0.20)),
    "shifted colour": (shifted_colour, (0.01, 0.03, 0.1, 0.3)),
    "duplicates (share)": (duplicates, (0.05, 0.2, 0.5, 0.8)),
}


def drawn(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes (N, 3, 16, 16), their labels in turn as models are asked for them, and their attributes (N, A)."""
    labels = torch.arange(count) % len(LABELS)
    made = Scenes(16, seed).of_label(torch.arange(count), labels)
    return made.images, labels, made.attributes


def scores(images: Tensor, labels: Tensor) -> dict[str, float]:
    source = SceneSource(16, 0)
    truth = measure.truth_of(source)
    row = measure.row("", images, labels, truth, source)
    features = measure.reader_of(source).read(images)[1]
    kept, total = map(int, row["rare_kept"].split("/"))
    row |= {"kernel": kernel_distance(truth.features[: len(images)], features), "rare_lost": float(total - kept)}
    return {name: float(row[name]) for name in BETTER}


def seen(samples: int, draws: int) -> dict[str, Any]:
    """The number of each metric for each damage and strength, and the first strength that it sees."""
    undamaged = [scores(*drawn(HELD_OUT + 10 + i, samples)[:2]) for i in range(draws)]
    yard = {name: torch.tensor([one[name] for one in undamaged]).double() for name in BETTER}
    images, labels, rows = drawn(HELD_OUT + 9, samples)
    found: dict[str, Any] = {}
    for name, (damage, strengths) in DAMAGES.items():
        found[name] = {f"{s:g}": _worse(scores(damage(images, rows, s), labels), yard) for s in strengths}
    return found


def _worse(row: Mapping[str, float], yard: Mapping[str, Tensor]) -> dict[str, float]:
    """How much worse each metric is than true draws, in their deviations; one that never varies counts in halves."""
    result = {}
    for name, better in BETTER.items():
        spread = yard[name].std().clamp(min=1e-9) if yard[name].std() > 0 else torch.tensor(0.5)
        apart = ((row[name] - yard[name].mean()) / spread).item()
        result[name] = round(apart if better == "lower" else -apart, 2)
    return result


def first_seen(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, str]:
    """For each damage the metrics that see the weakest strength that any of them sees, the surest first."""
    said = {}
    for name, strengths in found.items():
        for strength, row in strengths.items():
            if sure := sorted((metric for metric in row if row[metric] > SEEN), key=lambda metric: -row[metric]):
                said[name] = f"{', '.join(sure)} at {strength}"
                break
        else:
            said[name] = "none"
    return said


def plot(found: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [(f"{name} {strength}", row) for name, strengths in found.items() for strength, row in strengths.items()]
    values = torch.tensor([[row[metric] for metric in BETTER] for _, row in lines])
    figure, axis = pyplot.subplots(figsize=(9, 6.5), layout="constrained")
    shown = axis.imshow(values.clamp(0, 40).sqrt(), cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(BETTER)), [name.replace("_", " ") for name in BETTER], rotation=35, ha="right")
    axis.set_yticks(range(len(lines)), [name for name, _ in lines])
    for y, (_, row) in enumerate(lines):
        for x, metric in enumerate(BETTER):
            text, dark = f"{round(row[metric])}", values[y, x].clamp(0, 40).sqrt() < 4
            weight = "bold" if row[metric] > SEEN else "normal"
            axis.text(x, y, text, ha="center", va="center", color="white" if dark else "black", weight=weight, size=8)
    axis.set_title("how much worse than true scenes, in deviations of true draws (bold: seen)")
    figure.colorbar(shown, label="square root, cut at 40", shrink=0.7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks/sensitivity.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = seen(options.samples, options.draws)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "commit": commit,
        "date": f"{date.today():%Y-%m-%d}",
        "hardware": "CPU, 1 thread",
        "samples": options.samples,
        "draws": options.draws,
        "seen first by": first_seen(found),
        "worse": found,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    plot(found, options.out.with_suffix(".png"))
    print("\n".join(f"{name}: {said}" for name, said in record["seen first by"].items()))


if __name__ == "__main__":
    main()

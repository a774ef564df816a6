"""Train the reader of captioned scenes and write assets/caption_reader: about ten minutes on one core.

python tools/train_caption_reader.py [--steps 1500] [--seed 17] [--out assets/caption_reader]

A run that was stopped continues, and gives the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
from readers import roughen, write
from resumable import fit
from torch import Tensor

from fewstep.core.draw import Draw
from fewstep.data.captioned import ATTRIBUTES, CaptionedScenes, canonical
from fewstep.evals.captions import caption_accuracy
from fewstep.evals.reader import Reader

RESOLUTION = 32
LAYERS = ((32, 2), (64, 1), (96, 2), (96, 1))
BATCH = 128
RATE = 3e-3
NOISE = 0.15
HELD_OUT = 20_000
HELD_OUT_SEED = 90_017
SHOWN_AT = 64
STATE = Path("runs/t2i/caption_reader.state")


def training_batch(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Fresh scenes (128,3,32,32) and their rows, every combination of objects and relation equally often."""
    ids = torch.arange(step * BATCH, (step + 1) * BATCH)
    draw = Draw(seed, 0, ids)
    columns = [draw.integers(f"reader.{name}", len(values)) for name, values in ATTRIBUTES.items()]
    rows = torch.stack(columns, 1)
    count = rows[:, 0]
    rows[:, 1] = count * (1 + draw.integers("reader.relation", len(ATTRIBUTES["relation"]) - 1))
    for column, (name, values) in enumerate(ATTRIBUTES.items()):
        if name.startswith("second"):
            rows[:, column] = count * (1 + draw.integers(f"reader.{name}", len(values) - 1))
    places = len(ATTRIBUTES["place"]) - 1
    rows[:, -1] = torch.where(count == 1, places, draw.integers("reader.place", places))
    return CaptionedScenes(RESOLUTION, seed).of_attributes(ids, rows), canonical(rows)


def train(seed: int, steps: int) -> Reader:
    torch.manual_seed(seed)
    reader = Reader(ATTRIBUTES, RESOLUTION, LAYERS)

    def loss(step: int) -> Tensor:
        images, rows = training_batch(seed, step)
        logits, _ = reader(roughen(images, Draw(seed, step, torch.arange(BATCH)), NOISE))
        return torch.stack([F.cross_entropy(one, rows[:, i]) for i, one in enumerate(logits)]).sum()

    fit({"reader": reader}, loss, steps, RATE, STATE)
    return reader


def measured(reader: Reader) -> dict[str, object]:
    """Accuracy of each attribute, recall of each value and of whole captions on scenes of another seed."""
    scenes, ids = CaptionedScenes(SHOWN_AT, HELD_OUT_SEED), torch.arange(HELD_OUT)
    images = torch.cat([scenes.images(chunk) for chunk in ids.split(1000)])
    truth = canonical(scenes.attributes(ids))
    whole = caption_accuracy(reader, images, truth)
    captions = caption_accuracy(reader, images, canonical(scenes.said(ids)))
    right = reader.read(images)[0] == truth
    recall = {
        f"{name}={value}": right[truth[:, column] == index, column].double().mean().item()
        for column, (name, values) in enumerate(ATTRIBUTES.items())
        for index, value in enumerate(values)
        if (truth[:, column] == index).any()
    }
    return {
        "held_out": {"seed": HELD_OUT_SEED, "count": HELD_OUT, "resolution": SHOWN_AT},
        "accuracy": whole.attributes,
        "everything": {"all": whole.all, "one": whole.one, "two": whole.two},
        "captions": {"all": captions.all, "one": captions.one, "two": captions.two},
        "recall": recall,
    }


def made(seed: int, steps: int) -> dict[str, object]:
    """What the reader is and where it comes from."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "attributes": ATTRIBUTES,
        "resolution": RESOLUTION,
        "layers": LAYERS,
        "seed": seed,
        "steps": steps,
        "batch": BATCH,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--out", type=Path, default=Path("assets/caption_reader"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    write(train(options.seed, options.steps), options.out, made(options.seed, options.steps), measured)


if __name__ == "__main__":
    main()

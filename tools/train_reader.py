"""Train the reader on scenes and write assets/reader: a few minutes on one core, the same on every run.

python tools/train_reader.py [--steps 2000] [--seed 7] [--out assets/reader]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from readers import roughen, write
from torch import Tensor

from fewstep.core.draw import Draw
from fewstep.data.scenes import ATTRIBUTES, SceneBatch, Scenes, law
from fewstep.evals.reader import Reader

BATCH = 192
CANDIDATES = 512
LEARNING_RATE = 3e-3
NOISE = 0.12
HELD_OUT = 20_000
HELD_OUT_SEED = 90_001
COMMON = 0.01


def keep_table() -> Tensor:
    """(count, position, size, texture) chance to keep a scene, so that rare combinations weigh more."""
    names = [ATTRIBUTES[name] for name in ("count", "position", "size", "texture")]
    table = torch.zeros([len(values) for values in names])
    for cell, share in law().items():
        place = tuple(values.index(value) for values, value in zip(names, cell, strict=True))
        table[place] = min(1.0, (COMMON / share) ** 0.5)
    return table


def training_batch(seed: int, step: int, table: Tensor) -> SceneBatch:
    """BATCH fresh scenes, of which rare combinations are a larger share than the law gives them."""
    ids = torch.arange(step * CANDIDATES, (step + 1) * CANDIDATES)
    scenes = Scenes(16, seed).sample(ids)
    chance = table[tuple(scenes.attributes[:, 2:].unbind(1))]
    # the kept ones come first, and all in the order of their ids
    first = (Draw(seed, 0, ids).uniform("reader.keep") >= chance).long().sort(stable=True).indices[:BATCH]
    return SceneBatch(scenes.images[first], scenes.labels[first], scenes.attributes[first])


def train(seed: int, steps: int) -> Reader:
    torch.manual_seed(seed)
    reader, table = Reader(ATTRIBUTES), keep_table()
    optimiser = torch.optim.AdamW(reader.parameters(), LEARNING_RATE, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = training_batch(seed, step, table)
        logits, _ = reader(roughen(batch.images, Draw(seed, step, torch.arange(BATCH)), NOISE))
        losses = [F.cross_entropy(one, batch.attributes[:, i]) for i, one in enumerate(logits)]
        loss = torch.stack(losses).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        if step % 100 == 99:
            print(f"step {step + 1:5d}  loss {loss.item():.4f}", flush=True)
    return reader


def measured(reader: Reader) -> dict[str, object]:
    """Accuracy of each attribute and recall of each value on scenes of another seed."""
    accuracy, recall = {}, {}
    scenes = Scenes(16, HELD_OUT_SEED).sample(torch.arange(HELD_OUT))
    right = reader.read(scenes.images)[0] == scenes.attributes
    for column, (name, values) in enumerate(ATTRIBUTES.items()):
        accuracy[name] = right[:, column].double().mean().item()
        for index, value in enumerate(values):
            shown = scenes.attributes[:, column] == index
            recall[f"{name}={value}"] = right[shown, column].double().mean().item()
    return {"held_out": {"seed": HELD_OUT_SEED, "count": HELD_OUT}, "accuracy": accuracy, "recall": recall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("assets/reader"))
    options = parser.parse_args()
    made = {"attributes": ATTRIBUTES, "seed": options.seed, "steps": options.steps, "batch": BATCH}
    write(train(options.seed, options.steps), options.out, made, measured)


if __name__ == "__main__":
    main()

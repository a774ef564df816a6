"""Train the CLIP of captioned scenes and write assets/scenes_clip: about forty minutes on one core.

python tools/train_scenes_clip.py [--steps 1000] [--seed 23] [--out assets/scenes_clip]

The network, its tokenizer and its loss are those of open_clip. A run that was stopped continues, and gives the same
weights as one that was not.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch
from open_clip.loss import ClipLoss
from readers import roughen
from resumable import fit
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fewstep.core.draw import Draw
from fewstep.data.altered import CHANGES, altered, holds
from fewstep.data.captioned import ATTRIBUTES, UNSAID, CaptionedScenes, canonical, caption
from fewstep.evals.clip import Clip

RESOLUTION = 64
CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": RESOLUTION, "layers": [1, 1, 1, 1], "width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 3},
    },
    "preprocess_cfg": {"size": RESOLUTION, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
}
SCENES = 20_000
BATCH = 128
WRONG = 3
UNSAID_SHARE = 0.2
NOISE = 0.1
RATE = 2e-3
LARGEST_SCALE = 100.0
HELD_OUT = 10_000
HELD_OUT_SEED = 90_023
# Two lessons, since who lies above whom is learned last and only under pressure: what every caption is tried against.
LESSONS: dict[Path, tuple[str, ...]] = {
    Path("runs/t2i/scenes_clip.state"): (),
    Path("runs/t2i/scenes_clip_order.state"): ("relation", "order"),
}


class TrueLoss(ClipLoss):
    """The symmetric loss of CLIP, where a caption that is true of another image as well is no negative of it.

    More texts than images may be given: the first are the images' own, the rest are negatives for every image.
    """

    also_true: Tensor

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        per_image, _ = super().get_logits(image_features, text_features, logit_scale, logit_bias)
        per_image = per_image.masked_fill(self.also_true, -torch.inf)
        return per_image, per_image[:, : len(per_image)].T


def balanced(seed: int, ids: Tensor) -> Tensor:
    """What is there in the scenes `ids`: rows (B,K), every combination of objects and relation equally often."""
    draw = Draw(seed, 0, ids)
    rows = torch.stack([draw.integers(f"clip.{name}", len(values)) for name, values in ATTRIBUTES.items()], 1)
    count = rows[:, 0]
    for column, (name, values) in enumerate(ATTRIBUTES.items()):
        if values[0] == "none":
            rows[:, column] = count * (1 + draw.integers(f"clip.{name}", len(values) - 1))
    places = len(ATTRIBUTES["place"]) - 1
    rows[:, -1] = torch.where(count == 1, places, draw.integers("clip.place", places))
    return rows


def told(rows: Tensor, draw: Draw) -> Tensor:
    """What captions of `rows` (B,K) say: now and then not a colour or a size, never the place of a single shape."""
    said = rows.clone()
    for column, (name, values) in enumerate(ATTRIBUTES.items()):
        if name.endswith(("colour", "size")):
            there = rows[:, column] >= int(values[0] == "none")
            said[there & (draw.uniform(f"clip.unsaid {name}") < UNSAID_SHARE), column] = UNSAID
    said[rows[:, 0] == 0, -1] = UNSAID
    return said


def wrong(said: Tensor, draw: Draw, always: tuple[str, ...]) -> Tensor:
    """(B * WRONG, K): for each row of `said` some with one thing altered, those `always` and others by chance.

    A row that does not say enough to be altered so often is repeated as it is.
    """
    options = torch.stack([altered(said, change, draw) for change in CHANGES], 1)
    differs = (options != said[:, None]).any(-1)
    wanted = 1 + torch.tensor([change in always for change in CHANGES]).int()
    chosen = (draw.uniform("clip.change", (len(CHANGES),)) + wanted * differs).topk(WRONG, 1).indices
    return torch.cat([options[torch.arange(len(said)), one] for one in chosen.unbind(1)])


@functools.cache
def rendered(seed: int) -> tuple[Tensor, Tensor]:
    """The training scenes: images (N,3,R,R) uint8, to fit into memory, and their rows (N,K)."""
    ids = torch.arange(SCENES)
    rows, scenes = balanced(seed, ids), CaptionedScenes(RESOLUTION, seed)
    chunks: Iterator[Tensor] = tqdm(ids.split(500), desc="rendering", unit_scale=500, unit="scene")
    images = [(scenes.of_attributes(chunk, rows[chunk]) * 127.5 + 127.5).round().byte() for chunk in chunks]
    return torch.cat(images), rows


def train(seed: int, steps: int) -> open_clip.CLIP:
    torch.manual_seed(seed)
    clip, loss_of = open_clip.CLIP(**CONFIG["model_cfg"]), TrueLoss()
    clip.visual.to(memory_format=torch.channels_last)
    tokens = functools.cache(open_clip.SimpleTokenizer(context_length=clip.context_length))

    def loss(always: tuple[str, ...], first: int, step: int) -> Tensor:
        draw = Draw(seed, first + step, torch.arange(BATCH))
        images, rows = (kept[draw.integers("clip.scene", SCENES)] for kept in rendered(seed))
        said = told(rows, draw)
        asked = torch.cat([said, wrong(said, draw, always)])
        loss_of.also_true = holds(canonical(rows)[:, None], canonical(asked)).fill_diagonal_(False)
        rough = roughen(images / 127.5 - 1, draw, NOISE).to(memory_format=torch.channels_last)
        seen = clip.encode_image(rough, normalize=True)
        texts = torch.cat([tokens(caption(row)) for row in asked.tolist()])
        return loss_of(seen, clip.encode_text(texts, normalize=True), clip.logit_scale.exp().clamp(max=LARGEST_SCALE))

    for lesson, (state, always) in enumerate(LESSONS.items()):
        fit({"clip": clip}, functools.partial(loss, always, lesson * steps), steps, RATE, state)
    return clip


def measured(folder: Path) -> dict[str, object]:
    """How often the right caption is ranked above a wrong one on scenes of another seed; larger is better, 1 is all."""
    clip, scenes, ids = Clip(folder), CaptionedScenes(RESOLUTION, HELD_OUT_SEED), torch.arange(HELD_OUT)
    images = torch.cat([clip.features(scenes.images(chunk)) for chunk in ids.split(500)])
    said, seen, draw = scenes.said(ids), canonical(scenes.attributes(ids)), Draw(HELD_OUT_SEED, 1, ids)

    def cosines(rows: Tensor) -> Tensor:
        return (images * clip.texts([caption(row) for row in rows.tolist()])).sum(1)

    def share(other: Tensor) -> dict[str, float]:
        false = ~holds(seen, canonical(other))
        above = (right > cosines(other))[false]
        return {"ranked": above.double().mean().item(), "count": len(above)}

    right = cosines(said)
    return {
        "held_out": {"seed": HELD_OUT_SEED, "count": HELD_OUT, "resolution": RESOLUTION},
        "score": 100 * right.clamp(min=0).mean().item(),
        "another": share(said.roll(1, 0)),
        "altered": {change: share(altered(said, change, draw)) for change in CHANGES},
    }


def write(clip: open_clip.CLIP, folder: Path, made: dict[str, object]) -> None:
    """Stores half-precision weights as open_clip's `local-dir:` expects them, then measures what was stored."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "open_clip_model.safetensors"
    halves = {name: value.half() if value.is_floating_point() else value for name, value in clip.state_dict().items()}
    save_file({name: value.contiguous() for name, value in halves.items()}, weights)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    protocol = made | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()} | measured(folder)
    (folder / "clip.json").write_text(json.dumps(protocol, indent=2) + "\n")
    print(json.dumps(protocol, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=23)
    parser.add_argument("--out", type=Path, default=Path("assets/scenes_clip"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    clip = train(options.seed, options.steps)
    write(clip, options.out, {"seed": options.seed, "steps": options.steps, "batch": BATCH, "scenes": SCENES})


if __name__ == "__main__":
    main()

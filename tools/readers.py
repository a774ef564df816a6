"""What the two readers have in common while they are made: rough images to learn from, and what is stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.draw import Draw
from fewstep.evals.reader import Reader, load_reader


def roughen(images: Tensor, draw: Draw, noise: float) -> Tensor:
    """Each image (B,3,H,W) with its own blur and its own amount of noise, since generated ones are never quite clean.

    `noise` is the largest deviation. Features that live with it do not hang on exact pixels.
    """
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = (draw.uniform("reader.blur", (1, 1, 1)) - 0.5).clamp(min=0)
    level = noise * draw.uniform("reader.level", (1, 1, 1))
    return torch.lerp(images, blurred, amount) + level * draw.normal("reader.noise", images.shape[1:])


def write(
    reader: Reader, folder: Path, made: dict[str, object], measured: Callable[[Reader], dict[str, object]]
) -> None:
    """Stores half-precision weights and how they were `made`, then measures what was stored and adds that."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "reader.safetensors"
    save_file({name: value.half().contiguous() for name, value in reader.state_dict().items()}, weights)
    protocol = made | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    (folder / "reader.json").write_text(json.dumps(protocol, indent=2) + "\n")
    protocol |= measured(load_reader(folder))
    (folder / "reader.json").write_text(json.dumps(protocol, indent=2) + "\n")
    print(json.dumps(protocol, indent=2))

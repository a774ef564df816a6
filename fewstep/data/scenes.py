"""Scenes: an endless procedural world of shapes whose law is known exactly.

A label names a kind and a colour. Everything else about a scene (count, position, size, texture) is drawn
independently of the label from a law that is far from uniform, so that what a generator loses can be counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.draw import Draw

KINDS = ("disc", "square", "triangle", "ring")
COLOURS = ("red", "green", "blue")
LABELS = tuple(f"{colour} {kind}" for kind in KINDS for colour in COLOURS)

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "colour": COLOURS,
    "count": ("one", "two"),
    "position": ("centre", "left", "right", "top", "bottom", "beside", "stacked"),
    "size": ("small", "medium", "large"),
    "texture": ("plain", "halved", "striped"),
}

# Probabilities in the order of ATTRIBUTES; position and size have one row for each count.
_COUNT = [0.92, 0.08]
_POSITION = [[0.45, 0.25, 0.18, 0.09, 0.03, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.75, 0.25]]
_SIZE = [[0.30, 0.67, 0.03], [0.80, 0.20, 0.0]]
_TEXTURE = [0.70, 0.26, 0.04]

# Lengths are fractions of the image width. At 64 pixels the outermost shapes still leave the edge free.
_RADII = [0.165, 0.220, 0.300]
_RADIUS_JITTER = 0.035
_CENTRES = [[0.0, 0.0], [-0.16, 0.0], [0.16, 0.0], [0.0, -0.16], [0.0, 0.16], [0.0, 0.0], [0.0, 0.0]]
_TWIN_OFFSETS = [[0.0, 0.0]] * 5 + [[0.245, 0.0], [0.0, 0.245]]
_CENTRE_JITTER = 0.010

# RGB in [0, 1]. Backgrounds stay in a grey middle range, away from the shapes, their shade and near-white.
_RGB = [[0.88, 0.10, 0.12], [0.08, 0.62, 0.16], [0.10, 0.18, 0.86]]
_RGB_JITTER = 0.05
_SHADE = 0.28
_NEAR_WHITE = 0.97
_GREY = (0.46, 0.76)
_TINT = 0.05

# In units of the radius: half side of a square, circumradius of a triangle, inner radius of a ring, and where
# the two white stripes lie on either side of the middle.
_SQUARE = 0.87
_TRIANGLE = 1.15
_HOLE = 0.52
_STRIPE_CENTRE = 0.5
_STRIPE_WIDTH = 0.5


@dataclass(frozen=True)
class SceneBatch:
    """`images` (N,3,H,W) float32 in [-1,1], `labels` (N,) int64, `attributes` (N,6) int64 by ATTRIBUTES."""

    images: Tensor
    labels: Tensor
    attributes: Tensor


def law() -> dict[tuple[str, ...], float]:
    """Exact joint probability of every possible (count, position, size, texture); the values sum to 1."""
    names = [ATTRIBUTES[name] for name in ("count", "position", "size", "texture")]
    cells: dict[tuple[str, ...], float] = {}
    for c, p, s, t in itertools.product(*(range(len(values)) for values in names)):
        probability = _COUNT[c] * _POSITION[c][p] * _SIZE[c][s] * _TEXTURE[t]
        if probability > 0:
            cells[names[0][c], names[1][p], names[2][s], names[3][t]] = probability
    return cells


def caption(attributes_row: Tensor | Sequence[int]) -> str:
    """One sentence for one row (6,) of attributes; rows that differ have captions that differ."""
    values = zip(ATTRIBUTES.values(), attributes_row, strict=True)
    kind, colour, count, position, size, texture = (names[int(index)] for names, index in values)
    place = {
        "centre": "in the centre",
        "left": "on the left",
        "right": "on the right",
        "top": "at the top",
        "bottom": "at the bottom",
        "beside": "side by side",
        "stacked": "one above the other",
    }[position]
    article, plural = ("two", "s") if count == "two" else ("a", "")
    words = [article, size, *([] if texture == "plain" else [texture]), colour, kind + plural, place]
    return " ".join(words)


def choose(uniform: Tensor, probabilities: Tensor) -> Tensor:
    """Inverse-transform draw (N,) int64 from the rows of `probabilities` (N,K) or (K,)."""
    # float64, so that rounding of the sums can never let a value of probability zero through
    edges = probabilities.double().cumsum(-1)[..., :-1]
    return (uniform.double()[:, None] >= edges).sum(1)


def table(rows: Sequence[object], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device=like.device)


def jitter(draw: Draw, purpose: str, shape: Sequence[int], size: float) -> Tensor:
    return (2 * draw.uniform(purpose, shape) - 1) * size


def _attributes(draw: Draw, labels: Tensor) -> Tensor:
    count = choose(draw.uniform("scenes.count"), table(_COUNT, labels))
    position = choose(draw.uniform("scenes.position"), table(_POSITION, labels)[count])
    size = choose(draw.uniform("scenes.size"), table(_SIZE, labels)[count])
    texture = choose(draw.uniform("scenes.texture"), table(_TEXTURE, labels))
    kind, colour = labels // len(COLOURS), labels % len(COLOURS)
    return torch.stack([kind, colour, count, position, size, texture], 1)


def pixel_centres(resolution: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """x (1,1,R) to the right and y (1,R,1) downwards, in [-1/2, 1/2]."""
    axis = (torch.arange(resolution, device=like.device) + 0.5) / resolution - 0.5
    return axis[None, None, :], axis[None, :, None]


def background(draw: Draw, resolution: int) -> Tensor:
    """(N,3,R,R): a linear gradient in a random direction between two greyish tones."""
    grey = _GREY[0] + (_GREY[1] - _GREY[0]) * draw.uniform("scenes.grey", (2, 1))
    tones = (grey + jitter(draw, "scenes.tint", (2, 3), _TINT))[:, :, :, None, None]
    angle = 2 * math.pi * draw.uniform("scenes.angle", (1, 1))
    x, y = pixel_centres(resolution, angle)
    mix = (0.5 + (x * angle.cos() + y * angle.sin()) / math.sqrt(2))[:, None]
    return torch.lerp(tones[:, 0], tones[:, 1], mix)


def _local(draw: Draw, position: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Coordinates (N,R,R) x and y of each pixel relative to the nearer object's centre."""
    centre = table(_CENTRES, position)[position] + jitter(draw, "scenes.centre", (2,), _CENTRE_JITTER)
    twin = table(_TWIN_OFFSETS, position)[position]
    local = []
    for axis, pixels in enumerate(pixel_centres(resolution, position)):
        offset = pixels - centre[:, axis, None, None]
        # twins never cross the line between them, so the sign of the offset says which one is nearer
        local.append(offset - torch.where(offset > 0, 1.0, -1.0) * twin[:, axis, None, None])
    x, y = torch.broadcast_tensors(*local)
    return x, y


def distance(kind: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance (N,R,R) to the outline of each shape, negative inside."""
    norm = torch.sqrt(x * x + y * y)
    circum = _TRIANGLE * radius
    side = math.sqrt(0.75) * x.abs() - 0.5 * (y + 0.25 * circum) - 0.25 * circum
    shapes = torch.stack(
        [
            norm - radius,
            torch.maximum(x.abs(), y.abs()) - _SQUARE * radius,
            torch.maximum(y - 0.75 * circum, side),
            (norm - 0.5 * (1 + _HOLE) * radius).abs() - 0.5 * (1 - _HOLE) * radius,
        ]
    )
    return shapes[kind, torch.arange(len(kind), device=kind.device)]


def paints(draw: Draw, colour: Tensor) -> tuple[Tensor, Tensor, float]:
    """The colour (N,3,1,1) of the object, its dark shade and the near-white of stripes."""
    base = table(_RGB, colour)[colour] + jitter(draw, "scenes.colour", (3,), _RGB_JITTER)
    base = base.clamp(0, 1)[:, :, None, None]
    return base, _SHADE * base, _NEAR_WHITE


def _surface(draw: Draw, attributes: Tensor, x: Tensor, y: Tensor, radius: Tensor, resolution: int) -> Tensor:
    """(N,3,R,R): the paint of the object, wherever the object may be."""
    kind, colour, texture = attributes[:, 0], attributes[:, 1], attributes[:, 5, None, None]
    base, shade, white = paints(draw, colour)
    # a triangle is split at its centroid, or its upper half would be too little to show the colour
    split = torch.where(kind[:, None, None] == KINDS.index("triangle"), 0.25 * _TRIANGLE * radius, 0.0)
    lower = (0.5 + (y - split) * resolution).clamp(0, 1)
    outside = (x.abs() - _STRIPE_CENTRE * radius).abs() - 0.5 * _STRIPE_WIDTH * radius
    band = (0.5 - outside * resolution).clamp(0, 1)
    lower = torch.where(texture == 1, lower, 0.0)[:, None]
    band = torch.where(texture == 2, band, 0.0)[:, None]
    return base + lower * (shade - base) + band * (white - base)


def _render(draw: Draw, attributes: Tensor, resolution: int) -> Tensor:
    kind, position, size = attributes[:, 0], attributes[:, 3], attributes[:, 4]
    radius = table(_RADII, size)[size] * (1 + jitter(draw, "scenes.radius", (), _RADIUS_JITTER))
    radius = radius[:, None, None]
    x, y = _local(draw, position, resolution)
    coverage = (0.5 - distance(kind, x, y, radius) * resolution).clamp(0, 1)[:, None]
    surface = _surface(draw, attributes, x, y, radius, resolution)
    return 2 * torch.lerp(background(draw, resolution), surface, coverage) - 1


@dataclass(frozen=True)
class Scenes:
    """The scenes of one seed as square images; scene i is a pure function of (seed, i)."""

    resolution: int = 16
    seed: int = 0

    def sample(self, ids: Tensor) -> SceneBatch:
        """The scenes `ids` (N,) int64, labels uniform on LABELS; made on the device of `ids`."""
        return self.of_label(ids, Draw(self.seed, 0, ids).integers("scenes.label", len(LABELS)))

    def of_label(self, ids: Tensor, labels: Tensor) -> SceneBatch:
        """The scenes `ids` (N,) with their kind and colour replaced by those of `labels` (N,) int64."""
        draw = Draw(self.seed, 0, ids)
        attributes = _attributes(draw, labels)
        return SceneBatch(_render(draw, attributes, self.resolution), labels, attributes)

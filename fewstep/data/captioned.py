"""Captioned scenes: an endless world of one or two shapes and sentences about them, whose law is known exactly.

What a caption says is drawn independently of what is there, and where a single shape lies is never said, so a caption
leaves things open and what a generator loses of them can be counted. The background, the exact places, radii and tones
vary with every scene and are in no caption.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from fewstep.core.draw import Draw
from fewstep.core.errors import UserError
from fewstep.data.scenes import COLOURS, KINDS, background, choose, distance, jitter, paints, pixel_centres, table

SIZES = ("small", "medium", "large")
RELATIONS = ("above", "below", "left of", "right of")
PLACES = ("centre", "left", "right", "top", "bottom")
UNSAID = -1

# The columns of a row. With one object the second one and the relation are `none`; with two the place is `apart`.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "count": ("one", "two"),
    "relation": ("none", *RELATIONS),
    "kind": KINDS,
    "colour": COLOURS,
    "size": SIZES,
    "second kind": ("none", *KINDS),
    "second colour": ("none", *COLOURS),
    "second size": ("none", *SIZES),
    "place": (*PLACES, "apart"),
}
_FIRST, _SECOND = slice(2, 5), slice(5, 8)
_COUNT_COLUMN, _RELATION_COLUMN, _PLACE_COLUMN = 0, 1, 8

# Probabilities in the order of the names above; all attributes are independent of each other.
_COUNT = [0.60, 0.40]
_RELATION = [0.35, 0.15, 0.30, 0.20]
_KIND = [0.36, 0.30, 0.24, 0.10]
_COLOUR = [0.45, 0.35, 0.20]
_SIZE = [0.45, 0.40, 0.15]
_PLACE = [0.40, 0.28, 0.18, 0.10, 0.04]
# Of an object are said: everything, all but the size, all but the colour, only the kind.
_SAID = [0.70, 0.15, 0.10, 0.05]

# Lengths are fractions of the image width. Two large shapes never touch each other or the edge.
_RADII = [0.105, 0.150, 0.205]
_RADIUS_JITTER = 0.035
_CENTRES = [[0.0, 0.0], [-0.2, 0.0], [0.2, 0.0], [0.0, -0.2], [0.0, 0.2], [0.0, 0.0]]
_CENTRE_JITTER = 0.03
# Where the first of two objects lies; the second one is opposite.
_SIDES = [[0.0, 0.0], [0.0, -1.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]]
_APART = 0.23
_SHIFT = 0.02
_ACROSS = 0.06

_EXAMPLES = "'a small green disc' or 'a large red ring above a small blue square'"
_OPPOSITE = torch.tensor([0, 2, 1, 4, 3])


def law() -> dict[tuple[str, ...], float]:
    """Exact joint probability of every possible row, as the names of its values; the values sum to 1."""
    objects = [
        ((kind, colour, size), p * q * r)
        for (kind, p), (colour, q), (size, r) in itertools.product(
            zip(KINDS, _KIND, strict=True), zip(COLOURS, _COLOUR, strict=True), zip(SIZES, _SIZE, strict=True)
        )
    ]
    nothing = ("none",) * 3
    cells: dict[tuple[str, ...], float] = {
        ("one", "none", *names, *nothing, place): _COUNT[0] * p * q
        for (names, p), (place, q) in itertools.product(objects, zip(PLACES, _PLACE, strict=True))
    }
    pairs = itertools.product(objects, objects, zip(RELATIONS, _RELATION, strict=True))
    cells |= {
        ("two", relation, *first, *second, "apart"): _COUNT[1] * p * q * r
        for (first, p), (second, q), (relation, r) in pairs
    }
    return cells


def law_given(row: Sequence[int] | Tensor) -> dict[tuple[str, ...], float]:
    """The law of the scenes that a row (K,) with unsaid values allows; the values sum to 1.

    Exact also given the caption, since what is said does not depend on what is there.
    """
    said = [None if index == UNSAID else names[int(index)] for names, index in _columns(row)]
    cells = {
        cell: share
        for cell, share in law().items()
        if all(one in (None, other) for one, other in zip(said, cell, strict=True))
    }
    total = sum(cells.values())
    return {cell: share / total for cell, share in cells.items()}


def caption(row: Sequence[int] | Tensor) -> str:
    """The sentence of a row (K,) that may hold unsaid values; the place is never said."""
    values = ["" if index == UNSAID else names[int(index)] for names, index in _columns(row)]
    objects = [["a", size, colour, kind] for kind, colour, size in (values[_FIRST], values[_SECOND])]
    words = objects[0] if values[_COUNT_COLUMN] == "one" else [*objects[0], values[_RELATION_COLUMN], *objects[1]]
    return " ".join(word for word in words if word)


def attributes_of(sentence: str) -> list[int]:
    """The row (K,) that a caption says, with UNSAID for the rest.

    Raises UserError for a sentence that is no caption, naming the first word that does not belong.
    """
    words = sentence.casefold().replace(",", " ").rstrip(" .").split()
    first, rest = _object(words, sentence)
    if not rest:
        return [0, 0, *first, 0, 0, 0, UNSAID]
    relation, rest = _relation(rest, sentence)
    second, rest = _object(rest, sentence)
    if rest:
        _refuse(sentence, rest[0], ())
    shifted = [value if value == UNSAID else value + 1 for value in second]
    return [1, relation, *first, *shifted, ATTRIBUTES["place"].index("apart")]


def rows_of(sentences: Sequence[str]) -> Tensor:
    """What captions ask to be seen: (N,K) int64, the canonical rows of what they say. Raises UserError."""
    return canonical(torch.tensor([attributes_of(sentence) for sentence in sentences]).reshape(-1, len(ATTRIBUTES)))


def canonical(rows: Tensor) -> Tensor:
    """Rows (N,K) as one can see them: the object above or to the left comes first, whichever was named first."""
    turned = (rows[:, _RELATION_COLUMN] == 2) | (rows[:, _RELATION_COLUMN] == 4)
    other = exchanged(rows)
    other[:, _RELATION_COLUMN] = _OPPOSITE.to(rows.device)[rows[:, _RELATION_COLUMN]]
    return torch.where(turned[:, None], other, rows)


def exchanged(rows: Tensor) -> Tensor:
    """Rows (N,K) of two objects with each in the other's place and the relation as it was."""
    other = rows.clone()
    other[:, _FIRST] = torch.where(rows[:, _SECOND] == UNSAID, UNSAID, rows[:, _SECOND] - 1)
    other[:, _SECOND] = torch.where(rows[:, _FIRST] == UNSAID, UNSAID, rows[:, _FIRST] + 1)
    return other


def _columns(row: Sequence[int] | Tensor) -> list[tuple[tuple[str, ...], int]]:
    return [(names, int(index)) for names, index in zip(ATTRIBUTES.values(), row, strict=True)]


def _indices(names: Sequence[str]) -> list[int]:
    """The row of a cell's names."""
    return [values.index(name) for values, name in zip(ATTRIBUTES.values(), names, strict=True)]


def _refuse(sentence: str, word: str, allowed: Sequence[str]) -> NoReturn:
    near = difflib.get_close_matches(word, allowed, 1)
    hint = f"did you mean '{near[0]}'? " if near else f"allowed here: {', '.join(allowed)}. " if allowed else ""
    where = f"at '{word}'" if word else "to its end"
    raise UserError(f"the caption '{sentence}' cannot be read {where}: {hint}Write it like {_EXAMPLES}")


def _object(words: list[str], sentence: str) -> tuple[list[int], list[str]]:
    """The kind, colour and size at the front of `words`, and the words after the kind."""
    found = {"colour": UNSAID, "size": UNSAID}
    start = 1 if words and words[0] in ("a", "an", "the", "one") else 0
    for place, word in enumerate(words[start:], start + 1):
        if word in KINDS:
            return [KINDS.index(word), found["colour"], found["size"]], words[place:]
        name = "colour" if word in COLOURS else "size"
        if word not in ATTRIBUTES[name] or found[name] != UNSAID:
            _refuse(sentence, word, (*KINDS, *COLOURS, *SIZES))
        found[name] = ATTRIBUTES[name].index(word)
    return _refuse(sentence, "", KINDS)


def _relation(words: list[str], sentence: str) -> tuple[int, list[str]]:
    """The index of the relation at the front of `words`, and the words after it."""
    start = 2 if words[0] in ("to", "on") and words[1:2] == ["the"] else 0
    for index, relation in enumerate(ATTRIBUTES["relation"]):
        parts = relation.split()
        if index > 0 and words[start : start + len(parts)] == parts:
            return index, words[start + len(parts) :]
    return _refuse(sentence, " ".join(words[start : start + 1]), RELATIONS)


def _centres(seed: int, ids: Tensor, attributes: Tensor) -> Tensor:
    """(N,2,2): x and y of both objects, in widths from the middle of the image."""
    place, relation = attributes[:, _PLACE_COLUMN], attributes[:, _RELATION_COLUMN]
    scene = Draw(seed, 0, ids)
    alone = table(_CENTRES, place)[place] + jitter(scene, "captioned.centre", (2,), _CENTRE_JITTER)
    side = table(_SIDES, relation)[relation]
    shift = jitter(scene, "captioned.shift", (2,), _SHIFT)
    centres = []
    for index, sign in enumerate((1, -1)):
        across = jitter(Draw(seed, index, ids), "captioned.across", (2,), _ACROSS) * (1 - side.abs())
        centres.append(torch.where(place[:, None] < len(PLACES), alone, shift + sign * _APART * side + across))
    return torch.stack(centres, 1)


@dataclass(frozen=True)
class CaptionedScenes:
    """The captioned scenes of one seed as square images; scene i is a pure function of (seed, i).

    All of `ids` (B,) int64; everything is made on their device.
    """

    resolution: int = 64
    seed: int = 0

    def attributes(self, ids: Tensor) -> Tensor:
        """What is there: (B,K) int64 in the columns of ATTRIBUTES."""
        scene = Draw(self.seed, 0, ids)
        count = choose(scene.uniform("captioned.count"), table(_COUNT, ids))
        relation = count * (1 + choose(scene.uniform("captioned.relation"), table(_RELATION, ids)))
        place = choose(scene.uniform("captioned.place"), table(_PLACE, ids))
        objects = []
        for index in range(2):
            draw = Draw(self.seed, index, ids)
            laws = {"kind": _KIND, "colour": _COLOUR, "size": _SIZE}
            drawn = [choose(draw.uniform(f"captioned.{name}"), table(law, ids)) for name, law in laws.items()]
            objects.append(torch.stack(drawn, 1))
        second = count[:, None] * (1 + objects[1])
        place = torch.where(count == 1, len(PLACES), place)
        return torch.cat([count[:, None], relation[:, None], objects[0], second, place[:, None]], 1)

    def said(self, ids: Tensor) -> Tensor:
        """What the captions say: `attributes` (B,K) with UNSAID where they say nothing."""
        rows = self.attributes(ids)
        for index, columns in enumerate((_FIRST, _SECOND)):
            part = choose(Draw(self.seed, index, ids).uniform("captioned.said"), table(_SAID, ids))
            there = rows[:, columns.start] > 0 if index == 1 else torch.ones_like(ids, dtype=torch.bool)
            rows[there & (part >= 2), columns.start + 1] = UNSAID
            rows[there & (part % 2 == 1), columns.start + 2] = UNSAID
        rows[rows[:, _COUNT_COLUMN] == 0, _PLACE_COLUMN] = UNSAID
        return rows

    def captions(self, ids: Tensor) -> list[str]:
        return [caption(row) for row in self.said(ids).tolist()]

    def given(self, ids: Tensor, said: Tensor) -> Tensor:
        """Attributes (B,K) of the scenes `ids` as the law has them where `said` (B,K) is true of them."""
        chance = Draw(self.seed, 0, ids).uniform("captioned.given")
        rows = torch.empty_like(said)
        for row in said.unique(dim=0):
            mine, cells = (said == row).all(1), law_given(row)
            reached = torch.tensor(list(cells.values()), dtype=torch.float64).cumsum(0)
            drawn = torch.searchsorted(reached, chance[mine].double(), right=True).clamp(max=len(cells) - 1)
            rows[mine] = torch.tensor([_indices(cell) for cell in cells])[drawn]
        return rows

    def images(self, ids: Tensor) -> Tensor:
        """(B,3,R,R) float32 in [-1,1]."""
        return self.of_attributes(ids, self.attributes(ids))

    def of_attributes(self, ids: Tensor, attributes: Tensor) -> Tensor:
        """The scenes `ids` with everything that a row can tell replaced by `attributes` (B,K), none of it unsaid."""
        picture = background(Draw(self.seed, 0, ids), self.resolution)
        centres = _centres(self.seed, ids, attributes)
        for index, columns in enumerate((_FIRST, _SECOND)):
            kind, colour, size = (attributes[:, columns] - index).clamp(min=0).unbind(1)
            draw = Draw(self.seed, index, ids)
            radius = table(_RADII, size)[size] * (1 + jitter(draw, "captioned.radius", (), _RADIUS_JITTER))
            right, down = pixel_centres(self.resolution, ids)
            centre = centres[:, index, :, None, None]
            x, y = torch.broadcast_tensors(right - centre[:, 0], down - centre[:, 1])
            inside = 0.5 - distance(kind, x, y, radius[:, None, None]) * self.resolution
            there = attributes[:, _COUNT_COLUMN] >= index
            coverage = inside.clamp(0, 1) * there[:, None, None]
            picture = torch.lerp(picture, paints(draw, colour)[0], coverage[:, None])
        return 2 * picture - 1

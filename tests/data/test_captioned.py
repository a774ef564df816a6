from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.data.captioned import (
    ATTRIBUTES,
    RELATIONS,
    UNSAID,
    CaptionedScenes,
    attributes_of,
    canonical,
    caption,
    law,
    law_given,
    rows_of,
)

COUNT = 40_000
NAMES = list(ATTRIBUTES)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return CaptionedScenes(64, 5).attributes(torch.arange(COUNT))


def within_four_sigma(seen: int, share: float, count: int = COUNT) -> bool:
    return abs(seen / count - share) <= 4 * (share * (1 - share) / count) ** 0.5


def values(row: list[int]) -> tuple[str, ...]:
    return tuple(names[index] for names, index in zip(ATTRIBUTES.values(), row, strict=True))


def test_the_law_is_a_distribution_with_the_stated_margins() -> None:
    assert sum(law().values()) == pytest.approx(1, abs=1e-12)
    assert len(law()) == 36 * 5 + 36 * 36 * 4

    def share(name: str, value: str) -> float:
        return sum(p for cell, p in law().items() if cell[NAMES.index(name)] == value)

    assert share("count", "two") == pytest.approx(0.40)
    assert share("kind", "ring") == pytest.approx(0.10)
    assert share("size", "large") == pytest.approx(0.15)
    assert share("second colour", "blue") == pytest.approx(0.40 * 0.20)
    assert share("relation", "below") == pytest.approx(0.40 * 0.15)
    assert share("place", "bottom") == pytest.approx(0.60 * 0.04)
    cell = ("one", "none", "ring", "blue", "large", "none", "none", "none", "bottom")
    assert law()[cell] == pytest.approx(0.60 * 0.10 * 0.20 * 0.15 * 0.04)


def test_samples_follow_the_law(rows: Tensor) -> None:
    seen = [values(row) for row in rows.tolist()]
    assert set(seen) <= set(law())
    for size in (1, 2):
        for columns in itertools.combinations(range(len(NAMES)), size):
            counts = Counter(tuple(row[c] for c in columns) for row in seen)
            shares: Counter[tuple[str, ...]] = Counter()
            for cell, probability in law().items():
                shares[tuple(cell[c] for c in columns)] += probability  # type: ignore[assignment]
            for key, share in shares.items():
                # several hundred shares are compared: four sigma would be a little tight
                if share > 2e-3:
                    assert abs(counts[key] / COUNT - share) <= 4.5 * (share * (1 - share) / COUNT) ** 0.5, key


def test_what_is_said_has_the_stated_shares_and_hangs_on_nothing(rows: Tensor) -> None:
    said = CaptionedScenes(64, 5).said(torch.arange(COUNT))
    assert ((said == rows) | (said == UNSAID)).all()
    for first, chosen in ((2, rows[:, 0] >= 0), (5, rows[:, 0] == 1)):
        count = int(chosen.sum())
        colour, size = (said[:, first + i] != UNSAID for i in (1, 2))
        assert (said[chosen, first] != UNSAID).all()
        assert within_four_sigma(int((colour & size & chosen).sum()), 0.70, count)
        assert within_four_sigma(int((colour & ~size & chosen).sum()), 0.15, count)
        assert within_four_sigma(int((~colour & size & chosen).sum()), 0.10, count)
        large = chosen & (rows[:, first + 2] == ATTRIBUTES[NAMES[first + 2]].index("large"))
        assert within_four_sigma(int((large & ~size).sum()), 0.20, int(large.sum()))
    alone = rows[:, 0] == 0
    assert (said[alone, 8] == UNSAID).all() and (said[alone][:, [1, 5, 6, 7]] == 0).all()


def test_a_scene_is_a_function_of_seed_and_id() -> None:
    scenes, ids = CaptionedScenes(64, 3), torch.tensor([41, 7, 8, 30])
    whole = scenes.images(torch.arange(50))
    assert torch.equal(scenes.images(ids), whole[ids])
    assert torch.equal(scenes.attributes(ids), scenes.attributes(torch.arange(50))[ids])
    assert scenes.captions(ids) == [scenes.captions(torch.arange(50))[i] for i in ids]
    assert not torch.equal(CaptionedScenes(64, 4).images(ids), whole[ids])


def test_captions() -> None:
    assert caption([0, 0, 0, 1, 0, 0, 0, 0, UNSAID]) == "a small green disc"
    assert caption([1, 1, 3, 0, 2, 2, 3, 1, 5]) == "a large red ring above a small blue square"
    assert caption([0, 0, 3, 0, UNSAID, 0, 0, 0, 2]) == "a red ring"
    assert caption([1, 3, 2, UNSAID, UNSAID, 1, UNSAID, 2, UNSAID]) == "a triangle left of a medium disc"


def test_captions_and_rows_make_the_round_trip() -> None:
    scenes, ids = CaptionedScenes(64, 6), torch.arange(5000)
    assert [attributes_of(text) for text in scenes.captions(ids)] == scenes.said(ids).tolist()
    assert torch.equal(rows_of(scenes.captions(ids)), canonical(scenes.said(ids)))


@pytest.mark.parametrize(
    "sentence, same",
    [
        ("A small GREEN disc.", "a small green disc"),
        ("green small disc", "a small green disc"),
        ("the red ring to the left of the blue square", "a red ring left of a blue square"),
        ("one ring, on the right of one disc", "a ring right of a disc"),
    ],
)
def test_the_parser_bears_how_people_write(sentence: str, same: str) -> None:
    assert attributes_of(sentence) == attributes_of(same)


@pytest.mark.parametrize(
    "sentence, said",
    [
        ("a red rng", "at 'rng': did you mean 'ring'"),
        ("a purple disc", "at 'purple'"),
        ("a red blue disc", "at 'blue'"),
        ("a red", "to its end"),
        ("", "to its end"),
        ("a disc abov a ring", "at 'abov': did you mean 'above'"),
        ("a disc and a ring", "at 'and': allowed here: above, below, left of, right of"),
        ("a disc above", "to its end"),
        ("a disc above a ring above a square", "at 'above'"),
    ],
)
def test_a_sentence_that_is_no_caption_is_refused_plainly(sentence: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        attributes_of(sentence)
    assert said in str(error.value) and "Write it like 'a small green disc'" in str(error.value)


def test_who_is_named_first_does_not_show() -> None:
    one = "a large red ring below a small square"
    other = "a small square above a large red ring"
    assert torch.equal(rows_of([one]), rows_of([other]))
    rows = CaptionedScenes(64, 1).said(torch.arange(1000))
    assert set(canonical(rows)[:, 1].tolist()) == {0, 1, 3}
    assert torch.equal(canonical(canonical(rows)), canonical(rows))
    assert torch.equal(canonical(rows)[rows[:, 0] == 0], rows[rows[:, 0] == 0])


def test_the_law_given_a_caption_is_the_law_of_what_is_left_open(rows: Tensor) -> None:
    given = law_given(attributes_of("a red ring"))
    assert sum(given.values()) == pytest.approx(1)
    assert len(given) == 3 * 5
    cell = ("one", "none", "ring", "red", "large", "none", "none", "none", "bottom")
    assert given[cell] == pytest.approx(0.15 * 0.04)
    assert len(law_given(attributes_of("a large red ring above a small blue square"))) == 1


def test_scenes_of_a_caption_keep_what_it_says_and_leave_the_rest_to_the_law() -> None:
    """8,000 scenes of "a red ring": the sizes and places come in the shares of the law, to .02 (four deviations)."""
    said = torch.tensor([attributes_of("a red ring")]).expand(8000, -1)
    rows = CaptionedScenes(64, 3).given(torch.arange(8000), said)
    assert torch.equal(rows.where(said >= 0, said), said)
    sizes, places = (rows[:, column].bincount(minlength=n) / 8000 for column, n in ((4, 3), (8, 5)))
    assert sizes.tolist() == pytest.approx([0.45, 0.40, 0.15], abs=0.02)
    assert places[:5].tolist() == pytest.approx([0.40, 0.28, 0.18, 0.10, 0.04], abs=0.02)
    full = torch.tensor([attributes_of("a large red ring above a small blue square")])
    assert torch.equal(CaptionedScenes(64, 3).given(torch.arange(1), full), full)


def test_images_have_the_stated_type_and_range() -> None:
    images = CaptionedScenes(64, 7).images(torch.arange(500))
    assert images.shape == (500, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1


def test_objects_stay_inside_the_frame_and_apart() -> None:
    large = torch.tensor([[1, 1 + i % 4, 1, 0, 2, 2, 3, 3, 5] for i in range(2000)])
    images = CaptionedScenes(64, 1).of_attributes(torch.arange(2000), large)
    vivid = images.amax(1) - images.amin(1) > 0.3
    assert not torch.cat([vivid[:, 0], vivid[:, -1], vivid[:, :, 0], vivid[:, :, -1]], 1).any()
    red, blue = images[:, 0] > images[:, 2] + 0.5, images[:, 2] > images[:, 0] + 0.5
    grown = F.max_pool2d(red.float(), 3, 1, 1) > 0
    assert red.flatten(1).any(1).all() and not (grown & blue).any()


@pytest.mark.parametrize("index, relation", enumerate(RELATIONS, 1))
def test_the_relation_is_what_one_sees(index: int, relation: str) -> None:
    row = torch.tensor(attributes_of(f"a small red disc {relation} a small blue disc"))
    images = CaptionedScenes(64, 2).of_attributes(torch.arange(200), row.expand(200, -1))
    assert row[1] == index
    axis = torch.arange(64.0)

    def middle(mask: Tensor) -> tuple[Tensor, Tensor]:
        """x to the right and y downwards (N,) of the marked pixels (N,64,64)."""
        weight = mask.float()
        total = weight.sum((1, 2))
        return (weight.sum(1) * axis).sum(1) / total, (weight.sum(2) * axis).sum(1) / total

    (rx, ry), (bx, by) = middle(images[:, 0] > images[:, 2] + 0.5), middle(images[:, 2] > images[:, 0] + 0.5)
    ahead = {"above": by - ry, "below": ry - by, "left of": bx - rx, "right of": rx - bx}
    assert (ahead[relation] > 24).all()


def test_resolutions_show_the_same_scene() -> None:
    ids = torch.arange(1000)
    fine, coarse = CaptionedScenes(64, 2).images(ids), CaptionedScenes(32, 2).images(ids)
    assert (F.avg_pool2d(fine, 2) - coarse).abs().mean() < 0.002


def test_the_scenes_of_a_seed_never_change() -> None:
    scenes, ids = CaptionedScenes(64, 0), torch.arange(4)
    assert scenes.captions(ids) == [
        "a square above a green square",
        "a small blue square",
        "a medium blue triangle",
        "a medium green disc left of a large green square",
    ]
    pixels = ((scenes.images(ids) + 1) * 15.5).round().to(torch.uint8)
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16] == "c7b167fa5bde65bd"

from __future__ import annotations

import pytest
import torch

from fewstep.core.draw import Draw
from fewstep.data.altered import CHANGES, altered, holds
from fewstep.data.captioned import ATTRIBUTES, CaptionedScenes, attributes_of, canonical, caption, rows_of

COUNT = 3000


def said_by(sentence: str, count: int = COUNT) -> torch.Tensor:
    return torch.tensor([attributes_of(sentence)]).expand(count, -1)


def draw(count: int = COUNT) -> Draw:
    return Draw(1, 0, torch.arange(count))


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "order"])
def test_one_word_becomes_each_other_one_equally_often(change: str) -> None:
    said = said_by("a small green disc left of a large blue ring")
    rows = altered(said, change, draw())
    column, values = list(ATTRIBUTES).index(change), [value for value in ATTRIBUTES[change] if value != "none"]
    assert ((rows != said).nonzero()[:, 1] == column).all() and (rows != said).any(1).all()
    counts = rows[:, column].unique(return_counts=True)[1]
    assert len(counts) == len(values) - 1
    expected = COUNT / len(counts)
    assert (counts - expected).abs().max() < 4 * expected**0.5


def test_the_order_turns_the_scene_around() -> None:
    rows = altered(said_by("a green disc above a large ring", 1), "order", draw(1))
    assert caption(rows[0]) == "a large ring above a green disc"


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "kind"])
def test_what_is_not_said_is_not_altered(change: str) -> None:
    said = said_by("a ring", 9)
    assert torch.equal(altered(said, change, draw(9)), said)


def test_a_caption_holds_for_its_own_scene_and_altered_ones_do_not() -> None:
    scenes, ids = CaptionedScenes(64, 3), torch.arange(COUNT)
    seen, said = canonical(scenes.attributes(ids)), scenes.said(ids)
    assert holds(seen, canonical(said)).all()
    for change in CHANGES:
        rows = altered(said, change, draw())
        same = (rows == said).all(1)
        assert not holds(seen, canonical(rows))[~same].any() or change in ("relation", "order")


@pytest.mark.parametrize(
    "sentence, true",
    [
        ("a red disc above a red disc", [True, True]),
        ("a red disc below a small disc", [True, True]),
        ("a small red disc below a small disc", [False, True]),
        ("a disc left of a disc", [False, False]),
        ("a disc", [False, False]),
    ],
)
def test_truth_of_two_objects_that_are_alike(sentence: str, true: list[bool]) -> None:
    seen = rows_of(["a small red disc above a large red disc", "a small red disc above a small red disc"])
    assert holds(seen, rows_of([sentence])).tolist() == true


def test_all_pairs_at_once() -> None:
    rows = rows_of(["a red disc", "a disc", "a blue disc"]).clamp(min=0)
    asked = rows_of(["a red disc", "a disc", "a blue disc"])
    assert holds(rows[:, None], asked).tolist() == [[True, True, False], [True, True, False], [False, True, True]]

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fewstep.data.scenes import ATTRIBUTES, Scenes, law
from fewstep.evals.attributes import label_accuracy, law_distance, rare_kept, upper_bound

WORLD = {"kind": ("a", "b"), "colour": ("r", "g", "b"), "size": ("small", "large"), "skin": ("plain", "dots")}
LAW = {("small", "plain"): 0.5, ("small", "dots"): 0.1, ("large", "plain"): 0.37, ("large", "dots"): 0.03}


def rows_of(counts: dict[tuple[str, str], int]) -> Tensor:
    rows = []
    for (size, skin), count in counts.items():
        rows += [[0, 0, WORLD["size"].index(size), WORLD["skin"].index(skin)]] * count
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def truth() -> Tensor:
    return Scenes(2, 11).sample(torch.arange(20_000)).attributes


def test_label_accuracy_needs_kind_and_colour() -> None:
    read = torch.tensor([[0, 2, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]])
    assert label_accuracy(read, torch.tensor([2, 3, 5, 4]), WORLD) == 0.5


def test_law_distance_by_hand() -> None:
    exact = {("small", "plain"): 50, ("small", "dots"): 10, ("large", "plain"): 37, ("large", "dots"): 3}
    assert law_distance(rows_of(exact), WORLD, LAW) == pytest.approx(0, abs=1e-12)
    assert law_distance(rows_of({("small", "plain"): 5}), WORLD, LAW) == pytest.approx(0.5)
    # a generated cell outside the law counts in full
    outside = {cell: share for cell, share in LAW.items() if cell != ("small", "plain")} | {("x", "x"): 0.5}
    assert law_distance(rows_of({("small", "plain"): 5}), WORLD, outside) == pytest.approx(1)


def test_law_distance_of_true_scenes_is_sampling_noise(truth: Tensor) -> None:
    noise = sum((2 * p * (1 - p) / (torch.pi * len(truth))) ** 0.5 for p in law().values()) / 2
    assert law_distance(truth, ATTRIBUTES, law()) == pytest.approx(noise, rel=0.4)


def test_a_law_over_other_attributes_is_refused() -> None:
    with pytest.raises(ValueError, match="skin"):
        law_distance(rows_of({("small", "plain"): 1}), WORLD, {("small",): 1.0})


@pytest.mark.parametrize("total", [10, 300])
def test_upper_bound_has_its_closed_forms(total: int) -> None:
    assert upper_bound(0, total) == pytest.approx(1 - 0.05 ** (1 / total), rel=1e-9)
    assert upper_bound(total - 1, total) == pytest.approx(0.95 ** (1 / total), rel=1e-9)
    assert upper_bound(total, total) == 1


def test_rare_rows_by_hand() -> None:
    counts = {("small", "plain"): 600, ("large", "plain"): 400}
    (row,) = rare_kept(rows_of(counts), WORLD, LAW)
    assert row.name == "size=large & skin=dots"
    assert row.true_share == pytest.approx(0.03) and row.share == 0
    assert row.upper == pytest.approx(1 - 0.05**0.001) and row.lost
    # with 300 samples none is seen, yet the bound of 0.00994 is not below a quarter of 0.03
    (row,) = rare_kept(rows_of({("small", "plain"): 300}), WORLD, LAW)
    assert row.share == 0 and not row.lost


def test_true_scenes_keep_every_rare_value(truth: Tensor) -> None:
    rows = rare_kept(truth, ATTRIBUTES, law())
    names = [row.name for row in rows]
    singles = [name for name in names if "&" not in name]
    assert singles == ["position=bottom", "position=stacked", "size=large", "texture=striped"]
    assert "position=left & texture=striped" in names and "count=two & texture=striped" in names
    assert "count=one & size=large" not in names  # large implies one
    assert len(set(names)) == len(names) and not any(row.lost for row in rows)
    for row in rows:
        assert abs(row.share - row.true_share) < 5 * (row.true_share / len(truth)) ** 0.5
        assert row.upper > row.share


def test_a_lost_value_is_found_with_all_its_pairs(truth: Tensor) -> None:
    without = truth[truth[:, 5] != ATTRIBUTES["texture"].index("striped")]
    rows = rare_kept(without, ATTRIBUTES, law())
    assert {row.name for row in rows if row.lost} == {row.name for row in rows if "striped" in row.name}


def test_pairs_lie_between_the_two_shares(truth: Tensor) -> None:
    pairs = [row for row in rare_kept(truth, ATTRIBUTES, law()) if "&" in row.name]
    assert all(0.002 <= row.true_share < 0.05 for row in pairs)
    sizes = {size: sum(p for cell, p in law().items() if cell[2] == size) for size in ATTRIBUTES["size"]}
    textures = {"plain": 0.70, "halved": 0.26, "striped": 0.04}
    expected = {
        f"size={size} & texture={texture}"
        for size, texture in itertools.product(sizes, textures)
        if 0.002 <= sizes[size] * textures[texture] < 0.05
    }
    assert {row.name for row in pairs if "size" in row.name and "texture" in row.name} == expected

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from fewstep.data.scenes import ATTRIBUTES, COLOURS, KINDS, LABELS, SceneBatch, Scenes, caption, law

COUNT = 20_000


@pytest.fixture(scope="module")
def many() -> SceneBatch:
    return Scenes(16, 5).sample(torch.arange(COUNT))


def within_four_sigma(seen: int, share: float) -> bool:
    return abs(seen / COUNT - share) <= 4 * (share * (1 - share) / COUNT) ** 0.5


def test_a_scene_is_a_function_of_seed_and_id() -> None:
    whole = Scenes(16, 3).sample(torch.arange(50))
    ids = torch.tensor([41, 7, 8, 30])
    part = Scenes(16, 3).sample(ids)
    assert torch.equal(part.images, whole.images[ids])
    assert torch.equal(part.labels, whole.labels[ids])
    assert torch.equal(part.attributes, whole.attributes[ids])
    assert not torch.equal(Scenes(16, 4).sample(ids).images, part.images)


def test_the_law_is_a_distribution_with_the_stated_margins() -> None:
    assert sum(law().values()) == pytest.approx(1, abs=1e-12)

    def share(column: int, value: str) -> float:
        return sum(p for cell, p in law().items() if cell[column] == value)

    assert share(0, "two") == pytest.approx(0.08)
    assert share(1, "bottom") == pytest.approx(0.92 * 0.03)
    assert share(1, "stacked") == pytest.approx(0.08 * 0.25)
    assert share(2, "large") == pytest.approx(0.92 * 0.03)
    assert share(3, "striped") == pytest.approx(0.04)
    assert law()["one", "centre", "small", "plain"] == pytest.approx(0.92 * 0.45 * 0.30 * 0.70)


def test_samples_follow_the_law(many: SceneBatch) -> None:
    names = list(ATTRIBUTES.values())[2:]
    rows = [tuple(names[i][v] for i, v in enumerate(row)) for row in many.attributes[:, 2:].tolist()]
    assert set(rows) <= set(law())
    for size in (1, 2, 3, 4):
        for columns in itertools.combinations(range(4), size):
            shares: dict[Sequence[str], float] = {}
            for cell, probability in law().items():
                key = tuple(cell[c] for c in columns)
                shares[key] = shares.get(key, 0.0) + probability
            for key, share in shares.items():
                if share > 1e-3:
                    seen = sum(tuple(row[c] for c in columns) == key for row in rows)
                    assert within_four_sigma(seen, share), (key, share, seen / COUNT)


def test_labels_are_uniform_and_independent_of_the_rest(many: SceneBatch) -> None:
    for label in range(12):
        chosen = many.labels == label
        assert within_four_sigma(int(chosen.sum()), 1 / 12)
        striped = chosen & (many.attributes[:, 5] == 2)
        assert within_four_sigma(int(striped.sum()), 0.04 / 12)


def test_label_layout(many: SceneBatch) -> None:
    assert len(LABELS) == 12
    assert LABELS[0] == "red disc" and LABELS[5] == "blue square" and LABELS[10] == "green ring"
    kind, colour = many.attributes[:, 0], many.attributes[:, 1]
    assert torch.equal(many.labels, kind * 3 + colour)
    assert ATTRIBUTES["kind"] == KINDS and ATTRIBUTES["colour"] == COLOURS
    assert list(ATTRIBUTES) == ["kind", "colour", "count", "position", "size", "texture"]


def test_of_label_changes_only_kind_and_colour(many: SceneBatch) -> None:
    ids = torch.arange(200)
    asked = Scenes(16, 5).of_label(ids, torch.full((200,), 11))
    assert (asked.attributes[:, :2] == torch.tensor([3, 2])).all()
    assert torch.equal(asked.attributes[:, 2:], many.attributes[:200, 2:])
    own = Scenes(16, 5).of_label(ids, many.labels[:200])
    assert torch.equal(own.images, many.images[:200])


def test_images_have_the_stated_type_and_range(many: SceneBatch) -> None:
    assert many.images.shape == (COUNT, 3, 16, 16) and many.images.dtype == torch.float32
    assert many.labels.dtype == many.attributes.dtype == torch.int64
    assert many.images.min() >= -1 and many.images.max() <= 1


def test_objects_stay_inside_the_frame() -> None:
    scenes = Scenes(64, 1).sample(torch.arange(3000))
    low, high = scenes.images.amin(1), scenes.images.amax(1)
    # greys keep their three channels within twice the tint (0.2 on this scale); an object does not
    vivid = high - low > 0.3
    edge = torch.cat([vivid[:, 0], vivid[:, -1], vivid[:, :, 0], vivid[:, :, -1]], 1)
    assert vivid.flatten(1).any(1).all()
    assert not edge.any()


def test_resolutions_show_the_same_scene() -> None:
    ids = torch.arange(2000)
    fine, coarse = Scenes(64, 2).sample(ids).images, Scenes(16, 2).sample(ids).images
    error = F.avg_pool2d(fine, 4) - coarse
    assert error.abs().mean() < 0.004  # 0.0020 when written, on a scale of two
    assert error.pow(2).mean().sqrt() < 0.02  # 0.0114


def test_captions() -> None:
    assert caption([3, 0, 0, 1, 0, 2]) == "a small striped red ring on the left"
    assert caption([0, 2, 1, 5, 1, 0]) == "two medium blue discs side by side"
    assert caption(torch.tensor([2, 1, 0, 4, 2, 1])) == "a large halved green triangle at the bottom"
    rows = itertools.product(*(range(len(values)) for values in ATTRIBUTES.values()))
    possible = [row for row in rows if (row[2] == 1) == (row[3] >= 5)]
    assert len({caption(row) for row in possible}) == len(possible)


def test_the_scenes_of_a_seed_never_change() -> None:
    scenes = Scenes(16, 0).sample(torch.arange(4))
    expected = [[1, 0, 0, 0, 1, 0], [1, 1, 0, 2, 0, 0], [3, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 0]]
    assert scenes.attributes.tolist() == expected
    means = torch.tensor([0.26520, -0.01547, 0.10311, 0.31440])
    assert torch.allclose(scenes.images.mean((1, 2, 3)), means, atol=2e-5)

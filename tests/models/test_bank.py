from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.core.schedule import Flow
from fewstep.models.bank import Bank, Partition
from fewstep.models.diffusers import DiffusersBackbone


def labels(*values: int) -> Condition:
    return Condition({"class_labels": torch.tensor(values)})


@pytest.mark.parametrize("parts, count", [(1, 12), (2, 12), (4, 12), (5, 12), (12, 12), (3, 1000)])
def test_every_label_is_in_one_block_and_the_blocks_are_equal(parts: int, count: int) -> None:
    """Total, deterministic, consecutive; sizes differ by one at most; shares add up to one."""
    whole, all_labels = Partition(parts, count), torch.arange(count)
    found = whole.of(Condition({"class_labels": all_labels}), count)
    assert torch.equal(found, whole.of(Condition({"class_labels": all_labels}), count))
    assert (found.diff() >= 0).all() and found[0] == 0 and found[-1] == parts - 1
    sizes = found.bincount(minlength=parts)
    assert len(sizes) == parts and sizes.max() - sizes.min() <= 1
    assert [whole.share(part) for part in range(parts)] == pytest.approx((sizes / count).tolist())
    assert sum(whole.share(part) for part in range(parts)) == pytest.approx(1)


def test_a_label_beyond_the_last_and_rows_without_any() -> None:
    assert Partition(4, 12).of(labels(0, 11, 12, 99), 4).tolist() == [0, 3, 3, 3]
    assert Partition().of(Condition(), 3).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="these have none"):
        Partition(2, 12).of(Condition(), 3)


@pytest.fixture
def students(tiny_unet) -> list[DiffusersBackbone]:
    nets = [tiny_unet(1), tiny_unet(2, block_out_channels=[4, 8])]
    return [DiffusersBackbone(net, Flow(), "flow_prediction", 4) for net in nets]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def test_each_row_is_answered_by_the_student_of_its_label(students: list[DiffusersBackbone], x: Tensor) -> None:
    """Students of two sizes; a batch of one part is one pass of that student, with its features."""
    bank, cond, t = Bank(students, Partition(2, 4)), labels(0, 3, 1, 2), torch.linspace(0.2, 0.9, 4)
    with torch.no_grad():
        value = bank(x, t, cond).value
        for row, student in enumerate((0, 1, 0, 1)):
            one = torch.tensor([row])
            assert torch.allclose(value[one], students[student](x[one], t[one], cond[one]).value, atol=1e-5)
    first = bank(x, t, labels(0, 1, 0, 1), taps=("mid_block",))
    assert torch.equal(first.value, students[0](x, t, labels(0, 1, 0, 1)).value) and "mid_block" in first.features
    with pytest.raises(ValueError, match="one expert at a time"):
        bank(x, t, cond, taps=("mid_block",))


def test_a_bank_has_a_student_for_each_part(students: list[DiffusersBackbone]) -> None:
    with pytest.raises(ValueError, match="3 parts need as many students, got 2"):
        Bank(students, Partition(3, 4))
    assert Bank(students, Partition(2, 4)).null(labels(0, 1)).inputs["class_labels"].tolist() == [4, 4]

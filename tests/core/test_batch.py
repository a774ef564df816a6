from __future__ import annotations

import torch

from fewstep.core.batch import Batch, Condition
from fewstep.core.draw import Draw
from fewstep.core.errors import UserError


def conditions(first: int, count: int) -> Condition:
    labels = torch.arange(first, first + count)
    return Condition({"class_labels": labels, "text": labels[:, None, None].expand(-1, 2, 3)}, {"w": labels / 2})


def test_rows_are_taken_from_every_tensor() -> None:
    taken = conditions(5, 4)[torch.tensor([3, 0])]
    assert taken.inputs["class_labels"].tolist() == [8, 5]
    assert taken.inputs["text"][:, 0, 0].tolist() == [8, 5] and taken.dials["w"].tolist() == [4, 2.5]


def test_concatenation_keeps_the_order_and_the_dials() -> None:
    both = Condition.cat(conditions(0, 2), conditions(7, 1))
    assert both.inputs["class_labels"].tolist() == [0, 1, 7] and both.inputs["text"].shape == (3, 2, 3)
    assert both.dials["w"].tolist() == [0, 0.5, 3.5]


def test_changing_inputs_leaves_the_original_alone() -> None:
    old = conditions(0, 2)
    new = old.with_inputs(class_labels=torch.tensor([9, 9]))
    assert new.inputs["class_labels"].tolist() == [9, 9] and old.inputs["class_labels"].tolist() == [0, 1]
    assert new.dials is old.dials and torch.equal(new.inputs["text"], old.inputs["text"])


def test_a_batch_counts_its_samples() -> None:
    batch = Batch(torch.zeros(6, 2), Condition(), Draw(0, 0, torch.arange(6)))
    assert len(batch) == 6 and batch.x0 is None and batch.pair is None


def test_a_user_error_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)

"""Training without the condition, now and then."""

from __future__ import annotations

import torch

from fewstep.core.batch import Batch, Condition
from fewstep.models.backbone import Backbone


def drop_labels(net: Backbone, batch: Batch, share: float) -> Condition:
    """`batch.cond` with a random `share` of its rows replaced by the null condition of `net`."""
    if share == 0 or not batch.cond.inputs:
        return batch.cond
    null = net.null(batch.cond)
    drop = batch.draw.uniform("drop_labels") < share
    rows = {}
    for name, value in batch.cond.inputs.items():
        rows[name] = torch.where(drop.reshape(-1, *[1] * (value.ndim - 1)), null.inputs[name], value)
    return batch.cond.with_inputs(**rows)

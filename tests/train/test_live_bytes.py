"""Live bytes: each storage once, from the operator that makes it until it is freed."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.train.live_bytes import LiveBytes


def test_storages_count_once_and_until_they_are_freed() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        views = [a[:10], a.view(10, 100).T, a.detach()]
        assert live.now.total() == 4000
        b = torch.zeros(500) + 1  # the zeros are alive until the sum is there
        assert live.now.total() == 6000 and live.peak.total() == 8000
        del a, b
        assert live.now.total() == 4000
        del views
        assert live.now.total() == 0


def test_what_is_named_moves_to_its_name() -> None:
    before = torch.zeros(100)
    with LiveBytes("rest") as live:
        live.name("weights", before)
        made = before * 2
        assert live.now == {"weights": 400, "rest": 400}
        live.name("moments", made)
        assert live.now["moments"] == 400 and live.now["rest"] == 0 and live.peak.total() == 800
        del made
        assert live.now.total() == 400


def test_a_mark_starts_a_peak_anew() -> None:
    with LiveBytes("rest") as live:
        torch.zeros(1000)
        kept = torch.zeros(10)
        assert live.mark().total() == 4000
        torch.zeros(100)
        assert live.mark().total() == 440 and live.mark().total() == kept.nbytes


def test_gradients_bear_their_name_and_fake_tensors_count_alike() -> None:
    """The linear layer of 5 x 3 weights: 60 bytes of weights, as many of gradients, real or fake."""
    peaks = []
    for mode in (FakeTensorMode(), LiveBytes()):
        with mode, LiveBytes("rest") as live:
            layer = nn.Linear(3, 5, bias=False)
            live.name("weights", layer.weight)
            live.name_gradient("gradients", layer.weight)
            layer(torch.ones(2, 3)).sum().backward()
            assert live.now["weights"] == 60 and live.now["gradients"] == 60
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.core.schedule import EDM, VP, Flow, NoiseSchedule, Trig, shift
from fewstep.core.times import Grid, Times

COUNT = 4000


def even() -> Tensor:
    """Evenly spaced quantiles of the uniform law: a draw's empirical law then is its law."""
    return (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT


def ratio(t: Tensor) -> Tensor:
    return t / (1 - t)


def phi(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


LAWS: dict[str, tuple[Times, Callable[[Tensor], Tensor]]] = {
    "uniform": (Times(), lambda t: t),
    "uniform part": (Times(low=0.2, high=0.6), lambda t: (t - 0.2) / 0.4),
    "uniform shifted": (Times(shift=3.0), lambda t: shift(t, 1 / 3)),
    "logit normal": (Times("logit_normal"), lambda t: phi(torch.logit(t))),
    "logit normal moved": (
        Times("logit_normal", mean=-0.4, std=1.6, shift=2.0),
        lambda t: phi((torch.logit(t) - math.log(2.0) + 0.4) / 1.6),
    ),
    "log normal": (Times("log_normal", mean=-1.1, std=2.0), lambda t: phi((ratio(t).log() + 1.1) / 2.0)),
    "karras": (
        Times("karras"),
        lambda t: (ratio(t) ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7)),
    ),
    "u shape": (Times("u_shape", std=2.0), lambda t: 0.5 + torch.sinh(4 * t - 2) / (2 * math.sinh(2))),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_law_has_its_distribution_function(name: str) -> None:
    times, cdf = LAWS[name]
    u = even()
    t = times(u, Flow())
    assert t.dtype == torch.float32
    assert (cdf(t.double()) - u).abs().max() < 2e-4
    # Empirically too: the share of draws at or below a point is the law there.
    for point in torch.quantile(t, torch.tensor([0.1, 0.5, 0.9])).double():
        assert (t <= point).double().mean().item() == pytest.approx(cdf(point).item(), abs=2 / COUNT)


@pytest.mark.parametrize("process", [EDM(), Trig()])
def test_noise_ratio_laws_hold_on_every_process(process: NoiseSchedule) -> None:
    """Log-normal and Karras are laws of sigma / alpha, not of t."""
    u = even()[100:-100]
    alpha, sigma, _, _ = process.coefficients(Times("log_normal", mean=-1.2, std=1.2)(u, process).double())
    assert (phi(((sigma / alpha).log() + 1.2) / 1.2) - u).abs().max() < 1e-5
    alpha, sigma, _, _ = process.coefficients(Times("karras")(u, process).double())
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    assert (((sigma / alpha) ** (1 / 7) - low) / (high - low) - u).abs().max() < 1e-4


def test_the_u_shape_is_symmetric_and_heavy_at_both_ends() -> None:
    t = Times("u_shape", std=2.0)(even(), Flow())
    assert (t + t.flip(0) - 1).abs().max() < 1e-6
    ends, middle = ((t < 0.1) | (t > 0.9)).float().mean(), ((t - 0.5).abs() < 0.1).float().mean()
    assert ends.item() == pytest.approx(1 - math.sinh(1.6) / math.sinh(2), abs=1e-3)
    assert middle.item() == pytest.approx(math.sinh(0.4) / math.sinh(2), abs=1e-3)


@pytest.mark.parametrize("name", ["logit_normal", "log_normal", "karras", "u_shape"])
def test_laws_are_clamped_to_their_range(name: str) -> None:
    t = Times(name, low=0.3, high=0.4)(even(), Flow())  # type: ignore[arg-type]
    assert t.min().item() == pytest.approx(0.3) and t.max().item() == pytest.approx(0.4)


def test_a_shifted_uniform_is_clamped_after_the_shift() -> None:
    t = Times(low=0.02, high=0.98, shift=5.0)(even(), Flow())
    assert t.min().item() == pytest.approx(0.02) and t.max().item() == pytest.approx(0.98)
    assert (t < 0.5).double().mean().item() == pytest.approx(1 / 6, abs=1e-3)


@pytest.mark.parametrize("start", [0.0, 0.25, 0.9])
def test_above_draws_from_the_part_over_a_time(start: float) -> None:
    above = torch.full((COUNT,), start)
    t = Times(low=0.1, high=0.8)(even(), Flow(), above)
    part = (t.double() - start) / (1 - start)
    assert ((part - 0.1) / 0.7 - even()).abs().max() < 1e-5


@pytest.mark.parametrize("start", [0.001, 0.25, 0.5, 0.75, 0.98])
def test_above_stays_above_on_a_grid(start: float, vp: VP) -> None:
    """At t = s the bridge has no noise and its target is not finite."""
    t = Times()(even(), vp, torch.full((COUNT,), start))
    assert (t > start).all() and t.max() == 1


def test_times_of_a_discrete_process_are_its_own(vp: VP) -> None:
    t = Times("logit_normal")(even(), vp).double() * 1000
    assert (t - t.round()).abs().max() < 1e-4 and t.min() >= 1 - 1e-4 and t.max() <= 1000
    counts = Times()(even(), vp).double().mul(1000).round().long().bincount(minlength=1001)
    assert counts[0] == 0 and counts[2:1000].min() == counts[2:1000].max() == COUNT / 1000


@pytest.mark.parametrize(
    "range_", [{"low": 0.5, "high": 0.5}, {"low": -0.1}, {"high": 1.1}, {"shift": 0.0}, {"std": -1.0}]
)
def test_impossible_ranges_are_refused(range_: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"is {next(iter(range_.values()))}"):
        Times(**range_)  # type: ignore[arg-type]


def test_a_grid_runs_from_clean_to_noise(vp: VP) -> None:
    assert Grid(4).times(Flow()).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert Grid(4, shift=3.0).times(Flow()).tolist() == pytest.approx([0, 0.5, 0.75, 0.9, 1])
    snapped = Grid(7).times(vp)
    assert snapped.tolist() == pytest.approx([0, 0.143, 0.286, 0.429, 0.571, 0.714, 0.857, 1])
    assert Grid(1).times(vp).tolist() == [0, 1]


def test_grid_pairs_are_neighbours_and_equally_likely(vp: VP) -> None:
    grid = Grid(8, shift=2.0)
    ladder = grid.times(vp)
    t, s = grid.pair(even().float(), vp)
    rung = torch.searchsorted(ladder, t)
    assert torch.equal(ladder[rung], t) and torch.equal(ladder[rung - 1], s)
    assert rung.bincount().tolist() == [0] + [COUNT // 8] * 8


def test_the_last_uniform_stays_on_the_grid() -> None:
    t, s = Grid(3).pair(torch.tensor([1.0 - 2.0**-24, 1.0, 2.0**-24]), Flow())
    assert t.tolist() == pytest.approx([1, 1, 1 / 3]) and s.tolist() == pytest.approx([2 / 3, 2 / 3, 0])


def test_an_empty_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="count is 0"):
        Grid(0)

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fewstep.core.schedule import EDM, VP, Flow, NoiseSchedule, Trig, add_noise, bridge, remap, shift, vp_from_betas

NAMES = ("vp_linear", "vp_scaled", "vp_zero_snr", "flow", "edm", "trig")
BETAS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    },
}


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def between_knots() -> Tensor:
    """Times inside the intervals of a schedule with 1000 knots, from the first to the last."""
    return (torch.arange(0, 1000, 9, dtype=torch.float64) + 0.5) / 1000


def test_derivatives_equal_finite_differences(schedule: NoiseSchedule) -> None:
    t, h = between_knots(), 1e-5
    _, _, d_alpha, d_sigma = schedule.coefficients(t)
    ahead, behind = schedule.coefficients(t + h), schedule.coefficients(t - h)
    for exact, here, there in zip((d_alpha, d_sigma), ahead, behind, strict=False):
        slope = (here - there) / (2 * h)
        assert ((slope - exact).abs() / (1 + exact.abs())).max() < 1e-7


def test_clean_is_exact_and_noise_grows(schedule: NoiseSchedule) -> None:
    alpha, sigma, _, _ = schedule.coefficients(double(0.0))
    assert alpha.item() == 1 and sigma.item() == 0
    alpha, sigma, _, _ = schedule.coefficients(between_knots())
    assert ((sigma / alpha).diff() > 0).all()


@pytest.mark.parametrize("name", ["vp_linear", "vp_scaled", "vp_zero_snr", "trig"])
def test_variance_preserving_processes_preserve_variance(name: str, processes: dict[str, NoiseSchedule]) -> None:
    alpha, sigma, d_alpha, d_sigma = processes[name].coefficients(torch.linspace(0, 1, 333, dtype=torch.float64))
    assert (alpha**2 + sigma**2 - 1).abs().max() < 1e-14
    assert (alpha * d_alpha + sigma * d_sigma).abs().max() < 1e-12


def test_values_of_the_closed_forms() -> None:
    t = double(0.25)
    assert [v.item() for v in Flow().coefficients(t)] == [0.75, 0.25, -1, 1]
    assert [v.item() for v in EDM(sigma_max=40).coefficients(t)] == [1, 10, 0, 40]
    assert [v.item() for v in Trig().coefficients(double(1 / 3))] == pytest.approx(
        [0.75**0.5, 0.5, -0.25 * torch.pi, 0.75**0.5 * torch.pi / 2]
    )
    assert EDM(sigma_max=40).prior_std == 40 and Flow().prior_std == 1


def test_coefficients_broadcast_in_float32(schedule: NoiseSchedule) -> None:
    video = torch.zeros(2, 3, 4, 5, 6, dtype=torch.bfloat16)
    for value in schedule.at(torch.tensor([0.2, 0.7]), video):
        assert value.shape == (2, 1, 1, 1, 1) and value.dtype == torch.float32


@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.LCMScheduler])
@pytest.mark.parametrize("betas", BETAS)
def test_index_i_of_diffusers_sits_at_i_plus_one_thousandths(kind: Any, betas: str) -> None:
    products = kind(**BETAS[betas]).alphas_cumprod
    schedule = VP(products)
    assert schedule.steps == 1000
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma, _, _ = schedule.coefficients(t)
    assert (alpha**2 - products.double()).abs().max() < 1e-14
    assert (sigma**2 - (1 - products.double())).abs().max() < 1e-14


@pytest.mark.parametrize("betas", BETAS)
def test_betas_make_the_products_of_diffusers(betas: str) -> None:
    node = BETAS[betas]
    mine = vp_from_betas(
        node["beta_schedule"],
        node.get("beta_start", 0.0),
        node.get("beta_end", 0.0),
        zero_terminal_snr=node.get("rescale_betas_zero_snr", False),
    )
    theirs = diffusers.DDIMScheduler(**node).alphas_cumprod.double()
    # diffusers accumulates 1000 float32 products.
    assert (mine.alphas_cumprod - theirs).abs().max() < 5e-6


def test_an_unknown_beta_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="'sigmoid': use linear, scaled_linear"):
        vp_from_betas("sigmoid", 0.1, 0.2)


def test_a_zero_terminal_snr_is_finite_and_reaches_pure_noise() -> None:
    schedule = vp_from_betas("linear", 1e-4, 0.02, zero_terminal_snr=True)
    c = schedule.at(torch.ones(1), torch.zeros(1, 1))
    assert abs(c.alpha.item()) < 1e-7 and c.sigma.item() == 1
    assert torch.isfinite(torch.cat(list(c))).all()


@pytest.mark.parametrize("betas", BETAS)
def test_add_noise_equals_diffusers(betas: str) -> None:
    scheduler = diffusers.DDIMScheduler(**BETAS[betas])
    index = torch.tensor([0, 1, 17, 249, 500, 998, 999])
    x0, eps = torch.randn(2, len(index), 3, 4, 4)
    mine = add_noise(VP(scheduler.alphas_cumprod), x0, eps, (index + 1) / 1000)
    assert (mine - scheduler.add_noise(x0, eps, index)).abs().max() < 2e-6


def test_add_noise_equals_the_flow_matching_scheduler() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    x0, eps = torch.randn(2, 7, 3, 4, 4)
    mine = add_noise(Flow(), x0, eps, scheduler.sigmas[:-1])
    assert (mine - scheduler.scale_noise(x0, scheduler.timesteps, eps)).abs().max() < 1e-6


def test_time_of_inverts_the_noise_ratio(schedule: NoiseSchedule) -> None:
    t = torch.cat([double(0.0), between_knots(), torch.arange(1, 1000, 37).double() / 1000])
    alpha, sigma, _, _ = schedule.coefficients(t)
    assert (schedule.time_of(sigma / alpha) - t).abs().max() < 1e-12


def test_time_of_stays_in_range(schedule: NoiseSchedule) -> None:
    ends = schedule.time_of(double(0.0, 1e6, torch.inf))
    assert ends[0] == 0 and ends[1] > 0.999 and 0.999999 < ends[2] <= 1


def test_shift_composes_and_inverts() -> None:
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    assert torch.allclose(shift(shift(t, 3.0), 2.5), shift(t, 7.5), rtol=0, atol=1e-15)
    assert torch.allclose(shift(shift(t, 7.0), 1 / 7), t, rtol=0, atol=1e-15)
    assert torch.equal(shift(t, 1.0), t)
    inner = t[1:-1]
    ratio = inner / (1 - inner)
    moved = shift(inner, 5.0)
    assert torch.allclose(moved / (1 - moved), 5 * ratio, rtol=1e-12, atol=0)
    assert shift(double(0.0, 1.0), 9.0).tolist() == [0, 1]


@pytest.mark.parametrize("source, target", list(itertools.product(NAMES, NAMES)))
def test_remap_lands_on_a_level_of_the_target(source: str, target: str, processes: dict[str, NoiseSchedule]) -> None:
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    start, end = processes[source], processes[target]
    there, scale = remap(start, end, t, torch.zeros(41, 1))
    alpha, sigma, _, _ = start.coefficients(t)
    alpha_to, sigma_to, _, _ = end.coefficients(there)
    alpha_end, sigma_end, _, _ = end.coefficients(double(1.0))
    reached = sigma / alpha <= (sigma_end / alpha_end) * (1 + 1e-9)
    # scale x is distributed as level `there` of the target: both coefficients agree, in float32.
    size = torch.hypot(alpha_to, sigma_to)
    for mine, theirs in ((alpha, alpha_to), (sigma, sigma_to)):
        assert ((scale[:, 0] * mine - theirs).abs() / size)[reached].max() < 2e-7
    assert (there[~reached] == 1).all()
    length = scale[:, 0] * torch.hypot(alpha, sigma)
    assert ((length - size).abs() / size).max() < 2e-7


def test_remap_to_itself_is_the_identity(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0, 1, 17, dtype=torch.float64)
    there, scale = remap(schedule, schedule, t, torch.zeros(17, 1))
    assert (there - t).abs().max() < 1e-9 and (scale - 1).abs().max() < 1e-7


def test_bridges_compose(schedule: NoiseSchedule) -> None:
    like = torch.zeros(3, 1)
    s, u, t = torch.tensor([0.0, 0.2, 0.5]), torch.tensor([0.3, 0.4, 0.8]), torch.tensor([0.9, 0.5, 0.95])
    a_su, b_su = bridge(schedule, s, u, like)
    a_ut, b_ut = bridge(schedule, u, t, like)
    a_st, b_st = bridge(schedule, s, t, like)
    assert torch.allclose(a_su * a_ut, a_st, rtol=1e-6, atol=0)
    assert torch.allclose((a_ut * b_su) ** 2 + b_ut**2, b_st**2, rtol=1e-6, atol=0)


def test_a_bridge_keeps_the_marginals(schedule: NoiseSchedule) -> None:
    like = torch.zeros(4, 1)
    s, t = torch.tensor([0.0, 0.1, 0.45, 0.7]), torch.tensor([0.6, 0.2, 0.9, 0.7])
    at_s, at_t = schedule.at(s, like), schedule.at(t, like)
    a, b = bridge(schedule, s, t, like)
    assert torch.allclose(a * at_s.alpha, at_t.alpha, rtol=1e-6, atol=0)
    assert torch.allclose((a * at_s.sigma) ** 2 + b**2, at_t.sigma**2, rtol=1e-6, atol=0)
    assert torch.equal(a[0], at_t.alpha[0]) and torch.allclose(b[0], at_t.sigma[0], rtol=2e-7, atol=0)
    assert a[3] == 1 and b[3] == 0


def test_bridge_coefficients_of_fixture_p() -> None:
    a, b = bridge(Flow(), double(0.4), double(0.7), torch.zeros(1))
    assert a.item() == pytest.approx(0.5) and b.item() ** 2 == pytest.approx(0.45)
    trig = Trig()
    s, t = trig.time_of(double(0.5 / 0.75**0.5)), trig.time_of(double(0.8 / 0.6))
    a, b = bridge(trig, s, t, torch.zeros(1))
    assert a.item() == pytest.approx(0.6 / 0.75**0.5) and b.item() ** 2 == pytest.approx(0.52)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
def test_a_short_bridge_keeps_its_digits(gap: float) -> None:
    s, t = 0.4, 0.4 + gap
    exact_s, exact_t = Fraction(s), Fraction(t)
    exact = exact_t**2 - ((1 - exact_t) / (1 - exact_s) * exact_s) ** 2
    _, b = bridge(Flow(), double(s), double(t), torch.zeros(1))
    assert b.item() == pytest.approx(float(exact) ** 0.5, rel=1e-6)


def test_snap_gives_trained_times_only() -> None:
    vp = vp_from_betas("linear", 1e-4, 0.02)
    t = torch.tensor([0.0, 0.0004, 0.0016, 0.25049, 0.9996, 1.0])
    assert torch.allclose(vp.snap(t), torch.tensor([0.001, 0.001, 0.002, 0.25, 1.0, 1.0]), rtol=0, atol=1e-7)
    assert vp.snap(t).dtype == torch.float32
    for free in (Flow(), EDM(), Trig()):
        assert torch.equal(free.snap(t), t)

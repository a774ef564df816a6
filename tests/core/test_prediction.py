from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fewstep.core.prediction import KINDS, Kind, Prediction
from fewstep.core.schedule import Flow, NoiseSchedule, Trig, add_noise, bridge

MEAN, STD = 0.7, 0.5  # x0 ~ N(.7, .5^2), the data of fixture P


def perfect(kind: Kind, schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Tensor) -> Prediction:
    """The answer of a network that knows which (x0, eps) made x_t."""
    x_t = add_noise(schedule, x0, eps, t)
    empty = Prediction(x_t, kind, x_t, t, schedule)
    return Prediction(empty.target(x0, eps), kind, x_t, t, schedule)


def posterior(schedule: NoiseSchedule, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0 | x_t] and E[eps | x_t], float64, for x0 ~ N(MEAN, STD^2), x_t and t of the same shape."""
    alpha, sigma, _, _ = schedule.coefficients(t)
    variance = alpha**2 * STD**2 + sigma**2
    residual = x_t - alpha * MEAN
    return MEAN + alpha * STD**2 / variance * residual, sigma / variance * residual


@pytest.mark.parametrize("kind", KINDS)
def test_every_reading_is_recovered(kind: Kind, schedule: NoiseSchedule) -> None:
    t = torch.tensor([0.05, 0.3, 0.6, 0.9])
    x0, eps = torch.randn(2, 4, 3, 5)
    prediction = perfect(kind, schedule, x0, eps, t)
    c = schedule.at(t, x0)
    assert torch.allclose(prediction.x0, x0, rtol=0, atol=1e-4)
    assert torch.allclose(prediction.eps, eps, rtol=0, atol=1e-4)
    assert torch.allclose(prediction.velocity, c.d_alpha * x0 + c.d_sigma * eps, rtol=1e-4, atol=2e-4)
    assert torch.allclose(prediction.score, -eps / c.sigma, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_of_another_kind_says_the_same(kind: Kind, schedule: NoiseSchedule) -> None:
    """A network is rarely consistent with (x0, eps): any output is one pair of readings."""
    t = torch.tensor([0.2, 0.5, 0.8])
    x_t, value = torch.randn(2, 3, 7)
    first = Prediction(value, kind, x_t, t, schedule)
    for other in KINDS:
        second = Prediction(
            Prediction(value, other, x_t, t, schedule).target(first.x0, first.eps), other, x_t, t, schedule
        )
        size = 1 + first.x0.abs().max() + first.eps.abs().max()
        assert ((second.x0 - first.x0).abs().max() / size) < 1e-4
        assert ((second.eps - first.eps).abs().max() / size) < 1e-4


def test_targets_by_hand() -> None:
    t, x0, eps = torch.tensor([0.25]), torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    answers = {"epsilon": -1.0, "sample": 2.0, "flow_prediction": -3.0, "v_prediction": 0.75 * -1 - 0.25 * 2}
    for kind, answer in answers.items():
        assert Prediction(x0, kind, x0, t, Flow()).target(x0, eps).item() == answer  # type: ignore[arg-type]
    third = torch.tensor([1 / 3])
    v = Prediction(x0, "v_prediction", x0, third, Trig()).target(x0, eps)
    assert v.item() == pytest.approx(-(0.75**0.5) - 1, rel=1e-6)


def test_readings_are_float32_whatever_the_network_says() -> None:
    t, x = torch.tensor([0.5]), torch.ones(1, 2, dtype=torch.bfloat16)
    for kind in KINDS:
        prediction = Prediction(x, kind, x, t, Flow())
        readings = (prediction.x0, prediction.eps, prediction.velocity, prediction.score, prediction.target(x, x))
        assert all(reading.dtype == torch.float32 for reading in readings)


@pytest.mark.parametrize("kind", KINDS)
def test_velocity_is_the_derivative_of_the_exact_gaussian_flow(kind: Kind, schedule: NoiseSchedule) -> None:
    t = (torch.tensor([100.0, 300, 500, 800], dtype=torch.float64) + 0.5) / 1000  # inside the intervals of VP
    z = torch.tensor([-1.3, 0.4, 2.0, -0.2], dtype=torch.float64)

    def path(t: Tensor) -> Tensor:
        alpha, sigma, _, _ = schedule.coefficients(t)
        return alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * z

    x_t, h = path(t), 1e-5
    x0, eps = posterior(schedule, x_t, t)
    empty = Prediction(x_t, kind, x_t, t, schedule)
    prediction = Prediction(empty.target(x0, eps), kind, x_t, t, schedule)
    slope = (path(t + h) - path(t - h)) / (2 * h)
    assert ((prediction.velocity - slope).abs() / (1 + slope.abs())).max() < 1e-5


def test_a_jump_mixes_both_readings(schedule: NoiseSchedule) -> None:
    t, s = torch.tensor([0.9, 0.5]), torch.tensor([0.4, 0.0])
    x0, eps = torch.randn(2, 2, 6)
    prediction = perfect("v_prediction", schedule, x0, eps, t)
    assert torch.allclose(prediction.to(s), add_noise(schedule, x0, eps, s), rtol=1e-4, atol=1e-4)
    assert torch.equal(prediction.to(torch.zeros(2)), prediction.x0)


def test_a_jump_to_where_it_stands_stays(schedule: NoiseSchedule) -> None:
    t = torch.tensor([0.15, 0.5, 0.85])
    x_t, value = torch.randn(2, 3, 4)
    for kind in KINDS:
        there = Prediction(value, kind, x_t, t, schedule).to(t)
        assert torch.allclose(there, x_t, rtol=1e-4, atol=1e-4)


def test_the_level_can_differ_from_the_time_told() -> None:
    x, value = torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)
    told = Prediction(value, "flow_prediction", x, torch.tensor([0.5]), Flow())
    assert told.x0.item() == 0.5
    assert told.at(torch.tensor([0.25])).x0.item() == 1.25 and told.x0.item() == 0.5


def regression(kind: Kind, schedule: NoiseSchedule, s: float, t: float) -> tuple[float, float]:
    """(intercept, slope) of E[bridge_target | x_t], in closed form.

    The target is c x_s + d eps and x_t = a x_s + b eps with independent x_s ~ N(alpha_s m, V_s) and eps ~ N(0, 1).
    """
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    when, start = torch.tensor([t], dtype=torch.float64), torch.tensor([s], dtype=torch.float64)
    prediction = Prediction(zero, kind, one, when, schedule)
    c = prediction.bridge_target(one, start, zero).item()
    d = prediction.bridge_target(zero, start, one).item()
    assert prediction.bridge_target(3 * one, start, -2 * one).item() == pytest.approx(3 * c - 2 * d, rel=1e-5)
    alpha, sigma, _, _ = (v.item() for v in schedule.coefficients(start))
    a, b = (v.item() for v in bridge(schedule, start, when, one))
    variance = alpha**2 * STD**2 + sigma**2
    slope = (c * a * variance + d * b) / (a**2 * variance + b**2)
    return c * alpha * MEAN - slope * a * alpha * MEAN, slope


@pytest.mark.parametrize(
    "kind, intercept, slope",
    [("flow_prediction", -0.956098, 1.219512), ("sample", 0.669268, 0.146341), ("epsilon", -0.286829, 1.365854)],
)
def test_bridge_target_is_unbiased_fixture_p_flow(kind: Kind, intercept: float, slope: float) -> None:
    assert regression(kind, Flow(), 0.4, 0.7) == pytest.approx((intercept, slope), abs=1.5e-6)


@pytest.mark.parametrize(
    "kind, intercept, slope",
    [
        ("epsilon", -0.460274, 1.095890),
        ("sample", 0.613699, 0.205479),
        ("v_prediction", 0.6 * -0.460274 - 0.8 * 0.613699, 0.6 * 1.095890 - 0.8 * 0.205479),
    ],
)
def test_bridge_target_is_unbiased_fixture_p_vp(kind: Kind, intercept: float, slope: float) -> None:
    trig = Trig()
    s, t = trig.time_of(torch.tensor([0.5 / 0.75**0.5, 0.8 / 0.6], dtype=torch.float64)).tolist()
    assert regression(kind, trig, s, t) == pytest.approx((intercept, slope), abs=2e-6)


@pytest.mark.parametrize("kind, levels", list(itertools.product(KINDS, [(0.0, 0.6), (0.2, 0.3), (0.4, 0.7)])))
def test_bridge_target_is_unbiased_everywhere(kind: Kind, levels: tuple[float, float], schedule: NoiseSchedule) -> None:
    s, t = levels
    when = torch.tensor([[t]], dtype=torch.float64)
    empty = Prediction(when, kind, when, when[0], schedule)
    intercept = empty.target(*posterior(schedule, torch.zeros_like(when), when)).item()
    slope = empty.target(*posterior(schedule, torch.ones_like(when), when)).item() - intercept
    assert regression(kind, schedule, s, t) == pytest.approx((intercept, slope), rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_start_clean_have_the_ordinary_target_bit_for_bit(kind: Kind, schedule: NoiseSchedule) -> None:
    s, t = torch.tensor([0.0, 0.3, 0.0, 0.55]), torch.tensor([0.4, 0.5, 0.9, 0.7])
    x_s, eps = torch.randn(2, 4, 3, 2, 2)
    prediction = Prediction(x_s, kind, x_s, t, schedule)
    target, ordinary = prediction.bridge_target(x_s, s, eps), prediction.target(x_s, eps)
    assert torch.equal(target[s == 0], ordinary[s == 0])
    assert torch.isfinite(target).all() and not torch.equal(target, ordinary)

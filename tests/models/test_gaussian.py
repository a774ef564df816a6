from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.core.prediction import KINDS, Kind
from fewstep.core.schedule import VP, Flow, NoiseSchedule
from fewstep.models.gaussian import GaussianModel, MixtureModel

MEAN, STD = 0.7, 0.5
MEANS = torch.tensor([[-1.5], [0.5], [2.0]])
WEIGHTS = torch.tensor([1.0, 2.0, 1.0])
COND = Condition()


def gaussian(schedule: NoiseSchedule, kind: Kind = "v_prediction") -> GaussianModel:
    return GaussianModel(MEAN, STD, schedule, kind)


def points(schedule: NoiseSchedule, t: Tensor, rows: int = 64) -> Tensor:
    """x (B, rows) from the marginals at t (B,)."""
    c = schedule.at(t, torch.zeros(len(t), 1))
    return c.alpha * MEAN + (c.alpha**2 * STD**2 + c.sigma**2).sqrt() * torch.randn(len(t), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_the_gradient_of_the_log_density(kind: Kind, schedule: NoiseSchedule) -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    x = points(schedule, t).requires_grad_()
    c = schedule.at(t, x)
    log_density = -0.5 * (x - c.alpha * MEAN) ** 2 / (c.alpha**2 * STD**2 + c.sigma**2)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    prediction = gaussian(schedule, kind)(x, t, COND)
    assert torch.allclose(prediction.score, score, rtol=1e-3, atol=1e-3)
    denoised = (x + c.sigma**2 * score) / c.alpha  # Tweedie
    assert torch.allclose(prediction.x0, denoised, rtol=1e-3, atol=1e-3)


def test_the_mean_may_be_a_tensor() -> None:
    mean = torch.arange(6.0).reshape(2, 3)
    model = GaussianModel(mean, 0.1, Flow(), "flow_prediction")
    at_noise = model(torch.zeros(4, 2, 3), torch.full((4,), 0.9999), COND)
    assert torch.allclose(at_noise.x0, mean.expand(4, 2, 3), rtol=0, atol=1e-4)


def test_only_a_learned_model_learns() -> None:
    assert not any(p.requires_grad for p in gaussian(Flow()).parameters())
    model = GaussianModel(MEAN, STD, Flow(), "flow_prediction", learned=True)
    model(torch.randn(3, 2), torch.full((3,), 0.4), COND).x0.square().sum().backward()
    assert all(p.grad.abs().item() > 0 for p in model.parameters()) and model.log_std.item() == pytest.approx(
        math.log(STD)
    )


def test_a_flow_map_is_a_semigroup_with_the_identity(schedule: NoiseSchedule) -> None:
    model, (t, m, s) = gaussian(schedule), torch.tensor([[0.9], [0.4], [0.1]])
    x = points(schedule, t)
    assert torch.allclose(model.flow_map(x, t, t), x, rtol=1e-6, atol=1e-6)
    direct, by_way = model.flow_map(x, t, s), model.flow_map(model.flow_map(x, t, m), m, s)
    assert torch.allclose(by_way, direct, rtol=1e-5, atol=1e-5)
    assert torch.allclose(model.flow_map(direct, s, t), x, rtol=1e-4, atol=1e-4)


def test_a_flow_map_carries_one_marginal_to_the_other(schedule: NoiseSchedule) -> None:
    """Affine: standardised coordinates do not change."""
    t, s = torch.tensor([1.0]), torch.tensor([0.3])
    x, there = schedule.at(t, torch.zeros(1, 1)), schedule.at(s, torch.zeros(1, 1))
    z = torch.linspace(-3, 3, 13)[None]
    start = x.alpha * MEAN + (x.alpha**2 * STD**2 + x.sigma**2).sqrt() * z
    end = there.alpha * MEAN + (there.alpha**2 * STD**2 + there.sigma**2).sqrt() * z
    assert torch.allclose(gaussian(schedule).flow_map(start, t, s), end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("s", [0.1004, 0.3004, 0.6004])
def test_the_lagrangian_residual_is_zero(s: float, schedule: NoiseSchedule) -> None:
    """d/ds flow_map(x, t, s) = velocity(flow_map(x, t, s), s)."""
    model, t, to = gaussian(schedule), torch.tensor([0.9]), torch.tensor([s])
    x = points(schedule, t)
    end, speed = torch.func.jvp(lambda s: model.flow_map(x, t, s), (to,), (torch.ones(1),))
    velocity = model(end, to, COND).velocity
    assert torch.allclose(speed, velocity, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("t", [0.2004, 0.5004, 0.9004])
def test_the_eulerian_residual_is_zero(t: float, schedule: NoiseSchedule) -> None:
    """flow_map does not change along the flow: its derivative along (velocity, 1) vanishes."""
    model, start, s = gaussian(schedule), torch.tensor([t]), torch.tensor([0.05])
    x = points(schedule, start)
    velocity = model(x, start, COND).velocity
    _, along = torch.func.jvp(lambda x, t: model.flow_map(x, t, s), (x, start), (velocity, torch.ones(1)))
    _, across = torch.func.jvp(lambda x: model.flow_map(x, start, s), (x,), (velocity,))
    assert along.abs().max() < 2e-4 * across.abs().max()


@pytest.mark.parametrize("name, gain", [("flow", 3.0), ("trig", 3.0), ("vp_scaled", 2.0)])
def test_the_flow_map_is_the_end_of_a_fine_ode(name: str, gain: float, processes: dict[str, NoiseSchedule]) -> None:
    """Heun's method: half the step, a quarter of the error; less on VP, whose angle has a root at t = 0."""
    schedule, steps, errors = processes[name], (25, 50), []
    model, t = gaussian(schedule), torch.ones(1)
    start = points(schedule, t)
    exact = model.flow_map(start, t, torch.zeros(1))
    for count in steps:
        x = start
        for i in range(count, 0, -1):
            now, then = torch.tensor([i / count]), torch.tensor([(i - 1) / count])
            v = model(x, now, COND).velocity
            ahead = model(x - v / count, then, COND).velocity if i > 1 else v
            x = x - 0.5 * (v + ahead) / count
        errors.append((x - exact).abs().max().item())
    assert errors[1] < 0.003 and errors[0] / errors[1] > gain


def mixture(schedule: NoiseSchedule, kind: Kind = "epsilon", width: int = 1) -> MixtureModel:
    return MixtureModel(MEANS.expand(3, width), 0.3, WEIGHTS, schedule, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mixture_score_is_the_gradient_of_its_log_density(kind: Kind, schedule: NoiseSchedule) -> None:
    t, x = torch.tensor([0.1, 0.4, 0.7, 0.9]), torch.randn(4, 2).requires_grad_()
    c = schedule.at(t, x)
    residual = x[:, None] - c.alpha[:, :, None] * MEANS.expand(3, 2)
    marginal = c.alpha**2 * 0.3**2 + c.sigma**2
    log_density = torch.logsumexp(WEIGHTS.log() - residual.square().sum(2) / (2 * marginal), 1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    assert torch.allclose(mixture(schedule, kind, 2)(x, t, COND).score, score, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_one_component_is_a_gaussian(kind: Kind, schedule: NoiseSchedule) -> None:
    t, x = torch.tensor([0.2, 0.8]), torch.randn(2, 5)
    one = MixtureModel(torch.full((1, 5), MEAN), STD, torch.tensor([3.0]), schedule, kind)
    assert torch.allclose(one(x, t, COND).value, gaussian(schedule, kind)(x, t, COND).value, rtol=1e-5, atol=1e-5)


def quantile(schedule: NoiseSchedule, x: Tensor, t: Tensor) -> Tensor:
    """The distribution function of the mixture's marginal at t, in one dimension."""
    c = schedule.at(t, x)
    width = (c.alpha**2 * 0.3**2 + c.sigma**2).sqrt()
    return (torch.special.ndtr((x - c.alpha * MEANS.T) / width) * WEIGHTS / WEIGHTS.sum()).sum(1)


@pytest.mark.parametrize("name", ["vp_scaled", "flow", "trig"])
@pytest.mark.parametrize("s", [0.5, 0.0])
def test_the_mixture_flow_map_keeps_quantiles(name: str, s: float, processes: dict[str, NoiseSchedule]) -> None:
    """In one dimension the flow is monotone, so that it is known exactly through the distribution functions."""
    schedule = processes[name]
    t, to = torch.ones(41), torch.full((41,), s)
    x = torch.linspace(-2.5, 2.5, 41)[:, None]
    end = mixture(schedule).flow_map(x, t - 0.001, to, steps=200)
    assert (quantile(schedule, end, to) - quantile(schedule, x, t - 0.001)).abs().max() < 2e-3
    assert (end.diff(dim=0) > 0).all()


def test_the_mixture_flow_map_is_fine_enough() -> None:
    """Against four times the steps, in two dimensions."""
    model = MixtureModel(torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]]), 0.2, WEIGHTS, Flow(), "flow_prediction")
    x, t, s = torch.randn(64, 2), torch.ones(64), torch.zeros(64)
    coarse, fine = (model.flow_map(x, t, s, steps) for steps in (100, 400))
    assert (coarse - fine).abs().max() < 5e-3 and (coarse - fine).abs().max() > 0


def test_the_models_are_their_own_null_condition(vp: VP) -> None:
    cond = Condition({"class_labels": torch.zeros(2)})
    assert gaussian(vp).null(cond) is cond and mixture(vp).null(cond) is cond
    assert mixture(vp)(torch.zeros(2, 1), torch.ones(2), cond, taps=("here",)).features["here"].shape == (2, 1)

"""MeanFlow (arXiv:2505.13447): u = v - (t - r) du/dt, the derivative by a Jacobian-vector product of the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.core.batch import Batch, Condition
from fewstep.core.schedule import Flow, add_noise
from fewstep.core.times import Times
from fewstep.models.backbone import Backbone
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.gaussian import GaussianModel
from fewstep.objectives.base import Objective, Triad, Turn
from fewstep.rollout import Rollout, Step, ode


def tangent(net: Backbone, x: Tensor, t: Tensor, r: Tensor, cond: Condition, v: Tensor) -> tuple[Tensor, Tensor]:
    """u(x, t, r) and du/dt along (v, 1, 0), without a graph."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        along = (v, torch.ones_like(t), torch.zeros_like(r))
        return torch.func.jvp(lambda x, t, r: net(x, t, cond, to=r).value, (x, t, r), along)


class MeanFlow(Objective):
    reads = ("x0",)

    def turns(self, batch: Batch, step: int):
        net, x0 = self.triad.generator, batch.x0
        t, r = (self.draw_time(batch, name, Times(low=0.02)) for name in "tr")
        t, r = torch.maximum(t, r), torch.minimum(t, r)
        eps = batch.draw.normal("eps", x0.shape[1:])
        x_t, v = add_noise(net.schedule, x0, eps, t), eps - x0
        _, slope = tangent(net, x_t, t, r, batch.cond, v)
        target = v - (t - r)[:, None, None, None] * slope
        prediction = net(x_t, t, batch.cond, to=r)
        yield Turn("generator", (prediction.value - target).square().mean())


def student(tiny_unet: Callable[..., nn.Module]) -> DiffusersBackbone:
    net = DiffusersBackbone(tiny_unet(), Flow(), "flow_prediction")
    net.add_dial("to")
    nn.init.normal_(net.dials["second_time"].layers[-1].weight, std=0.1)
    return net


def test_the_product_is_the_derivative(tiny_unet: Callable[..., nn.Module]) -> None:
    net, x, v = student(tiny_unet), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    t, r = torch.tensor([0.6, 0.9]), torch.tensor([0.2, 0.5])
    cond = Condition({"class_labels": torch.tensor([0, 3])})
    u, slope = tangent(net, x, t, r, cond, v)
    assert torch.allclose(u, net(x, t, cond, to=r).value, rtol=1e-4, atol=1e-5)
    assert not u.requires_grad and not slope.requires_grad
    h = 1e-4
    with torch.no_grad():
        ahead, behind = (net(x + k * h * v, t + k * h, cond, to=r).value for k in (1, -1))
    difference = (ahead - behind) / (2 * h)
    assert (difference - slope).norm() / slope.norm() < 0.02  # float32 rounding over h
    _, still = tangent(net, x, t, r, cond, torch.zeros_like(v))
    _, doubled = tangent(net, x, t, r, cond, 2 * v)
    assert torch.allclose(doubled - still, 2 * (slope - still), rtol=1e-3, atol=1e-3)


class AverageVelocity(GaussianModel):
    """The exact u(x, t, r) = (x - flow map) / (t - r) of Gaussian data."""

    def forward(self, x_t, t, cond, *, to=None, taps=(), stop=False):
        plain = super().forward(x_t, t, cond)
        assert to is not None
        value = (x_t - self.flow_map(x_t, t, to)) / (t - to)[:, None]
        return type(plain)(value, self.kind, x_t, t, self.schedule)


def test_the_identity_holds_at_the_exact_flow_map() -> None:
    net, x = AverageVelocity(0.7, 0.5, Flow(), "flow_prediction"), torch.randn(3, 2)
    t, r = torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0.1, 0.5, 0.0])
    v = GaussianModel(0.7, 0.5, Flow(), "flow_prediction")(x, t, Condition()).velocity
    u, slope = tangent(net, x, t, r, Condition(), v)
    assert torch.allclose(u, v - (t - r)[:, None] * slope, rtol=1e-4, atol=1e-5)


def test_it_trains_and_samples(
    tiny_unet: Callable[..., nn.Module], stage: Any, images: Any, weights: Callable[[nn.Module], Tensor]
) -> None:
    net = student(tiny_unet)
    rollout = Rollout([Step(1, 1), Step(0.5, 0.5)], ode, two_times=True)
    one, before = stage(MeanFlow, Triad(net), rollout, lr=1e-3), weights(net.dials)
    logs = one.play(images, steps=2)
    assert all(log["generator/loss"] > 0 for log in logs)
    assert (weights(net.dials) - before).abs().max() > 1e-4
    batch = images(torch.arange(3), 0)
    x = rollout(net, batch.noise, batch.cond, batch.draw).x0
    u = net(batch.noise, torch.ones(3), batch.cond, to=torch.full((3,), 0.5)).value
    middle = batch.noise - 0.5 * u
    u = net(middle, torch.full((3,), 0.5), batch.cond, to=torch.zeros(3)).value
    assert torch.allclose(x, middle - 0.5 * u, rtol=0, atol=1e-5)

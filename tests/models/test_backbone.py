from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.prediction import KINDS, Kind, Prediction
from fewstep.core.schedule import VP, Flow, NoiseSchedule, remap
from fewstep.models.backbone import Backbone, Blend, Composite, Guided, Remapped, Routed, frozen, passes
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.gaussian import GaussianModel

Make = Callable[..., nn.Module]
SHAPE = (3, 8, 8)
COND = Condition({"class_labels": torch.tensor([0, 1, 2])})
NULL = Condition({"class_labels": torch.tensor([4, 4, 4])})


class Recorder(Composite):
    """Passes everything on to `inner` and keeps what it was given."""

    def __init__(self, inner: Backbone):
        super().__init__(inner)
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, x_t, t, cond, *, to=None, taps: Sequence[str] = (), stop=False):
        self.calls.append({"x_t": x_t, "t": t, **cond.inputs, **({} if to is None else {"to": to})})
        return self.inner(x_t, t, cond, to=to, taps=taps, stop=stop)


@pytest.fixture
def net(tiny_unet: Make) -> DiffusersBackbone:
    """A tiny flow network with labels 0..3 and the null label 4."""
    return DiffusersBackbone(tiny_unet(), Flow(), "flow_prediction", null_label=4)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))


T = torch.tensor([0.2, 0.6, 0.9])


def test_no_guidance_is_a_plain_pass(net: DiffusersBackbone, x: Tensor) -> None:
    recorder = Recorder(net)
    guided = Guided(recorder, 1.0)(x, T, COND, taps=("mid_block",))
    assert torch.equal(guided.value, net(x, T, COND).value) and "mid_block" in guided.features
    assert [len(call["x_t"]) for call in recorder.calls] == [3]


@pytest.mark.parametrize("w", [0.0, 1.5, 7.0])
def test_guidance_is_u_plus_w_times_c_minus_u_in_one_pass(w: float, net: DiffusersBackbone, x: Tensor) -> None:
    net.add_dial("to")
    recorder = Recorder(net)
    guided = Guided(recorder, w)(x, T, COND, to=T / 2)
    u, c = net(x, T, NULL, to=T / 2), net(x, T, COND, to=T / 2)
    assert torch.allclose(guided.value, u.value + w * (c.value - u.value), rtol=0, atol=1e-5)
    assert torch.allclose(guided.x0, u.x0 + w * (c.x0 - u.x0), rtol=0, atol=1e-5)
    assert guided.x_t is x and guided.t is T and guided.kind == "flow_prediction"
    (call,) = recorder.calls
    assert call["class_labels"].tolist() == [4, 4, 4, 0, 1, 2]
    assert torch.equal(call["to"], torch.cat([T, T]) / 2) and torch.equal(call["x_t"], torch.cat([x, x]))


def test_every_row_can_have_a_guidance_of_its_own(net: DiffusersBackbone, x: Tensor) -> None:
    scales = torch.tensor([0.0, 1.0, 7.5])
    together = Guided(net, scales)(x, T, COND).value
    for row, scale in enumerate(scales.tolist()):
        alone = Guided(net, scale)(x, T, COND).value[row]
        assert torch.allclose(together[row], alone, rtol=0, atol=1e-5)
    assert passes(Guided(net, scales)) == 2 and passes(Guided(net, 1.0)) == 1


def test_guidance_needs_a_null_condition_and_has_no_features(net: DiffusersBackbone, x: Tensor) -> None:
    with pytest.raises(ValueError, match="has no features of its own"):
        Guided(net, 2.0)(x, T, COND, taps=("mid_block",))
    net.null_label = None
    with pytest.raises(ValueError, match="no null condition: set guidance to 1"):
        Guided(net, 2.0)(x, T, COND)


def test_a_composite_has_the_process_of_what_it_wraps(net: DiffusersBackbone, vp: VP) -> None:
    for composite in (Guided(net, 3.0), Blend([net], [1.0]), Routed([net], [])):
        assert composite.schedule is net.schedule and composite.kind == net.kind
        assert composite.null(COND).inputs["class_labels"].tolist() == [4, 4, 4]
    remapped = Remapped(net, vp, "v_prediction")
    assert remapped.schedule is vp and remapped.kind == "v_prediction"
    assert remapped.null(COND).inputs["class_labels"].tolist() == [4, 4, 4]


@pytest.mark.parametrize("first, second", [("epsilon", "epsilon"), ("v_prediction", "sample")])
def test_a_blend_is_the_weighted_mean_of_readings(first: Kind, second: Kind, schedule: NoiseSchedule) -> None:
    a, b = GaussianModel(1.0, 0.5, schedule, first), GaussianModel(-2.0, 1.5, schedule, second)
    x, t = torch.randn(4, 5), torch.tensor([0.1, 0.4, 0.6, 0.8])
    cond = Condition()
    blend = Blend([a, b], [3.0, 1.0])(x, t, cond)
    assert blend.kind == first
    for reading in ("x0", "eps"):
        mean = 0.75 * getattr(a(x, t, cond), reading) + 0.25 * getattr(b(x, t, cond), reading)
        assert torch.allclose(getattr(blend, reading), mean, rtol=1e-4, atol=2e-4)
    extrapolated = Blend([a, b], [2.0, -1.0])(x, t, cond).x0
    assert torch.allclose(extrapolated, 2 * a(x, t, cond).x0 - b(x, t, cond).x0, rtol=1e-4, atol=3e-4)


def test_a_blend_refuses_taps_it_cannot_serve(net: DiffusersBackbone, x: Tensor) -> None:
    with pytest.raises(ValueError, match="features"):
        Blend([net, net], [0.5, 0.5])(x, T, COND, taps=("mid_block",))


@pytest.fixture
def routed(tiny_unet: Make) -> Routed:
    """Three experts: t in (.75, 1], (.25, .75] and [0, .25]."""
    experts = [DiffusersBackbone(tiny_unet(seed), Flow(), "flow_prediction", 4) for seed in range(3)]
    return Routed(experts, [0.75, 0.25])


def test_times_find_their_expert(routed: Routed) -> None:
    t = torch.tensor([1.0, 0.751, 0.75, 0.5, 0.2501, 0.25, 0.1, 0.0])
    assert routed.route(t).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert Routed([routed.experts[0]], []).route(t).tolist() == [0] * 8


def test_mixed_rows_are_answered_by_their_own_expert(routed: Routed) -> None:
    t = torch.tensor([0.9, 0.1, 0.5, 0.2, 1.0])
    x = torch.randn(5, *SHAPE)
    cond = Condition({"class_labels": torch.tensor([0, 1, 2, 3, 4])})
    mixed = routed(x, t, cond)
    for i, expert in enumerate([0, 2, 1, 2, 0]):
        rows = torch.tensor([i])
        own = routed.experts[expert](x[rows], t[rows], cond[rows]).value
        assert torch.allclose(mixed.value[rows], own, rtol=0, atol=1e-6)
        assert torch.allclose(routed(x[rows], t[rows], cond[rows]).value, own, rtol=0, atol=1e-6)
    assert mixed.x_t is x and mixed.t is t


def test_rows_of_one_expert_cost_one_pass_and_have_features(routed: Routed, x: Tensor) -> None:
    recorders = [Recorder(expert) for expert in routed.experts]
    one = Routed(recorders, routed.bounds)
    prediction = one(x, torch.tensor([0.3, 0.5, 0.75]), COND, taps=("mid_block",))
    assert [len(r.calls) for r in recorders] == [0, 1, 0] and "mid_block" in prediction.features
    with pytest.raises(ValueError, match="one expert at a time"):
        one(x, T, COND, taps=("mid_block",))


def test_gradients_of_mixed_rows_reach_the_experts_asked(routed: Routed, x: Tensor) -> None:
    routed(x, torch.tensor([0.9, 0.1, 0.8]), COND).value.square().mean().backward()
    reached = [any(p.grad is not None and p.grad.abs().max() > 0 for p in e.parameters()) for e in routed.experts]
    assert reached == [True, False, True]


@pytest.mark.parametrize("bounds", [[], [0.5], [0.2, 0.7], [0.7, 0.5, 0.2]])
def test_bounds_must_fit_the_experts(bounds: list[float], routed: Routed) -> None:
    with pytest.raises(ValueError, match="3 experts need 2 descending bounds"):
        Routed(list(routed.experts), bounds)


@pytest.mark.parametrize("inner", KINDS)
@pytest.mark.parametrize("name", ["vp_linear", "vp_scaled", "vp_zero_snr", "edm", "trig", "flow"])
def test_a_remapped_teacher_is_the_exact_teacher_of_the_other_process(
    name: str, inner: Kind, processes: dict[str, NoiseSchedule]
) -> None:
    """Wherever both processes reach, the same data has the same posterior."""
    source, cond = processes[name], Condition()
    t = torch.linspace(0.02, 1, 50)
    x = 0.3 + torch.randn(50, 4)
    there, _ = remap(Flow(), source, t, x)
    reached = there < 1
    remapped = Remapped(GaussianModel(0.7, 0.5, source, inner), Flow(), "flow_prediction")(x, t, cond)
    exact = GaussianModel(0.7, 0.5, Flow(), "flow_prediction")(x, t, cond)
    assert reached.sum() >= 45
    assert torch.allclose(remapped.value[reached], exact.value[reached], rtol=1e-3, atol=2e-3)
    assert remapped.x_t is x and remapped.t is t and isinstance(remapped.schedule, Flow)


def test_beyond_the_last_level_the_teacher_is_asked_at_it(vp: VP) -> None:
    inner = Recorder(GaussianModel(0.7, 0.5, vp, "epsilon"))
    x = torch.randn(2, 4)
    remapped = Remapped(inner, Flow(), "flow_prediction")(x, torch.tensor([0.99, 1.0]), Condition())
    assert inner.calls[0]["t"].tolist() == [1, 1]
    at_last = inner.inner(inner.calls[0]["x_t"], torch.ones(2), Condition())
    # Lengths agree, so that x stays in the law the teacher knows: sqrt(alpha^2 + sigma^2) = 1 under VP.
    lengths = torch.tensor([[(0.01**2 + 0.99**2) ** 0.5], [1.0]])
    assert torch.allclose(inner.calls[0]["x_t"], x / lengths, rtol=1e-6, atol=0)
    assert torch.allclose(remapped.value, at_last.eps - at_last.x0, rtol=1e-5, atol=1e-5)


def test_remapping_passes_the_second_time_and_the_features_on(net: DiffusersBackbone, x: Tensor, vp: VP) -> None:
    net.add_dial("to")
    recorder = Recorder(net)
    remapped = Remapped(recorder, vp, "v_prediction")
    prediction = remapped(x, T, COND, to=T / 2, taps=("mid_block",))
    ratio = lambda schedule, t: torch.div(*reversed(schedule.coefficients(t.double())[:2]))
    assert torch.allclose(ratio(Flow(), recorder.calls[0]["to"]), ratio(vp, T / 2), rtol=1e-4)
    stopped = remapped(x, T, COND, to=T / 2, taps=("mid_block",), stop=True)
    assert torch.equal(stopped.features["mid_block"], prediction.features["mid_block"])
    assert stopped.value.numel() == 0


def test_there_and_back_again(net: DiffusersBackbone, x: Tensor, vp: VP) -> None:
    back = Remapped(Remapped(net, vp, "epsilon"), Flow(), "flow_prediction")
    assert torch.allclose(back(x, T, COND).value, net(x, T, COND).value, rtol=1e-3, atol=1e-3)


def test_frozen_networks_pass_the_gradient_on(net: DiffusersBackbone, x: Tensor) -> None:
    net.net.conv_in.bias.requires_grad_(False)
    x = x.clone().requires_grad_()
    with frozen(net):
        loss = net(x, T, COND).x0.square().mean()
    loss.backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in net.parameters())
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in net.named_parameters()} - {"net.conv_in.bias"}
    free = x.detach().clone().requires_grad_()
    net(free, T, COND).x0.square().mean().backward()
    assert torch.allclose(free.grad, x.grad, rtol=1e-5, atol=1e-8)


def test_frozen_thaws_after_an_error(net: DiffusersBackbone) -> None:
    with pytest.raises(RuntimeError, match="inside"), frozen(net):
        assert not any(p.requires_grad for p in net.parameters())
        raise RuntimeError("inside")
    assert all(p.requires_grad for p in net.parameters())


def test_composites_compose(net: DiffusersBackbone, x: Tensor, vp: VP) -> None:
    """A guided teacher read on another process equals guidance of the teacher read there: both are linear."""
    inside = Remapped(Guided(net, 3.0), vp, "epsilon")(x, T, COND)
    outside = Guided(Remapped(net, vp, "epsilon"), 3.0)(x, T, COND)
    assert isinstance(inside, Prediction)
    assert torch.allclose(inside.value, outside.value, rtol=1e-4, atol=1e-4)


def test_a_scalar_the_network_cannot_hear_is_refused(net: DiffusersBackbone, x: Tensor) -> None:
    with pytest.raises(ValueError, match="no dial for to"):
        net(x, T, COND, to=T / 2)
    with pytest.raises(ValueError, match="no dial for guidance"):
        net(x, T, Condition(COND.inputs, {"guidance": T}))

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.schedule import EDM, VP, Flow, Trig
from fewstep.models.diffusers import DiffusersBackbone, network_time
from fewstep.models.embedders import TimeEmbedder
from fewstep.models.families import FAMILIES

Make = Callable[..., nn.Module]
SHAPE = (3, 8, 8)


@pytest.fixture(params=["unet", "dit"])
def net(request: pytest.FixtureRequest, tiny_unet: Make, tiny_dit: Make) -> nn.Module:
    """A tiny random network of each family."""
    return {"unet": tiny_unet, "dit": tiny_dit}[request.param]()


def labels(*values: int) -> Condition:
    return Condition({"class_labels": torch.tensor(values)})


def counted(module: nn.Module) -> list[int]:
    """Grows by the batch size at every forward of `module`."""
    seen: list[int] = []
    module.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def raw(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    """The plain diffusers call."""
    return net(x, timestep=timestep, class_labels=cond.inputs["class_labels"]).sample[:, :3]


def test_index_i_is_told_at_i_plus_one_thousandths(vp: VP) -> None:
    t = (torch.arange(1000) + 1) / 1000
    assert (network_time(vp, t) - torch.arange(1000)).abs().max() < 1e-4
    assert network_time(vp, torch.tensor([0.0])).item() == 0
    assert network_time(vp, t).dtype == torch.float32


@pytest.mark.parametrize("process", [Flow(), Trig(), EDM()])
def test_other_processes_are_told_a_thousand_t(process: Any) -> None:
    assert network_time(process, torch.tensor([0.0, 0.1, 0.999, 1.0])).tolist() == pytest.approx([0, 100, 999, 1000])


def test_the_value_is_what_the_network_says(net: nn.Module, vp: VP) -> None:
    x, t, cond = torch.randn(3, *SHAPE), torch.tensor([0.001, 0.25, 1.0]), labels(0, 3, 4)
    prediction = DiffusersBackbone(net, vp, "epsilon")(x, t, cond)
    assert torch.allclose(prediction.value, raw(net, x, torch.tensor([0.0, 249.0, 999.0]), cond), rtol=0, atol=1e-6)
    assert prediction.kind == "epsilon" and prediction.schedule is vp and prediction.x_t is x


def test_a_learned_variance_is_cut_off(tiny_dit: Make) -> None:
    wide = tiny_dit()
    backbone = DiffusersBackbone(wide, Flow(), "flow_prediction")
    x, t, cond = torch.randn(2, *SHAPE), torch.tensor([0.3, 0.9]), labels(1, 2)
    whole = wide(x, timestep=1000 * t, class_labels=cond.inputs["class_labels"]).sample
    assert whole.shape == (2, 6, 8, 8)
    assert torch.equal(backbone(x, t, cond).value, whole[:, :3])
    with torch.no_grad():
        channels = wide.proj_out_2.bias.reshape(-1, 6)  # patch positions x channels
        channels[:, 3:] += 5
    assert torch.equal(backbone(x, t, cond).value, whole[:, :3])


def test_one_flow_step_equals_the_flow_matching_scheduler(net: nn.Module) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(4)
    backbone = DiffusersBackbone(net, Flow(), "flow_prediction")
    x, cond = torch.randn(2, *SHAPE), labels(0, 2)
    for i, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            told, level, after = (torch.full((2,), float(v)) for v in (timestep / 1000, *scheduler.sigmas[i : i + 2]))
            mine = backbone(x, told, cond).at(level).to(after)
            theirs = scheduler.step(raw(net, x, timestep.expand(2), cond), timestep, x).prev_sample
        assert (mine - theirs).abs().max() < 2e-6
        x = theirs


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_one_ddim_step_equals_the_ddim_scheduler(net: nn.Module, kind: Any, zero_snr: bool) -> None:
    scheduler = diffusers.DDIMScheduler(
        prediction_type=kind, timestep_spacing="trailing", clip_sample=False, rescale_betas_zero_snr=zero_snr
    )
    scheduler.set_timesteps(5)
    backbone = DiffusersBackbone(net, VP(scheduler.alphas_cumprod), kind)
    x, cond, size = torch.randn(2, *SHAPE), labels(0, 2), 0.0
    first = 1 if zero_snr and kind == "epsilon" else 0  # not finite there, on either side
    for timestep in scheduler.timesteps[first:]:
        with torch.no_grad():
            t, s = (((timestep + 1).item() - back) / 1000 * torch.ones(2) for back in (0, 200))
            mine = backbone(x, t, cond).to(s)
            theirs = scheduler.step(raw(net, x, timestep.expand(2), cond), timestep, x).prev_sample
        size = max(size, theirs.abs().max().item())
        assert (mine - theirs).abs().max() < 3e-6 * size
        x = theirs


@pytest.mark.parametrize("t", [1.0, 0.4])
def test_rows_do_not_influence_each_other(net: nn.Module, vp: VP, t: float) -> None:
    backbone = DiffusersBackbone(net, vp, "epsilon")
    x, times, cond = torch.randn(3, *SHAPE), torch.tensor([t, 0.7, 0.2]), labels(0, 1, 2)
    whole = backbone(x, times, cond).value
    for i in range(3):
        rows = torch.tensor([i])
        assert torch.allclose(backbone(x[rows], times[rows], cond[rows]).value, whole[rows], rtol=0, atol=1e-6)


def blocks(net: nn.Module) -> list[str]:
    """Two blocks, in the order of the forward."""
    unet = isinstance(net, diffusers.UNet2DModel)
    return ["down_blocks.1", "mid_block"] if unet else ["transformer_blocks.0", "transformer_blocks.1"]


def test_taps_are_the_outputs_of_the_blocks(net: nn.Module, vp: VP) -> None:
    seen: dict[str, Tensor] = {}
    names = blocks(net)
    first = lambda output: output[0] if isinstance(output, tuple) else output
    for name in names:
        keep = lambda module, args, output, name=name: seen.update({name: first(output)})
        net.get_submodule(name).register_forward_hook(keep)
    before = hooks(net)
    backbone = DiffusersBackbone(net, vp, "epsilon")
    x, t, cond = torch.randn(2, *SHAPE), torch.tensor([0.3, 0.8]), labels(1, 4)
    tapped = backbone(x, t, cond, taps=names)
    assert list(tapped.features) == names and backbone.tap in names
    assert all(torch.equal(tapped.features[name], seen[name]) for name in names)
    plain = backbone(x, t, cond)
    assert torch.equal(plain.value, tapped.value) and plain.features == {}
    assert hooks(net) == before


def test_a_stopped_forward_has_the_same_features_and_gradients(net: nn.Module, vp: VP) -> None:
    names = blocks(net)
    last = net.conv_out if isinstance(net, diffusers.UNet2DModel) else net.proj_out_2
    passes = counted(last)
    backbone = DiffusersBackbone(net, vp, "epsilon")
    t, cond = torch.tensor([0.3, 0.8]), labels(1, 4)
    results = []
    for stop in (False, True):
        net.zero_grad()
        x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5)).requires_grad_()
        prediction = backbone(x, t, cond, taps=names, stop=stop)
        sum(value.square().mean() for value in prediction.features.values()).backward()
        grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        results.append((prediction, x.grad, grads))
    (whole, x_grad, grads), (stopped, x_grad_stopped, grads_stopped) = results
    assert passes == [2] and stopped.value.numel() == 0
    assert all(torch.equal(whole.features[name], stopped.features[name]) for name in names)
    assert torch.equal(x_grad, x_grad_stopped) and x_grad.abs().max() > 0
    assert set(grads) == set(grads_stopped) and len(grads) > 10
    assert all(torch.equal(grads[name], grads_stopped[name]) for name in grads)


def test_an_unknown_block_is_named_and_leaves_no_hook(net: nn.Module, vp: VP) -> None:
    before = hooks(net)
    backbone = DiffusersBackbone(net, vp, "epsilon")
    with pytest.raises(ValueError, match=r"no block 'attic' in .*: its blocks are .*blocks"):
        backbone(torch.zeros(1, *SHAPE), torch.ones(1), labels(0), taps=(blocks(net)[0], "attic"))
    with pytest.raises(Exception, match=r"channels|size|shape"):
        backbone(torch.zeros(1, 7, 8, 8), torch.ones(1), labels(0), taps=blocks(net))
    assert hooks(net) == before


def test_the_null_condition_replaces_the_labels(net: nn.Module, vp: VP) -> None:
    cond = Condition({"class_labels": torch.tensor([0, 3])}, {"w": torch.tensor([1.0, 2.0])})
    null = DiffusersBackbone(net, vp, "epsilon", null_label=4).null(cond)
    assert null.inputs["class_labels"].tolist() == [4, 4] and torch.equal(null.dials["w"], cond.dials["w"])
    with pytest.raises(ValueError, match="DiffusersBackbone has no null condition: set guidance to 1"):
        DiffusersBackbone(net, vp, "epsilon").null(cond)


def test_the_table_counts_the_label_embeddings(net: nn.Module, vp: VP) -> None:
    family = FAMILIES[type(net).__name__]
    count = family.classes(net)
    assert count == 5
    backbone = DiffusersBackbone(net, vp, "epsilon")
    backbone(torch.zeros(1, *SHAPE), torch.ones(1), labels(count - 1))
    with pytest.raises(IndexError):
        backbone(torch.zeros(1, *SHAPE), torch.ones(1), labels(count))


def test_a_network_without_labels_takes_an_empty_condition(tiny_unet: Make, vp: VP) -> None:
    net = tiny_unet(num_class_embeds=None)
    prediction = DiffusersBackbone(net, vp, "epsilon")(torch.zeros(2, *SHAPE), torch.ones(2), Condition())
    assert prediction.value.shape == (2, *SHAPE)


def test_a_class_without_a_row_is_named(vp: VP) -> None:
    with pytest.raises(
        ValueError, match=r"no row for Linear in the table of families: it has .*, DiTTr.*, UNet2DModel"
    ):
        DiffusersBackbone(nn.Linear(1, 1), vp, "epsilon")


@pytest.mark.parametrize("name", ["to", "guidance"])
def test_a_dial_is_silent_until_it_has_learned(name: str, net: nn.Module) -> None:
    backbone = DiffusersBackbone(net, Flow(), "flow_prediction")
    x, t, cond = torch.randn(2, *SHAPE), torch.tensor([0.3, 0.8]), labels(1, 4)

    def turned(value: float) -> Tensor:
        dial = torch.full((2,), value)
        if name == "to":
            return backbone(x, t, cond, to=dial).value
        return backbone(x, t, Condition(cond.inputs, {name: dial})).value

    before = backbone(x, t, cond).value
    backbone.add_dial(name)
    (embedder,) = backbone.dials.values()
    assert torch.equal(turned(0.1), before) and torch.equal(turned(0.7), before)
    turned(0.1).square().mean().backward()
    last = embedder.layers[-1]
    assert last.weight.grad.abs().max() > 0 and last.bias.grad.abs().max() > 0
    with torch.no_grad():
        last.weight.normal_(std=0.3)
    assert (turned(0.1) - turned(0.7)).abs().max() > 1e-4
    assert torch.equal(backbone(x, t, cond).value, before)
    turned(0.1).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in embedder.parameters())


def test_dials_add_up_row_by_row(tiny_unet: Make) -> None:
    backbone = DiffusersBackbone(tiny_unet(), Flow(), "flow_prediction")
    for name in ("to", "w"):
        backbone.add_dial(name)
    for embedder in backbone.dials.values():
        nn.init.normal_(embedder.layers[-1].weight, std=0.3)
    x, t, to, w = torch.randn(1, *SHAPE).expand(2, -1, -1, -1), torch.full((2,), 0.5), *torch.rand(2, 2)
    whole = backbone(x, t, Condition(labels(0, 0).inputs, {"w": w}), to=to).value
    for i in range(2):
        rows = torch.tensor([i])
        one = backbone(x[rows], t[rows], Condition(labels(0).inputs, {"w": w[rows]}), to=to[rows]).value
        assert torch.allclose(whole[rows], one, rtol=0, atol=1e-6)
    assert (whole[0] - whole[1]).abs().max() > 1e-4


def test_the_embedder_tells_close_times_apart() -> None:
    embedder = TimeEmbedder(16)
    assert embedder(torch.rand(3)).shape == (3, 16) and embedder(torch.rand(3)).abs().max() == 0
    nn.init.eye_(embedder.layers[-1].weight)
    a, b = embedder(torch.tensor([0.500, 0.501]))
    assert (a - b).abs().max() > 0.05
    assert not any("scale" in name for name in embedder.state_dict())


def test_dials_of_a_checkpointed_dit_are_refused_rather_than_lost(tiny_dit) -> None:
    """The time embedding of a DiT lies in a block; recomputed without the hook, its gradient would be wrong."""
    net = DiffusersBackbone(tiny_dit(), Flow(), "flow_prediction", null_label=4)
    net.add_dial("to")
    x, t, cond = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.7]), Condition({"class_labels": torch.tensor([0, 1])})
    net(x, t, cond, to=t / 2)
    net.net.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="lost when a checkpointed block is recomputed"):
        net(x, t, cond, to=t / 2)
    with torch.no_grad():
        net(x, t, cond, to=t / 2)

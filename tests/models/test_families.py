"""The text families against their own pipelines: what the denoiser is told, what it says, where a step leads."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.schedule import VP, Flow
from fewstep.models import schedulers, tiny
from fewstep.models.backbone import Guided
from fewstep.models.codecs import codec_of
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.experts import model_of
from fewstep.models.lora import LoraSpec
from fewstep.models.voices import Shared
from tests.families import FAMILIES, NULL, T, asked, denoiser, our_walk, shape_of, their_walk
from tests.families import told as told_of


@pytest.fixture(params=FAMILIES)
def pipeline(request: pytest.FixtureRequest) -> Any:
    """A tiny random pipeline of each family."""
    return tiny.make(request.param)


@pytest.mark.parametrize("negative", [None, "a blue car"])
@pytest.mark.parametrize("steps", [1, 2])
def test_every_step_is_that_of_the_pipeline(steps: int, negative: str | None, pipeline: Any) -> None:
    theirs, mine = their_walk(pipeline, steps, negative), our_walk(pipeline, steps, negative)
    assert len(theirs) == len(mine) == steps
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("steps", [1, 2])
def test_wan_walks_with_the_scheduler_that_it_ships(steps: int) -> None:
    shipped = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    pipeline = tiny.make("wan", scheduler=shipped)
    theirs, mine = their_walk(pipeline, steps, None), our_walk(pipeline, steps, None)
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


NAMED = ("dit", "sd15", "sd21", "sdxl", "sd3", "pixart_alpha", "pixart_sigma", "sana", "wan", "wan22")
"""Families that are told their inputs by the names that these have; of others the step alone can tell."""


@pytest.mark.parametrize(
    "family, changes",
    [*((family, {}) for family in NAMED), ("sd3", {"long_prompts": False}), ("pixart_alpha", {"sample_size": 64})],
)
def test_a_condition_is_what_the_pipeline_tells_its_denoiser(family: str, changes: dict[str, Any]) -> None:
    pipeline = tiny.make(family, **changes)
    told: dict[str, Any] = {}
    hook = lambda module, args, kwargs: told.update(kwargs)
    handle = model_of(denoiser(pipeline)).register_forward_pre_hook(hook, with_kwargs=True)
    their_walk(pipeline, 1, None, guidance=1.0)
    handle.remove()
    told |= told.get("added_cond_kwargs") or {}
    cond = told_of(codec_of(pipeline))
    assert all(torch.equal(value, told[name]) for name, value in cond.inputs.items())
    assert all(value.dtype in (torch.float32, torch.long) and len(value) == 2 for value in cond.inputs.values())


def test_the_process_is_read_from_the_scheduler(pipeline: Any) -> None:
    schedule, kind = schedulers.read(pipeline.scheduler)
    assert kind == pipeline.scheduler.config.get("prediction_type", "flow_prediction")
    flow = kind == "flow_prediction"
    assert isinstance(schedule, Flow if flow else VP)
    codec = codec_of(pipeline)
    shift = codec.time_shift(pipeline.scheduler, shape_of(codec))
    if flow and pipeline.scheduler.config.get("use_dynamic_shifting"):
        assert shift > 1
    else:
        assert shift == schedulers.time_shift(pipeline.scheduler) and (flow or shift == 1)


def test_the_null_condition_keeps_the_sizes_and_the_dials(pipeline: Any) -> None:
    backbone, _, cond = asked(pipeline)
    row = backbone.unconditional
    if row is None:
        assert backbone.null(cond).inputs["class_labels"].tolist() == [NULL] * 2
        return
    assert "time_ids" not in row.inputs
    null = backbone.null(Condition(cond.inputs, {"w": T}))
    assert set(null.inputs) == set(cond.inputs) and torch.equal(null.dials["w"], T)
    for name, value in null.inputs.items():
        expected = row.inputs[name].expand_as(value) if name in row.inputs else cond.inputs[name]
        assert torch.equal(value, expected)
    other = DiffusersBackbone(backbone.net, backbone.schedule, backbone.kind)
    with pytest.raises(ValueError, match="has no null condition: set guidance to 1"):
        other.null(cond)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_tap_of_a_joint_block_is_its_image_stream(sharded: bool) -> None:
    """Also of the class that FSDP2 makes of the block's own."""
    backbone, x, cond = asked(tiny.make("sd3"))
    for block in backbone.net.transformer_blocks if sharded else ():
        block.__class__ = type(f"FSDP{type(block).__name__}", (type(block),), {})
    given: list[Tensor] = []
    backbone.net.norm_out.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    names = ["transformer_blocks.0", "transformer_blocks.2", "transformer_blocks.2.attn", "pos_embed"]
    features = backbone(x, T, cond, taps=names).features
    assert {value.shape for value in features.values()} == {(2, 16, 8)}
    assert torch.equal(features["transformer_blocks.2"], given[0])


def test_the_input_gets_a_gradient_through_guidance(pipeline: Any) -> None:
    backbone, x, cond = asked(pipeline)
    x.requires_grad_()
    Guided(backbone, 5.0)(x, T, cond).value.square().mean().backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", ["to", "guidance"])
def test_a_dial_is_silent_until_it_has_learned(name: str, pipeline: Any) -> None:
    backbone, x, cond = asked(pipeline)
    before = backbone(x, T, cond).value
    backbone.add_dial(name)
    (embedder,) = backbone.dials.values()

    def turned(value: float) -> Tensor:
        dial = torch.full((2,), value)
        if name == "to":
            return backbone(x, T, cond, to=dial).value
        return backbone(x, T, Condition(cond.inputs, {name: dial})).value

    assert torch.equal(turned(0.1), before) and torch.equal(turned(0.7), before)
    with torch.no_grad():
        embedder.layers[-1].weight.normal_(std=0.3)
    assert (turned(0.1) - turned(0.7)).abs().max() > 1e-4
    turned(0.1).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in embedder.parameters())


def voices_of(backbone: DiffusersBackbone) -> Shared:
    spec = LoraSpec(2, 4.0, ["to_q", "to_v", "to_out.0"])
    return Shared(backbone, {"generator": spec, "critic": spec})


def test_a_voice_speaks_through_each_family(pipeline: Any) -> None:
    backbone, x, cond = asked(pipeline)
    before = backbone(x, T, cond).value.detach()
    voice = voices_of(backbone).as_("critic")
    assert torch.equal(voice(x, T, cond).value, before)
    for p in voice.parameters():
        nn.init.normal_(p, std=0.3)
    after = voice(x, T, cond).value.detach()
    assert (after - before).abs().max() > 1e-3
    assert (voice.fused()(x, T, cond).value - after).abs().max() < 1e-5
    null = backbone.null(cond)
    for net in (voice, copy.deepcopy(voice), voice.fused()):
        assert all(torch.equal(value, null.inputs[name]) for name, value in net.null(cond).inputs.items())

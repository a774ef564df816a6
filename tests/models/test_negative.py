"""Negative-away steer attention: what a layer gives by hand, what a network then says, and who cannot have it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import T, ask
from torch import Tensor

from fewstep import cli
from fewstep.core.errors import UserError
from fewstep.models import attention, tiny
from fewstep.models.backbone import Guided
from fewstep.models.lora import LoraSpec
from fewstep.models.negative import NegativeAttention, cross_attention, subtracted
from fewstep.models.voices import Shared


def attended(layer, queries: Tensor, tokens: Tensor) -> Tensor:
    """softmax(Q K' / sqrt d) V of every head, side by side, before the layer's output projection."""
    q, k, v = (
        project(x).unflatten(2, (layer.heads, -1)).transpose(1, 2)
        for project, x in ((layer.to_q, queries), (layer.to_k, tokens), (layer.to_v, tokens))
    )
    return ((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(3) @ v).transpose(1, 2).flatten(2)


def layer_and_inputs() -> tuple:
    net, _, cond = ask("unet2d_condition")
    tokens = cond.inputs["encoder_hidden_states"]
    layer = cross_attention(net.net, tokens.shape[-1])[0]
    torch.nn.init.normal_(layer.to_out[0].bias)
    return layer, torch.randn(2, 5, layer.to_q.in_features), tokens, torch.randn_like(tokens[:1])


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.2, 1.0])
def test_a_layer_gives_what_it_finds_of_the_prompt_less_what_it_finds_of_the_other(scale: float) -> None:
    layer, queries, tokens, negative = layer_and_inputs()
    found, away = attended(layer, queries, tokens), attended(layer, queries, negative.expand_as(tokens))
    with subtracted([layer], scale, negative):
        steered = layer(queries, encoder_hidden_states=tokens)
    assert torch.allclose(steered, layer.to_out[0](found - scale * away), atol=1e-5)
    plain = layer(queries, encoder_hidden_states=tokens)
    assert torch.allclose(plain, layer.to_out[0](found), atol=1e-5) and (plain - steered).abs().max() > 1e-3


@torch.no_grad()
def test_a_prompt_led_away_from_itself_keeps_a_share_of_itself() -> None:
    """c- = c+ gives (1 - a) Z+."""
    layer, queries, tokens, _ = layer_and_inputs()
    same = tokens[:1].expand_as(tokens)
    with subtracted([layer], 0.3, tokens[:1]):
        steered = layer(queries, encoder_hidden_states=same)
    assert torch.allclose(steered, layer.to_out[0](0.7 * attended(layer, queries, same)), atol=1e-5)


@torch.no_grad()
def test_a_scale_of_zero_changes_no_bit() -> None:
    net, x, cond = ask("unet2d_condition")
    negative = torch.randn_like(cond.inputs["encoder_hidden_states"][:1])
    plain = net(x, T, cond).value
    assert torch.equal(NegativeAttention(net, 0.0, negative)(x, T, cond).value, plain)
    assert (NegativeAttention(net, 0.5, negative)(x, T, cond).value - plain).abs().max() > 1e-4
    assert torch.equal(net(x, T, cond).value, plain)


@torch.no_grad()
def test_it_reaches_guided_networks_adapters_and_other_kernels() -> None:
    net, x, cond = ask("unet2d_condition")
    negative = torch.randn_like(cond.inputs["encoder_hidden_states"][:1])
    steered = NegativeAttention(net, 0.5, negative)(x, T, cond).value
    net.unconditional = type(cond)({"encoder_hidden_states": negative})
    guided = NegativeAttention(Guided(net, 1.0), 0.5, negative)(x, T, cond).value
    assert torch.equal(guided, steered)
    assert NegativeAttention(Guided(net, 2.0), 0.5, negative)(x, T, cond).value.shape == x.shape
    attention.use(net.net, "math")
    assert torch.allclose(NegativeAttention(net, 0.5, negative)(x, T, cond).value, steered, atol=1e-4)
    attention.use(net.net, "sdpa")
    voice = Shared(net, {"student": LoraSpec(2, 2.0, ["to_q", "to_out.0"])}).as_("student")
    assert torch.allclose(NegativeAttention(voice, 0.5, negative)(x, T, cond).value, steered, atol=1e-5)


@pytest.mark.parametrize("name", ["unet2d", "dit", "sd3", "wan"])
def test_networks_without_such_layers_are_refused(name: str) -> None:
    net, _, cond = ask(name)
    width = cond.inputs["encoder_hidden_states"].shape[-1] if "encoder_hidden_states" in cond.inputs else 8
    with pytest.raises(UserError, match="negative attention needs layers"):
        NegativeAttention(net, 0.2, torch.zeros(1, 3, width))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("teachers") / "sd15"
    tiny.make("sd15").save_pretrained(place)
    return place


def test_the_command_leads_away(pipeline: Path, tmp_path: Path) -> None:
    pictures = []
    for more in ([], ["--negative", "two rings", "--negative-attention", "0"], ["--negative", "x"]):
        given = [*more, *(["--negative-attention", "1"] if more[-1:] == ["x"] else [])]
        out = tmp_path / "x.png"
        given += ["--prompt", "a disc", "--count", "2", "--steps", "1", f"--out={out}"]
        assert cli.main(["sample", str(pipeline), *given]) == 0
        pictures.append(np.asarray(Image.open(out)).astype(int))
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--negative", "rings"], "go together"),
        (["--negative-attention", "0.2"], "go together"),
        (["--negative", "rings", "--negative-attention", "1.5"], "from 0 to 1, but 1.5"),
        (["--negative", "rings " * 90, "--negative-attention", "0.5"], "tokens, but this model reads"),
    ],
)
def test_mistakes(more: list[str], said: str, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["sample", str(pipeline), "--prompt", "a disc", *more, f"--out={tmp_path / 'x.png'}"]) == 2
    assert said in capsys.readouterr().err

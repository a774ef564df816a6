"""Codecs of the text families against their own pipelines, on tiny random ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.models import loading, tiny
from fewstep.models.codec import Codec
from fewstep.models.codecs import codec_of, open_codec
from fewstep.models.tiny import parts

FAMILIES = ("sd15", "sd21", "sdxl", "sd3", "wan")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def pixels(family: str) -> Tensor:
    shape = (2, 3, 5, 16, 16) if family == "wan" else (2, 3, 16, 16)
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


def saved(family: str, folder: Path, **changes: Any) -> Path:
    tiny.make(family, **changes).save_pretrained(folder)
    return folder


def rewritten(folder: Path, **nodes: Any) -> Path:
    """The folder with other entries in its index; None takes an entry away."""
    index = json.loads((folder / "model_index.json").read_text()) | nodes
    kept = {name: node for name, node in index.items() if node is not None}
    (folder / "model_index.json").write_text(json.dumps(kept))
    return folder


def same(a: Any, b: Any) -> bool:
    return set(a.inputs) == set(b.inputs) and all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)


def test_an_opened_codec_is_that_of_the_built_pipeline(family: str, tmp_path: Path) -> None:
    built, opened = codec_of(tiny.make(family)), open_codec(str(saved(family, tmp_path)))
    prompts = ["a red cat", ""]
    assert same(built.encode_prompts(prompts), opened.encode_prompts(prompts))
    assert same(built.unconditional("grey"), opened.unconditional("grey"))
    assert torch.equal(built.encode(pixels(family)), opened.encode(pixels(family)))
    net = opened.pipeline.components[loading.find(str(tmp_path)).parts[0]]
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert type(loading.load(str(tmp_path)).net) is type(net)


def test_decoding_is_what_the_pipeline_shows(family: str) -> None:
    pipeline = tiny.make(family)
    codec, frames = codec_of(pipeline), {"num_frames": 5} if family == "wan" else {}
    latents = torch.randn(2, *codec.latent_shape(16, 16, frames.get("num_frames")))
    call = {"num_inference_steps": 1, "height": 16, "width": 16, "latents": latents, **frames}
    (told,) = pipeline(["a", "b"], output_type="latent", return_dict=False, **call)[:1]
    (shown,) = pipeline(["a", "b"], output_type="pt", return_dict=False, **call)[:1]
    mine = (codec.decode(told) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(mine.transpose(1, 2) if family == "wan" else mine, shown)


def test_encoding_is_undone_by_the_scales_of_the_vae(family: str) -> None:
    pipeline = tiny.make(family)
    codec, images, config = codec_of(pipeline), pixels(family), pipeline.vae.config
    mode = pipeline.vae.encode(images).latent_dist.mode()
    if family == "wan":
        mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        expected = (mode - mean) * (1 / std)
    else:
        expected = (mode - (config.shift_factor or 0)) * config.scaling_factor
    latents = codec.encode(images)
    assert torch.equal(latents, expected) and latents.dtype == torch.float32
    assert latents.shape[1:] == codec.latent_shape(16, 16, 5 if family == "wan" else None)
    again = pipeline.vae.decode(mode, return_dict=False)[0]
    assert (codec.decode(latents) - again).abs().max() < 1e-5


def test_the_vae_of_a_playground_has_a_mean_and_a_deviation() -> None:
    pipeline = tiny.make("sdxl")
    pipeline.vae.register_to_config(latents_mean=[0.5, -0.5, 1.0, 0.0], latents_std=[2.0, 1.0, 4.0, 0.5])
    call = {"num_inference_steps": 1, "height": 16, "width": 16, "return_dict": False}
    call["latents"] = torch.randn(1, 4, 8, 8)
    told, shown = (pipeline("a", output_type=kind, **call)[0] for kind in ("latent", "pt"))
    assert ((codec_of(pipeline).decode(told) / 2 + 0.5).clamp(0, 1) - shown).abs().max() < 1e-6


def test_a_codec_is_frozen_and_stays_in_evaluation_mode(family: str) -> None:
    codec = codec_of(tiny.make(family))
    assert not any(p.requires_grad for p in codec.parameters()) and len(list(codec.parameters())) > 50
    owner = nn.ModuleList([codec]).train()
    assert owner.training and not any(module.training for module in codec.modules())
    assert same(codec.encode_prompts(["a"]), codec.encode_prompts(["a"]))


def test_decoding_has_a_gradient_in_the_latents(family: str) -> None:
    codec = codec_of(tiny.make(family))
    latents = codec.encode(pixels(family)).requires_grad_()
    codec.decode(latents).square().mean().backward()
    assert latents.grad is not None and latents.grad.abs().max() > 0


def test_no_prompt_is_zeros_where_the_pipeline_says_so() -> None:
    zeros, words = (codec_of(tiny.make("sdxl", zeros=zeros)) for zeros in (True, False))
    assert all((value == 0).all() for value in zeros.unconditional().inputs.values())
    for codec, negative in ((words, ""), (words, "grey"), (zeros, "grey")):
        row, cond = codec.unconditional(negative), codec.encode_prompts([negative])
        assert all(torch.equal(value, cond.inputs[name]) and value.any() for name, value in row.inputs.items())


def test_sizes_are_told_as_target_and_uncropped() -> None:
    codec = codec_of(tiny.make("sdxl"))
    assert codec.encode_prompts(["a", "b"]).inputs["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert codec.encode_prompts(["a"], size=(24, 32)).inputs["time_ids"].tolist() == [[24, 32, 0, 0, 24, 32]]


def test_wan_sees_zeros_after_the_prompt() -> None:
    (value,) = codec_of(tiny.make("wan")).encode_prompts(["abc"]).inputs.values()
    assert value.shape == (1, 512, 16) and value[0, :4].abs().amin(1).all() and (value[0, 4:] == 0).all()


@pytest.mark.parametrize("family, limit", [("sd15", 77), ("sdxl", 77), ("sd3", 77), ("wan", 512)])
def test_a_long_prompt_is_refused_unless_truncated(family: str, limit: int) -> None:
    changes = {"long_prompts": False} if family == "sd3" else {}  # its T5 would read on
    codec, marks = codec_of(tiny.make(family, **changes)), 1 if family == "wan" else 2
    fits, long = "x" * (limit - marks), "x" * (limit - marks + 1)
    codec.encode_prompts([fits])
    for encode in (lambda: codec.encode_prompts([fits, long]), lambda: codec.unconditional(long)):
        with pytest.raises(
            UserError, match=f"has {limit + 1} tokens, but this model reads {limit}.*shorten it"
        ) as error:
            encode()
        assert "\n" not in str(error.value)
    assert same(codec.encode_prompts([long], truncate=True), codec.encode_prompts([long + "x"], truncate=True))
    assert codec.unconditional(long, truncate=True).inputs["encoder_hidden_states"].shape[0] == 1


@pytest.mark.parametrize(
    "family, part",
    [
        ("sd15", "text_encoder"),
        ("sd15", "tokenizer"),
        ("sd15", "vae"),
        ("sdxl", "text_encoder_2"),
        ("sd3", "tokenizer_3"),
        ("wan", "text_encoder"),
    ],
)
def test_a_missing_component_is_named(family: str, part: str, tmp_path: Path) -> None:
    pipeline = tiny.make(family)
    pipeline.register_modules(**{part: None})
    with pytest.raises(UserError, match=f"this .*Pipeline has no {part}: prompts and images need vae, text_encoder"):
        codec_of(pipeline)
    folder = saved(family, tmp_path / "a")
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=f"the pipeline at .* has no {part}: "):
        open_codec(str(folder))
    folder = rewritten(saved(family, tmp_path / "b"), **{part: [None, None]})
    with pytest.raises(UserError, match=f"the pipeline at .* has no {part}: "):
        open_codec(str(folder))


@pytest.mark.parametrize("node", [[None, None], None])
def test_stable_diffusion_3_may_lack_its_t5(node: Any, tmp_path: Path) -> None:
    folder = rewritten(saved("sd3", tmp_path, long_prompts=False), text_encoder_3=node, tokenizer_3=node)
    value = open_codec(str(folder)).encode_prompts(["a cat"]).inputs["encoder_hidden_states"]
    clips = parts.LENGTH
    assert value.shape == (1, clips + 256, 24) and (value[:, clips:] == 0).all() and value[:, :clips].any()


def test_a_t5_that_was_lost_is_not_replaced_by_zeros(tmp_path: Path) -> None:
    folder = saved("sd3", tmp_path)
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(UserError, match="has no text_encoder_3: prompts and"):
        open_codec(str(folder))


def test_half_precision_is_for_the_text_alone(tmp_path: Path) -> None:
    codec = open_codec(str(saved("sd3", tmp_path)), dtype=torch.bfloat16)
    assert {p.dtype for p in codec.encoders.parameters()} >= {torch.bfloat16}
    assert {p.dtype for p in codec.vae.parameters()} == {torch.float32}
    assert {value.dtype for value in codec.encode_prompts(["a"]).inputs.values()} == {torch.float32}


def test_weights_that_are_no_safetensors_are_never_opened(tmp_path: Path) -> None:
    folder = saved("sd15", tmp_path)
    (folder / "text_encoder" / "model.safetensors").unlink()
    torch.save({}, folder / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"StableDiffusionPipeline cannot be loaded from .*safetensors"):
        open_codec(str(folder))


def test_other_pipelines_are_refused_by_name(tmp_path: Path) -> None:
    folder = rewritten(saved("sd15", tmp_path), _class_name="HiDreamImagePipeline")
    with pytest.raises(
        UserError, match="no codec for the pipeline 'HiDreamImagePipeline': it can use StableDiffusionPipe"
    ):
        open_codec(str(folder))
    with pytest.raises(UserError, match="there is no teacher at nowhere"):
        open_codec("nowhere")


def test_two_denoisers_are_refused(tmp_path: Path) -> None:
    folder = rewritten(saved("wan", tmp_path), transformer_2=["diffusers", "WanTransformer3DModel"])
    for opening in (open_codec, loading.load):
        with pytest.raises(UserError, match="has transformer and transformer_2, but fewstep takes one denoiser"):
            opening(str(folder))  # type: ignore[operator]


@pytest.mark.parametrize(
    "family, size, match",
    [
        ("sd15", (16, 15), "images of 16x15 were asked for, but sizes are multiples of 2$"),
        ("sd15", (0, 16), "sizes are multiples of 2"),
        ("sd15", (16, 16, 5), "5 frames were asked for, but this model makes single images"),
        ("sd3", (16, 18), "multiples of 4"),
        ("wan", (16, 24, 5), "multiples of 16"),
        ("wan", (16, 16, 4), "4 frames were asked for.*multiple of 4 frames and one"),
        ("wan", (16, 16), "no frames were asked for"),
    ],
)
def test_a_size_that_would_be_rounded_is_refused(family: str, size: tuple[int, ...], match: str) -> None:
    with pytest.raises(UserError, match=match):
        codec_of(tiny.make(family)).latent_shape(*size)


def test_latents_have_the_shape_of_the_pipeline() -> None:
    shapes = {family: codec_of(tiny.make(family)) for family in ("sd15", "sd3", "wan")}
    assert shapes["sd15"].latent_shape(16, 24) == (4, 8, 12) == shapes["sd3"].latent_shape(16, 24)
    assert shapes["wan"].latent_shape(32, 16, 9) == (4, 3, 4, 2) and isinstance(shapes["wan"], Codec)


@pytest.mark.parametrize(("name", "of_clips"), [("sd3", parts.LENGTH), ("wan", 0)])
def test_the_last_encoder_gives_as_many_tokens_as_it_is_asked_for(name: str, of_clips: int) -> None:
    """As the pipeline gives them for that max_sequence_length; both pad, so shorter texts are cut from longer ones."""
    codec = codec_of(tiny.make(name))
    usual = codec.encode_prompts(["a disc"]).inputs["encoder_hidden_states"]
    codec.give_tokens(9)
    fewer = codec.encode_prompts(["a disc"]).inputs["encoder_hidden_states"]
    assert usual.shape[1] == of_clips + {"sd3": 256, "wan": 512}[name] and fewer.shape[1] == of_clips + 9
    assert torch.equal(fewer[:, :of_clips], usual[:, :of_clips])
    with pytest.raises(UserError, match="10 tokens, but this model reads 9"):
        codec.encode_prompts(["nine byte"])


@pytest.mark.parametrize(
    ("name", "count", "said"), [("sdxl", 9, "always gives as many"), ("wan", 513, "from 1 to 512")]
)
def test_tokens_that_a_pipeline_cannot_be_asked_for(name: str, count: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        codec_of(tiny.make(name)).give_tokens(count)

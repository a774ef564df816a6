"""Between people and latents: prompts -> Condition and pixels <-> latents, as the pipeline of each family does it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.models import loading


class Codec(nn.Module):
    """The text encoders and the VAE of a diffusers `pipeline`; its own `encode_prompt` is what encodes.

    They are frozen here and stay in evaluation mode. Raises UserError for a component that is not there.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    MAY_LACK: ClassVar[tuple[str, ...]] = ()
    max_sequence_length: int | None = None
    """tokens that the last text encoder gives; None for a family whose pipeline is not asked for it"""
    # Arguments of the pipeline that keep what no codec needs from being loaded.
    UNUSED: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, pipeline: Any):
        super().__init__()
        there = {name: part for name, part in pipeline.components.items() if part is not None}
        self.refuse_absent(f"this {type(pipeline).__name__}", there)
        self.pipeline, self.vae = pipeline, pipeline.vae
        self.encoders = nn.ModuleDict({name: part for name, part in there.items() if name.startswith("text_encoder")})
        self.requires_grad_(False).eval()

    @classmethod
    def refuse_absent(cls, what: str, there: Collection[str], named: Collection[str] = ()) -> None:
        """Raises UserError where `what`, with the components `there`, lacks one that is needed or `named` by it."""
        encoders = [name for name in (*cls.NEEDS, *named, *there) if name.startswith("text_encoder")]
        tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
        needed = tuple(dict.fromkeys([*cls.NEEDS, *encoders, *tokenizers]))
        if absent := [name for name in needed if name not in there]:
            raise UserError(f"{what} has no {', no '.join(absent)}: prompts and images need {', '.join(needed)}")

    def give_tokens(self, count: int) -> None:
        """Sets `max_sequence_length`, by default that of the pipeline's own call. Raises UserError if it has none."""
        if self.max_sequence_length is None:
            raise UserError(
                f"a {type(self.pipeline).__name__} always gives as many tokens: remove max_sequence_length={count}"
            )
        if not 1 <= count <= _MOST_TOKENS:
            raise UserError(f"max_sequence_length is from 1 to {_MOST_TOKENS} tokens, but {count} was given")
        self.max_sequence_length = count

    def train(self, mode: bool = True) -> Codec:
        # Whoever holds a codec may be trained; its dropout would make the same prompt mean two things.
        return super().train(False)

    @torch.no_grad()
    def encode_prompts(
        self, prompts: list[str], *, size: tuple[int, int] | None = None, truncate: bool = False
    ) -> Condition:
        """The inputs (B, ...) float32 that the pipeline feeds its denoiser for `prompts`, under the denoiser's names.

        `size` (height, width) is what a network conditioned on sizes is told, by default its own; others ignore it.
        Raises UserError for a prompt that is too long, unless it may be truncated.
        """
        if not truncate:
            self.refuse_long(prompts)
        rows = {name: value.float() for name, value in self._embed(prompts).items()}
        return Condition({**rows, **self._sizes(len(prompts), size)})

    @torch.no_grad()
    def unconditional(self, negative: str = "", *, truncate: bool = False) -> Condition:
        """One row for `DiffusersBackbone`: what guidance leads away from. Sizes are not in it, they stay."""
        if not truncate:
            self.refuse_long([negative])
        return Condition({name: value.float() for name, value in self._embed([negative]).items()})

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) or videos (B, 3, T, H, W) in [-1, 1] -> latents (B, *S): the mean of the posterior."""
        mean, scale = self._statistics(images)
        return (self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode().float() - mean) * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, *S) -> images or videos, [-1, 1] but for overshoot; differentiable."""
        mean, scale = self._statistics(latents)
        return self.vae.decode((latents / scale + mean).to(self.vae.dtype), return_dict=False)[0].float()

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """The shape *S of one sample's latents. Raises UserError for a size that the pipeline would round."""
        if frames is not None:
            raise UserError(f"{frames} frames were asked for, but this model makes single images: leave frames out")
        return self.vae.config.latent_channels, *self._grid(height, width, self.pipeline.vae_scale_factor, 1)

    @abstractmethod
    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the prompts alone decide, by the denoiser's argument names."""

    def _limits(self) -> Iterator[tuple[Any, int]]:
        """Every tokenizer with the number of tokens it may give."""
        for name in self.encoders:
            tokenizer = getattr(self.pipeline, name.replace("text_encoder", "tokenizer"))
            yield tokenizer, tokenizer.model_max_length

    def _sizes(self, rows: int, size: tuple[int, int] | None) -> dict[str, Tensor]:
        return {}

    @property
    def _device(self) -> torch.device:
        return next(self.encoders.parameters()).device

    def refuse_long(self, prompts: list[str]) -> None:
        """Raises UserError for the first prompt with more tokens than one of the encoders reads."""
        for prompt in prompts:
            for tokenizer, limit in self._limits():
                if (count := len(tokenizer(prompt, truncation=False, verbose=False).input_ids)) > limit:
                    raise UserError(
                        f"the prompt '{prompt[:40]}...' has {count} tokens, but this model reads {limit}, its marks "
                        "included: shorten it"
                    )

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(mean, scale) with latents = (z - mean) scale: numbers, or one a channel, shaped to fit `like`."""
        config = self.vae.config
        scale, mean, std = config.get("scaling_factor") or 1.0, config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return config.get("shift_factor") or 0.0, scale
        shape = (1, -1, *[1] * (like.ndim - 2))
        return like.new_tensor(mean).view(shape), scale / like.new_tensor(std).view(shape)

    def _grid(self, height: int, width: int, factor: int, patch: int) -> tuple[int, int]:
        if min(height, width) < 1 or height % (factor * patch) or width % (factor * patch):
            raise UserError(f"images of {height}x{width} were asked for, but sizes are multiples of {factor * patch}")
        return height // factor, width // factor


class StableDiffusion(Codec):
    """Versions 1 and 2: the last layer of one CLIP."""

    UNUSED = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), None) | {
        "requires_safety_checker": False
    }

    def _embed(self, prompts):
        embeds, _ = self.pipeline.encode_prompt(prompts, self._device, 1, False)
        return {"encoder_hidden_states": embeds}


class StableDiffusionXL(Codec):
    """Two CLIPs side by side, the pooled output of the second, and the size of the image."""

    NEEDS = ("vae", "text_encoder", "text_encoder_2")
    UNUSED: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}

    def _embed(self, prompts):
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self._device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def _sizes(self, rows, size):
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        height, width = size or (side, side)
        # As if the image had been made at this size, and not cropped.
        told = torch.tensor([height, width, 0, 0, height, width], device=self._device).float()
        return {"time_ids": told.repeat(rows, 1)}

    def unconditional(self, negative="", *, truncate=False):
        row = super().unconditional(negative, truncate=truncate)
        if negative or not self.pipeline.config.force_zeros_for_empty_prompt:
            return row
        return Condition({name: torch.zeros_like(value) for name, value in row.inputs.items()})


class StableDiffusion3(Codec):
    """Two CLIPs side by side, then a T5; without it the pipeline gives zeros in its place. Pooled are the CLIPs."""

    NEEDS = ("vae", "text_encoder", "text_encoder_2")
    MAY_LACK = ("text_encoder_3", "tokenizer_3")
    UNUSED: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None}
    max_sequence_length = 256

    def _embed(self, prompts):
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def _limits(self):
        for tokenizer in (self.pipeline.tokenizer, self.pipeline.tokenizer_2):
            yield tokenizer, self.pipeline.tokenizer_max_length
        if self.pipeline.text_encoder_3 is not None:
            yield self.pipeline.tokenizer_3, self.max_sequence_length

    def _grid(self, height, width, factor, patch):
        return super()._grid(height, width, factor, self.pipeline.patch_size)


class Wan(Codec):
    """Videos; one UMT5, with zeros after the prompt."""

    UNUSED: ClassVar[Mapping[str, Any]] = {"transformer_2": None}
    max_sequence_length = 512  # of the pipeline's call; its encode_prompt alone would take 226

    def _embed(self, prompts):
        embeds, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self._device,
        )
        return {"encoder_hidden_states": embeds}

    def _limits(self):
        yield self.pipeline.tokenizer, self.max_sequence_length

    def latent_shape(self, height, width, frames=None):
        factor = self.pipeline.vae_scale_factor_temporal
        if frames is None or frames % factor != 1:
            raise UserError(
                f"{frames or 'no'} frames were asked for, but this model makes videos of a multiple of {factor} "
                "frames and one"
            )
        _, patch, _ = self.pipeline.transformer.config.patch_size
        grid = self._grid(height, width, self.pipeline.vae_scale_factor_spatial, patch)
        return self.vae.config.z_dim, (frames - 1) // factor + 1, *grid


CODECS: dict[str, type[Codec]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "WanPipeline": Wan,
}


def _family(name: str) -> type[Codec]:
    if name not in CODECS:
        raise UserError(f"fewstep has no codec for the pipeline '{name}': it can use {', '.join(CODECS)}")
    return CODECS[name]


def codec_of(pipeline: Any) -> Codec:
    """The codec of a diffusers pipeline that is already built; freezes its encoders and its VAE.

    Raises UserError for another family or a component that is not there.
    """
    return _family(type(pipeline).__name__)(pipeline)


def open_codec(
    source: str, revision: str | None = None, dtype: torch.dtype = torch.float32, weights: bool = True
) -> Codec:
    """The codec of the pipeline in a folder or of a hub id; its denoiser is only shaped and costs no memory.

    `dtype` is that of the text encoders: some of the VAEs overflow in half precision, so they are float32. Without
    `weights` all of its networks are only shaped, on the meta device.
    Raises UserError where nothing is found, for another family and for a component that is not there.
    """
    found = loading.find(source, revision)
    name = str(found.index.get("_class_name"))
    family = _family(name)
    named = [part for part in found.index if found.class_of(part)]
    family.refuse_absent(f"the pipeline at {source}", _lying(found.source, named), named)
    shaped = loading.denoiser(found, weights=False)
    lacking = {part: None for part in family.MAY_LACK if part not in named}
    shapes = {} if weights else {part: _shape(found, part, dtype) for part in named if part.startswith(_NETWORKS)}
    pipeline = loading.pretrained(
        getattr(diffusers, name),
        found.source,
        dtype={"default": dtype, "vae": torch.float32},
        use_safetensors=True,
        **{found.part: shaped.net, "scheduler": shaped.scheduler, **shapes, **lacking, **family.UNUSED, **found.where},
    )
    return family(pipeline)


_NETWORKS = ("vae", "text_encoder")
_MOST_TOKENS = 512  # the families' pipelines refuse more


def _shape(pipeline: loading.Pipeline, part: str, dtype: torch.dtype) -> nn.Module:
    shape = loading.shape_of(pipeline, part)
    return shape if part == "vae" else shape.to(dtype)


def _lying(source: str, named: list[str]) -> list[str]:
    """The components that are there; the hub's are known only once they are asked for."""
    folder = Path(source)
    return [part for part in named if (folder / part).is_dir()] if folder.is_dir() else named

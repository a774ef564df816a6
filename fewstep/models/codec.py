"""Between people and latents: prompts -> Condition and pixels <-> latents, as the pipeline of each family does it."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.core.errors import UserError
from fewstep.models import schedulers

_MOST_TOKENS = 512  # the families' pipelines refuse more


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
    PROMPTED: ClassVar[bool] = True
    """whether there are prompts to encode; otherwise its network reads labels"""
    VIDEOS: ClassVar[bool] = False
    MULTIPLE: ClassVar[int] = 1
    """of as many pixels are the sides that the pipeline's call takes, whatever its VAE"""
    EVEN_SIGMAS: ClassVar[bool] = False
    """whether the pipeline hands its scheduler the times 1, .., 1 / n itself"""
    STARTS_PACKED: ClassVar[bool] = False
    """whether the pipeline draws its first noise, too, as its call takes latents"""
    embedded_guidance: float | None = None
    """the guidance that a network is told beside the prompt; None for one that is told none"""

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

    def give_guidance(self, scale: float) -> None:
        """Sets `embedded_guidance`, by default that of the pipeline's own call. Raises UserError if it has none."""
        if self.embedded_guidance is None:
            raise UserError(
                f"the network of this {type(self.pipeline).__name__} is told no guidance: remove "
                f"model.embedded_guidance={scale:g}"
            )
        self.embedded_guidance = scale

    def guided_by(self, scale: float) -> dict[str, Any]:
        """The arguments by which the pipeline's own call guides; at a scale of 1 it asks the network once a step.

        What it needs to be told to take prompts and sizes as they are is among them.
        """
        return {"guidance_scale": scale}

    def packed(self, latents: Tensor) -> Tensor:
        """Latents (B, *S) as the pipeline's call takes and gives them."""
        return latents

    def unpacked(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Those again (B, *S), for the `shape` S."""
        return latents

    def scattered(self, noise: Tensor) -> Tensor:
        """Noise (B, *S) in the order in which the pipeline draws it between its steps."""
        return self.unpacked(noise.view(self.packed(noise).shape), tuple(noise.shape[1:]))

    def time_shift(self, scheduler: Any, shape: tuple[int, ...]) -> float:
        """The factor by which `scheduler` shifts even times towards noise for latents of this shape.

        Raises UserError where the pipeline does not say how it follows from the size.
        """
        return schedulers.time_shift(scheduler)

    def time_shift_in(self, scheduler: Any, shape: tuple[int, ...], steps: int) -> float:
        """The same in so many steps, where the pipeline asks how many there are."""
        return self.time_shift(scheduler, shape)

    def like(self, other: Codec) -> Self:
        """This one, giving as many tokens and the guidance that `other` gives."""
        self.max_sequence_length, self.embedded_guidance = other.max_sequence_length, other.embedded_guidance
        return self

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
        return Condition({**rows, **self._sizes(len(prompts), size), **self._guidance(len(prompts))})

    @torch.no_grad()
    def unconditional(self, negative: str = "", *, truncate: bool = False) -> Condition:
        """One row for `DiffusersBackbone`: what guidance leads away from. Sizes are not in it, they stay."""
        if not truncate:
            self.refuse_long([negative])
        return Condition({name: value.float() for name, value in self._embed_negative([negative]).items()})

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) or videos (B, 3, T, H, W) in [-1, 1] -> latents (B, *S): the mean of the posterior."""
        mean, scale = self._statistics(images)
        return (self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode().float() - mean) * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, *S) -> images or videos, [-1, 1] but for overshoot; differentiable."""
        mean, scale = self._statistics(latents)
        return self.vae.decode((latents / scale + mean).to(self.vae.dtype), return_dict=False)[0].float()

    @property
    def scaled(self) -> bool:
        """Whether the VAE says what brings its latents to a deviation of about 1."""
        return any(self.vae.config.get(name) is not None for name in ("scaling_factor", "latents_std"))

    @property
    def side(self) -> int:
        """The side in pixels of the images that the pipeline makes unasked."""
        net = next(
            self.pipeline.components[name] for name in ("unet", "transformer") if name in self.pipeline.components
        )
        side = net.config.get("sample_size") or self.pipeline.default_sample_size
        return side * self.pipeline.vae_scale_factor

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.vae.config.latent_channels

    @property
    def frames(self) -> int | None:
        """How many the pipeline makes unasked; None for single images."""
        return inspect.signature(self.pipeline.__call__).parameters["num_frames"].default if self.VIDEOS else None

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """The shape *S of one sample's latents. Raises UserError for a size that the pipeline would round."""
        if frames is not None:
            raise UserError(f"{frames} frames were asked for, but this model makes single images: leave frames out")
        return self.channels, *self._grid(height, width, self.pipeline.vae_scale_factor, 1)

    @abstractmethod
    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the prompts alone decide, by the denoiser's argument names."""

    def _embed_negative(self, prompts: list[str]) -> dict[str, Tensor]:
        """The same of prompts that guidance leads away from."""
        return self._embed(prompts)

    def _limits(self) -> Iterator[tuple[Any, int]]:
        """Every tokenizer with the number of tokens it may give."""
        for name in self.encoders:
            tokenizer = getattr(self.pipeline, name.replace("text_encoder", "tokenizer"))
            yield tokenizer, tokenizer.model_max_length

    def _written(self, prompt: str) -> str:
        """What the tokenizer reads of a prompt: chat models are asked it in a template."""
        return prompt

    def _sizes(self, rows: int, size: tuple[int, int] | None) -> dict[str, Tensor]:
        return {}

    def _guidance(self, rows: int) -> dict[str, Tensor]:
        if self.embedded_guidance is None:
            return {}
        return {"guidance": torch.full((rows,), self.embedded_guidance, device=self._device)}

    @property
    def _device(self) -> torch.device:
        return next(self.encoders.parameters()).device

    def refuse_long(self, prompts: list[str]) -> None:
        """Raises UserError for the first prompt with more tokens than one of the encoders reads."""
        for prompt in prompts:
            for tokenizer, limit in self._limits():
                written = self._written(prompt)
                if (count := len(tokenizer(written, truncation=False, verbose=False).input_ids)) > limit:
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

    def _latent_frames(self, frames: int | None, factor: int) -> int:
        """How many latents in time `frames` are, of which the first is one by itself. Raises UserError."""
        if frames is None or frames % factor != 1:
            raise UserError(
                f"{frames or 'no'} frames were asked for, but this model makes videos of a multiple of {factor} "
                "frames and one"
            )
        return (frames - 1) // factor + 1

    def _grid(self, height: int, width: int, factor: int, patch: int) -> tuple[int, int]:
        multiple = math.lcm(factor * patch, self.MULTIPLE)
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise UserError(f"images of {height}x{width} were asked for, but sizes are multiples of {multiple}")
        return height // factor, width // factor

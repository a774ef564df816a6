"""Stable Diffusion 1, 2 and XL: UNets that read CLIPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.core.batch import Condition
from fewstep.models.codec import Codec
from fewstep.models.family import Family


def _call(net: nn.Module, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
    inputs = dict(cond.inputs)
    sized = net.config.addition_embed_type == "text_time"
    added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids")} if sized else None
    return net(x, timestep, added_cond_kwargs=added, return_dict=False, **inputs)[0]


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


ROWS = {
    "UNet2DConditionModel": Family(
        call=_call,
        tap=lambda net: "mid_block",
        time_embedding="time_embedding",
        blocks=("BasicTransformerBlock",),
        processors=("AttnProcessor2_0", "AttnAddedKVProcessor2_0"),
        reads="cross_attention_dim",
    )
}
CODECS = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusionXLPipeline": StableDiffusionXL}

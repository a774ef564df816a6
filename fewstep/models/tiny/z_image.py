"""Z-Image, with a Qwen 3 for a reader."""

from __future__ import annotations

from typing import Any

import diffusers

from fewstep.models.tiny.parts import chat_tokenizer, image_vae, qwen3


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 4],
        axes_lens=[1024, 32, 32],
    )
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(scaling_factor=1.5, shift_factor=0.1),
        text_encoder=qwen3(),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
    )


MAKERS = {"z_image": z_image}
STANDS_FOR = {"Tongyi-MAI/Z-Image": "z_image", "Tongyi-MAI/Z-Image-Turbo": "z_image"}

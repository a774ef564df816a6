"""Put the flow-matching sibling of the text-to-image teacher together, in the classes of Stable Diffusion 3.

python tools/t2i_sd3.py [--parts runs/t2i] [--out runs/t2i_sd3_parts]

Needs tools/train_caption_reader.py, tools/t2i_vae.py and tools/t2i_text.py to have run. The one text encoder stands in
both of the family's CLIP places, with a projection that changes nothing; the third, optional encoder is left out.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from t2i_parts import LATENT_CHANNELS, LATENT_SIDE, SEED, check, write
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fewstep.routes import left_out

HEADS, HEAD_WIDTH, LAYERS = 4, 36, 5


def projecting(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same encoder with the projection that Stable Diffusion 3 reads its pooled output from: the identity."""
    config = encoder.config
    config.projection_dim = config.hidden_size
    projected = CLIPTextModelWithProjection(config)
    weights = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    projected.text_model.load_state_dict(weights)
    projected.text_projection.weight.data = torch.eye(config.hidden_size)
    return projected.eval()


def new_transformer(text_width: int) -> SD3Transformer2DModel:
    """3.9 million weights over 64 patches of the latents."""
    torch.manual_seed(SEED)
    return SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        joint_attention_dim=2 * text_width,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=LATENT_SIDE // 2,
        qk_norm="rms_norm",
    )


def assemble(parts: Path) -> StableDiffusion3Pipeline:
    """The pipeline of the parts in `parts` and a fresh transformer, in float32."""
    encoder = projecting(CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.float32))
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    vae = AutoencoderKL.from_pretrained(parts / "vae")
    vae.register_to_config(shift_factor=0.0)
    return StableDiffusion3Pipeline(
        transformer=new_transformer(encoder.config.hidden_size),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=projecting(CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.float32)),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=Path("runs/t2i"))
    parser.add_argument("--out", type=Path, default=Path("runs/t2i_sd3_parts"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = assemble(options.parts)
    write(pipeline, options.out)
    checked = json.dumps(check(options.out, **left_out(pipeline)), indent=2)
    (options.out / "parts.json").write_text(checked + "\n")
    print(checked)


if __name__ == "__main__":
    main()

"""Put the text-to-image teacher together from its trained parts and a UNet that has learnt nothing yet.

python tools/t2i_parts.py [--parts runs/t2i] [--out runs/t2i_parts]

Needs tools/train_caption_reader.py, tools/t2i_vae.py and tools/t2i_text.py to have run. Writes an ordinary
StableDiffusionPipeline folder in half precision, opens it offline, draws with it and measures whether pictures that
went through the autoencoder still show their captions.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from t2i_vae import HELD_OUT_SEED, RESOLUTION, decode, encode
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep.data.captioned import CaptionedScenes, rows_of
from fewstep.evals.captions import caption_accuracy
from fewstep.evals.reader import load_reader
from fewstep.routes import save_plainly

LATENT_SIDE, LATENT_CHANNELS = 16, 4
SEED = 19
COUNT = 1000
LIMIT = 8_000_000
READER = Path("assets/caption_reader")


def new_unet(text_width: int) -> UNet2DConditionModel:
    """3.5 million weights that look at the text at 8x8 and 4x4: looking at 16x16 as well takes twice the time."""
    torch.manual_seed(SEED)
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """The process of Stable Diffusion with a velocity prediction, which at pure noise divides by nothing small."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # without effect on trailing timesteps, but the pipeline warns of any other value
    )


def assemble(parts: Path) -> StableDiffusionPipeline:
    """The pipeline of the parts in `parts` and a fresh UNet, in float32."""
    text_encoder = CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.float32)
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        unet=new_unet(text_encoder.config.hidden_size),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Half precision on disk; float32 is what an unasked `from_pretrained` gives back."""
    save_plainly(pipeline.to(dtype=torch.float16), folder)


def check(folder: Path, **lacking: None) -> dict[str, object]:
    """Opens what was written, draws with it, and measures sizes and the autoencoder. Raises ValueError if it fails."""
    sizes = {file.parent.name: file.stat().st_size for file in folder.glob("*/*.safetensors")}
    if too_large := [name for name, size in sizes.items() if size > LIMIT]:
        raise ValueError(f"{', '.join(too_large)} would be larger than {LIMIT} bytes")
    pipeline = DiffusionPipeline.from_pretrained(folder, **lacking)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    drawn = pipeline(["a red ring", "anything at all"], num_inference_steps=4, generator=generator, output_type="pt")
    if drawn.images.shape != (2, 3, RESOLUTION, RESOLUTION) or not drawn.images.isfinite().all():
        raise ValueError(f"the pipeline drew {tuple(drawn.images.shape)}, or values that are not finite")
    kinds = {name: str(part.dtype) for name, part in pipeline.components.items() if hasattr(part, "dtype")}
    return {"bytes": sizes, "opened as": kinds, **through_the_vae(pipeline.vae)}


@torch.no_grad()
def through_the_vae(vae: AutoencoderKL) -> dict[str, object]:
    """Caption accuracy of held-out scenes and of what is left of them after encoding and decoding."""
    reader, scenes = load_reader(READER), CaptionedScenes(RESOLUTION, HELD_OUT_SEED)
    ids = torch.arange(COUNT)
    images, said = scenes.images(ids), rows_of(scenes.captions(ids))
    rebuilt = decode(vae, encode(vae, images))
    shown = {"original": images, "rebuilt": rebuilt}
    found = {name: caption_accuracy(reader, pictures, said) for name, pictures in shown.items()}
    return {name: {"all": accuracy.all, "one": accuracy.one, "two": accuracy.two} for name, accuracy in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=Path("runs/t2i"))
    parser.add_argument("--out", type=Path, default=Path("runs/t2i_parts"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    write(assemble(options.parts), options.out)
    checked = json.dumps(check(options.out), indent=2)
    (options.out / "parts.json").write_text(checked + "\n")
    print(checked)


if __name__ == "__main__":
    main()

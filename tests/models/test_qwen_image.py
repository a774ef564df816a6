"""What Qwen-Image alone has: its scheduler's last time, its guidance, and a VAE of videos for single images."""

from __future__ import annotations

import pytest
import torch

from fewstep.core.errors import UserError
from fewstep.models import tiny
from fewstep.models.codecs import codec_of
from fewstep.models.packing import packed
from tests.families import FRAMES, SIDE, backbone_of, our_walk, their_walk


def test_it_walks_with_the_scheduler_that_it_ships() -> None:
    pipeline = tiny.make("qwen_image", shift_terminal=0.02)
    theirs, mine = their_walk(pipeline, 3, None), our_walk(pipeline, 3, None)
    assert pipeline.scheduler.sigmas[-2] == pytest.approx(0.02)
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_guidance_turns_every_token_and_leaves_it_as_long() -> None:
    guide = backbone_of(tiny.make("qwen_image")).guide
    unconditional, conditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()[:2]
    guided = guide(unconditional, conditional, torch.tensor([1.0, 4.0, 9.0]).view(3, 1, 1, 1))
    lengths = [packed(x).norm(dim=-1) for x in (guided, conditional)]
    assert torch.allclose(*lengths) and torch.allclose(guided[0], conditional[0], atol=1e-6)
    assert (guided[1:] - conditional[1:]).flatten(1).norm(dim=1).min() > 1


def test_it_makes_single_images_of_whole_tokens() -> None:
    codec = codec_of(tiny.make("qwen_image"))
    with pytest.raises(UserError, match="9 frames were asked for, but this model makes single images"):
        codec.latent_shape(SIDE, SIDE, FRAMES)
    with pytest.raises(UserError, match="images of 18x16 were asked for, but sizes are multiples of 4"):
        codec.latent_shape(18, SIDE)
    assert codec.decode(codec.encode(torch.zeros(1, 3, SIDE, SIDE))).shape == (1, 3, SIDE, SIDE)

"""The families that fewstep can use: a file each, with the rows of its networks and the codecs of its pipelines."""

from __future__ import annotations

from torch import nn

from fewstep.models.codec import Codec
from fewstep.models.experts import model_of
from fewstep.models.families import (
    aura_flow,
    chroma,
    cogvideox,
    dit,
    flux,
    flux2,
    hunyuan_video,
    ltx,
    lumina2,
    ovis_image,
    pixart,
    qwen_image,
    sana,
    stable_diffusion,
    stable_diffusion_3,
    unet2d,
    wan,
    z_image,
)
from fewstep.models.family import Family

LABELLED = (unet2d, dit)
PROMPTED = (
    stable_diffusion,
    stable_diffusion_3,
    pixart,
    sana,
    aura_flow,
    lumina2,
    flux,
    chroma,
    flux2,
    qwen_image,
    z_image,
    wan,
    cogvideox,
    ltx,
    hunyuan_video,
    ovis_image,
)

FAMILIES: dict[str, Family] = {name: row for family in (*LABELLED, *PROMPTED) for name, row in family.ROWS.items()}
"""Class of the network -> its row."""


def family_of(net: nn.Module) -> Family | None:
    """The row of a network, which may be sharded or of several experts; None where there is none."""
    # A sharded network is of a class made from its own.
    names = [kind.__name__ for kind in type(model_of(net)).__mro__]
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


CODECS: dict[str, type[Codec]] = {name: codec for family in (*PROMPTED, dit) for name, codec in family.CODECS.items()}
"""Class of the pipeline -> its codec."""

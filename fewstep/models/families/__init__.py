"""The families that fewstep can use: a file each, with the rows of its networks and the codecs of its pipelines."""

from __future__ import annotations

from fewstep.models.codec import Codec
from fewstep.models.families import dit, stable_diffusion, stable_diffusion_3, unet2d, wan
from fewstep.models.family import Family

LABELLED = (unet2d, dit)
PROMPTED = (stable_diffusion, stable_diffusion_3, wan)

FAMILIES: dict[str, Family] = {name: row for family in (*LABELLED, *PROMPTED) for name, row in family.ROWS.items()}
"""Class of the network -> its row."""

CODECS: dict[str, type[Codec]] = {name: codec for family in PROMPTED for name, codec in family.CODECS.items()}
"""Class of the pipeline -> its codec."""

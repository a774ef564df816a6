"""CogVideoX."""

from __future__ import annotations

from fewstep.models.codec import Codec
from fewstep.models.family import Family

ROWS: dict[str, Family] = {}
CODECS: dict[str, type[Codec]] = {}

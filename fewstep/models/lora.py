"""The size of a LoRA adapter (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fewstep.core.errors import UserError

Factors = dict[str, tuple[Tensor, Tensor]]
"""What a LoRA adds to a network: layer -> A (r, in, ..) and B (out, r, ..), its scale inside. The weight gains B A."""


@dataclass
class LoraSpec:
    """A voice of a shared network: W x + (alpha / rank) B A x in every target, with B = 0 at the start."""

    rank: int = 16
    """columns of A^T and of B"""
    alpha: float = 16.0
    """the adapter is scaled by alpha / rank"""
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """linear or convolution layers, by the end of their name; * stands for anything"""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"the rank of a voice is at least 1, but {self.rank} was given")
        if not self.alpha > 0:
            raise UserError(f"the alpha of a voice is above 0, but {self.alpha} was given")
        if not self.targets:
            raise UserError("a voice needs targets: name layers such as to_q, or * for all")

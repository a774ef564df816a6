"""What one micro-batch holds.

Shape letters used everywhere: B batch; *S latent shape (C H W, or C T H W for video); L tokens; D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.draw import Draw


@dataclass(frozen=True)
class Condition:
    """Network inputs beside x_t and t: `inputs` by the network's own argument names, `dials` scalars by name.

    Every tensor has B rows. A dial is a per-sample scalar (B,): guidance, step count, sign.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    dials: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: Tensor) -> Condition:
        return Condition({k: v[rows] for k, v in self.inputs.items()}, {k: v[rows] for k, v in self.dials.items()})

    def with_inputs(self, **inputs: Tensor) -> Condition:
        return Condition({**self.inputs, **inputs}, self.dials)

    @staticmethod
    def cat(first: Condition, second: Condition) -> Condition:
        """The rows of `first`, then those of `second`; both have the same names."""
        inputs = {k: torch.cat([v, second.inputs[k]]) for k, v in first.inputs.items()}
        return Condition(inputs, {k: torch.cat([v, second.dials[k]]) for k, v in first.dials.items()})

    def to(self, device: torch.device | str) -> Condition:
        return Condition(
            {k: v.to(device) for k, v in self.inputs.items()},
            {k: v.to(device) for k, v in self.dials.items()},
        )


@dataclass(frozen=True)
class Batch:
    """`x0` (B, *S) real data or None, `noise` (B, *S) unit normal, `cond`, and `draw` for every further randomness.

    `draw.ids` (B,) are global sample indices. `pair` holds a teacher's (noise, x0, cond) records where an
    objective asked for them.
    """

    noise: Tensor
    cond: Condition
    draw: Draw
    x0: Tensor | None = None
    pair: Pair | None = None

    def __len__(self) -> int:
        return len(self.noise)


@dataclass(frozen=True)
class Pair:
    """A teacher's deterministic pairs: `noise` (B, *S) unit normal, its sample `x0` (B, *S), the shared `cond`.

    `path` (B, K - 1, *S), where an objective asked for it: the teacher's states at the student's K steps but the first.
    """

    noise: Tensor
    x0: Tensor
    cond: Condition
    path: Tensor | None = None

    def to(self, device: torch.device | str) -> Pair:
        path = None if self.path is None else self.path.to(device)
        return Pair(self.noise.to(device), self.x0.to(device), self.cond.to(device), path)

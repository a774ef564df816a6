"""What a network is told about the samples of a run: their labels, or their captions as its text encoders read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.data.source import Source
from fewstep.models.codec import Codec


class Conditions(Protocol):
    """`of` training samples by their ids (B,); `asked` for where images 0, 1, .. are made to be seen or measured."""

    def of(self, ids: Tensor) -> Condition: ...

    def asked(self, rows: Tensor) -> Condition: ...

    def names(self, rows: Tensor) -> list[str]:
        """What `asked` means, in words."""
        ...


class Labels:
    """Class labels; labels 0, 1, .. take turns when they are asked for. Nothing for a network that takes no label."""

    def __init__(self, source: Source, heard: bool):
        self.source, self.heard = source, heard

    def of(self, ids: Tensor) -> Condition:
        return self._told(self.source.label_of(ids.cpu()).to(ids.device))

    def asked(self, rows: Tensor) -> Condition:
        return self._told(rows % max(1, len(self.source.labels)))

    def names(self, rows: Tensor) -> list[str]:
        count = len(self.source.labels)
        return [self.source.labels[row % count] if count else "" for row in rows.tolist()]

    def _told(self, labels: Tensor) -> Condition:
        return Condition({"class_labels": labels}) if self.heard else Condition()


class Prompts:
    """Captions, encoded once and kept up to `LIMIT` bytes; those that are asked for the training has not seen."""

    LIMIT = 2**30

    def __init__(self, codec: Codec, source: Source, size: tuple[int, int]):
        self.codec, self.source, self.size = codec, source, size
        self.unseen = source.held_out()
        self._known: dict[str, dict[str, Tensor]] = {}

    def of(self, ids: Tensor) -> Condition:
        return self.encode(self.source.captions(ids.cpu())).to(ids.device)

    def asked(self, rows: Tensor) -> Condition:
        return self.encode(self.names(rows)).to(rows.device)

    def names(self, rows: Tensor) -> list[str]:
        return self.unseen.captions(rows.cpu())

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Raises UserError for a prompt that is too long."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]:
            made = self.codec.encode_prompts(new, size=self.size).to("cpu").inputs
            self._known |= {
                prompt: {name: value[i].clone() for name, value in made.items()} for i, prompt in enumerate(new)
            }
        rows = [self._known[prompt] for prompt in prompts]
        told = Condition({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        self._forget(sum(value.nbytes for value in rows[0].values()))
        return told

    def _forget(self, bytes_each: int) -> None:
        """Drops what was encoded first."""
        beyond = len(self._known) - self.LIMIT // bytes_each
        for prompt in list(self._known)[: max(0, beyond)]:
            del self._known[prompt]

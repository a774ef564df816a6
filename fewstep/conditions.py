"""What a network is told about the samples of a run: their labels, or their captions as its text encoders read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.batch import Condition
from fewstep.data.source import Source
from fewstep.models.codec import Codec
from fewstep.store import Sharded

BATCH = 64
SHARD = 8 * BATCH


class Conditions(Protocol):
    """`of` training samples by their ids (B,); `asked` for where images 0, 1, .. are made to be seen or measured.

    `afresh` is `of` by these samples alone, whatever has been encoded before, to the last bit.
    """

    def of(self, ids: Tensor) -> Condition: ...

    def afresh(self, ids: Tensor) -> Condition: ...

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

    def afresh(self, ids: Tensor) -> Condition:
        return self.of(ids)

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
        self._rows: dict[str, int] = {}
        self._stored: Mapping[str, Sharded] = {}

    def of(self, ids: Tensor) -> Condition:
        return self.encode(self.source.captions(ids.cpu())).to(ids.device)

    def afresh(self, ids: Tensor) -> Condition:
        prompts = self.source.captions(ids.cpu())
        different = list(dict.fromkeys(prompts))
        rows = torch.tensor([different.index(prompt) for prompt in prompts])
        return Condition(self.encoded(different))[rows].to(ids.device)

    def asked(self, rows: Tensor) -> Condition:
        return self.encode(self.names(rows)).to(rows.device)

    def names(self, rows: Tensor) -> list[str]:
        return self.unseen.captions(rows.cpu())

    def encoded(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoders make of the prompts, a row each, on the CPU. Raises UserError for one too long."""
        return self.codec.encode_prompts(list(prompts), size=self.size).to("cpu").inputs

    def keep(self, prompts: Sequence[str], stored: Mapping[str, Sharded]) -> None:
        """From now on reads the rows that `encoded` has made of `prompts` instead of encoding them."""
        self._rows, self._stored = {prompt: row for row, prompt in enumerate(prompts)}, stored

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Raises UserError for a prompt that is too long."""
        if all(prompt in self._rows for prompt in prompts):
            rows = torch.tensor([self._rows[prompt] for prompt in prompts])
            return Condition({name: value[rows] for name, value in self._stored.items()})
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]:
            made = self.encoded(new)
            self._known |= {
                prompt: {name: value[i].clone() for name, value in made.items()} for i, prompt in enumerate(new)
            }
        known = [self._known[prompt] for prompt in prompts]
        told = Condition({name: torch.stack([row[name] for row in known]) for name in known[0]})
        self._forget(sum(value.nbytes for value in known[0].values()))
        return told

    def _forget(self, bytes_each: int) -> None:
        """Drops what was encoded first."""
        beyond = len(self._known) - self.LIMIT // bytes_each
        for prompt in list(self._known)[: max(0, beyond)]:
            del self._known[prompt]


def make(prompts: Prompts, texts: Sequence[str], progress: Callable[[int], object]) -> dict[str, Tensor]:
    """What the text encoders make of `texts`, a row each, as `Prompts.keep` reads it."""
    parts = []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        parts.append(prompts.encoded(some))
        progress(len(some))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

"""What is made before the first step: where it lies, whether it is what was asked for, and how it is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from fewstep.config import differences
from fewstep.core.errors import UserError
from fewstep.store import Store
from fewstep.train import interrupts, processes

Tensors = dict[str, Tensor]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Made:
    """`count` rows in the folder `name`, `rows` of them a shard, by a `recipe`; see `fewstep.store`."""

    name: str
    recipe: str
    count: int
    rows: int
    unit: str
    make: Callable[[Tensor, Progress], Tensors]
    take: Callable[[Store], None]
    """gives a run what has been made"""

    def store(self, place: Path) -> Store:
        return Store(place / self.name, self.recipe, self.count, self.rows)

    def fill(self, store: Store) -> None:
        """Makes what is missing of it, as a bar shows."""
        quiet = not processes.leads()
        with tqdm(total=self.count, unit=self.unit, desc=self.name, dynamic_ncols=True, disable=quiet) as bar:

            def progress(count: int) -> None:
                interrupts.poll()
                bar.update(count)

            store.fill(self.make, progress)

    def found_or_filled(self, places: Sequence[Path | None]) -> Store:
        """The finished store in one of the folders `places`, mended where it must be; else it is made in the first."""
        stores = [self.store(place) for place in places if place is not None]
        found = processes.from_leader(lambda: [i for i, store in enumerate(stores) if store.finished()])
        store = stores[found[0] if found else 0]
        self.fill(store)  # what is finished is compared with its checksums
        return store

    def found(self, folder: Path) -> Store:
        """The finished store in a folder of `fewstep prepare`. Raises UserError where it is not there."""
        stores = [self.store(place) for place in (folder, *sorted(folder.glob("stage_*")))]
        for store in stores:
            if store.finished():
                return store
        for store in stores:
            if store.ours():
                raise UserError(
                    f"{store.folder} is not finished: fewstep prepare with --out {folder} goes on where it was"
                )
        for store in stores:
            refuse_other(store)
        raise UserError(f"data.prepared={folder} has no {self.name}: make it by fewstep prepare with --out {folder}")


def refuse_other(store: Store) -> None:
    """Raises UserError where the folder of a store holds something that was made by other settings."""
    if (index := store.index()) is not None and not store.ours():
        wanted = {"recipe": json.loads(store.recipe), "count": store.count}
        before = {name: index[name] for name in wanted}
        changed = differences(*(json.dumps(settings) for settings in (before, wanted)))
        said = "; ".join(changed.values()).replace("recipe.", "")
        raise UserError(f"{store.folder} was made by other settings ({said}): use another folder, or delete it")

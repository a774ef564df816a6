"""`fewstep prepare`: what the training of a config reads, made once for all its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fewstep import build, config
from fewstep.made import refuse_other
from fewstep.runner import tell_skipped


def prepare(file: Path, overrides: Sequence[str], out: Path | None) -> None:
    """Fills the folder `out`, by default `data.prepared` or prepared/<name>, with latents, encoded prompts and pairs.

    Stopped in any way, the same command goes on behind the last finished shard. What is finished is compared with the
    checksums it was written with and made again where it differs. Raises UserError for a folder of other settings.
    """
    stages = config.load(file, overrides)
    folder = out or Path(stages[0].data.prepared or f"prepared/{stages[0].name}")
    earlier: list[Path] = []
    for i, stage in enumerate(stages, 1):
        run = build.build(replace(stage, start={}))
        place = folder if len(stages) == 1 else folder / f"stage_{i}"
        made = build.to_make(run, texts=True)
        new = [one for one in made if not any(one.store(before).finished() for before in earlier)]
        for one in new:
            store = one.store(place)
            refuse_other(store)
            one.fill(store)
        if new:
            tell_skipped(getattr(run.source, "skipped", {}), place)
            earlier.append(place)
    if earlier:
        print(f"made in {folder}: train with data.prepared={folder}")
    else:
        print(f"the training of {stages[0].name} reads nothing that can be made before")

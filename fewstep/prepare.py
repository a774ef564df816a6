"""`fewstep prepare`: what the training of a config reads, made once for all its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fewstep import build, config
from fewstep.config import Config
from fewstep.made import refuse_other
from fewstep.runner import tell_skipped
from fewstep.train import lock


def prepare(file: Path, overrides: Sequence[str], out: Path | None) -> None:
    """Fills the folder `out`, by default `data.prepared` or prepared/<name>, with latents, encoded prompts and pairs.

    Stopped in any way, the same command goes on behind the last finished shard. What is finished is compared with the
    checksums it was written with and made again where it differs. Raises UserError for a folder of other settings.
    """
    stages = config.load(file, overrides)
    folder = out or Path(stages[0].data.prepared or f"prepared/{stages[0].name}")
    with lock.held(folder):
        made = _fill(stages, folder)
    if made:
        print(f"made in {folder}: train with data.prepared={folder}")
    else:
        print(f"the training of {stages[0].name} reads nothing that can be made before")


def _fill(stages: Sequence[Config], folder: Path) -> list[Path]:
    """Makes what the stages read; the folders in which something lies for them."""
    earlier: list[Path] = []
    for i, stage in enumerate(stages, 1):
        run = build.build(_alone(stage))
        place = folder if len(stages) == 1 else folder / f"stage_{i}"
        made = [one for one in build.to_make(run, texts=True) if one.unit != "pair" or stage.pairs.of == "teacher"]
        if stage.pairs.of == "previous":
            print(f"stage {i}: its pairs are made by the student before it, when that has been trained")
        new = [one for one in made if not any(one.store(before).finished() for before in earlier)]
        if new and len(stages) > 1:
            place.mkdir(exist_ok=True)
        for one in new:
            store = one.store(place)
            refuse_other(store)
            one.fill(store)
        if new:
            tell_skipped(getattr(run.source, "skipped", {}), place)
            earlier.append(place)
    return earlier


def _alone(stage: Config) -> Config:
    """The stage without the weights that one before it leaves: it reads the same."""
    objective, previous = stage.objective, "previous."
    if str(getattr(objective, "target_teacher", None)).startswith(previous):
        objective = replace(objective, target_teacher=stage.model.teacher)  # type: ignore[type-var]
    return replace(stage, start={}, objective=objective)

"""`--tiny`: a config for a published teacher, small enough to be tried in seconds, offline and on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from fewstep import config
from fewstep.config import Config
from fewstep.core.errors import UserError
from fewstep.models import tiny
from fewstep.models.families import CODECS
from fewstep.models.loading import locate
from fewstep.train import processes
from fewstep.train.rundir import RunDir

# Captioned scenes stand for images and prompts that are not at hand; what the networks learn from stays the same.
_SMALL = (
    "steps=2",
    "batch=2",
    "micro_batches=1",
    "model.revision=null",
    "data.source=captioned",
    "data.cache=0",
    "data.prepared=null",
    "pairs.count=4",
    "pairs.steps=2",
    "evals.samples=0",
    "evals.every=2",
    "evals.measure_every=0",
    "save.every=1",
)
_LABELLED = ["data.source=scenes"]
_FRAMES = "data.frames=9"


def load(file: str | Path, overrides: Sequence[str] = ()) -> list[Config]:
    """The stages of a config file, each of two small steps; what `overrides` name keeps its value.

    The teacher is still the hub id, see `furnish`. Raises UserError as `config.load` does, and for a config without
    a hub id that a tiny pipeline stands for.
    """
    full = config.load(file, overrides)
    for stage in full:
        _family(stage)
    frames = [_FRAMES] if full[0].data.frames is not None else []
    frames += _LABELLED if _family(full[0]) in tiny.LABELLED else []
    side = f"data.resolution={_side(_family(full[0]))}"
    # The blocks that a recipe names are those of a deep network.
    taps = ["objective.gan_taps=[]"] if all(getattr(stage.objective, "gan_taps", []) for stage in full) else []
    return config.load(file, [f"name={full[0].name}_tiny", *_SMALL, side, *taps, *frames, *overrides])


def furnish(configs: Sequence[Config], root: Path) -> None:
    """Puts a tiny random pipeline in the place of each config's teacher. It lies in the run folder `root` and is made
    once, so that the run can be resumed, sampled and exported. Raises OSError for a folder that cannot be written.
    """
    RunDir(root).create()
    with processes.leader_first():
        for stage in configs:
            stage.model.teacher = str(_made(_family(stage), root.absolute()))


def _family(stage: Config) -> str:
    teacher = stage.model.teacher
    if teacher is None:
        raise UserError("--tiny stands in for a published teacher, but this config has no model.teacher: leave it out")
    if locate(teacher).exists():
        raise UserError(
            f"--tiny stands in for a hub id, but model.teacher={teacher} is a folder that is here: leave it out, and "
            "make the run short with steps=2 batch=2"
        )
    return tiny.family_of(teacher)


def _side(family: str) -> int:
    """In pixels: 16, or the least that its pipeline takes."""
    return max(16, CODECS[type(tiny.make(family)).__name__].MULTIPLE)


def _made(family: str, root: Path) -> Path:
    folder, aside = root / f"tiny-{family}", root / f".tiny-{family}.partial"
    if not folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        tiny.make(family).save_pretrained(aside)
        aside.rename(folder)
    return folder

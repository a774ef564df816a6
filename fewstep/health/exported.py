"""Whether an exported pipeline folder walks the times at which its student was trained."""

from __future__ import annotations

from pathlib import Path

from fewstep import reading
from fewstep.card import CARD, read_card
from fewstep.core.errors import UserError
from fewstep.core.times import Step
from fewstep.models import schedulers
from fewstep.models.families import CODECS
from fewstep.models.loading import pretrained, scheduler_class

# A timestep of 1000 is rounded by at most half a thousandth.
_TOLERANCE = 2e-3


def differences(folder: Path, times: list[list[float]]) -> list[str]:
    """What is wrong with the export in `folder` of a student walked at `times`, pairs of told time and level."""
    count = read_card(folder / CARD).get("num_inference_steps", len(times))
    if count != len(times):
        return [f"the model card of {folder} asks for {count} steps"]
    try:
        walked = _walk(folder, count)
    except Exception as error:  # whatever a foreign config leads a scheduler to
        return [f"the scheduler of {folder} cannot be walked: {error}"]
    pairs = zip(walked, times, strict=True)
    apart = [max(abs(step.told - told), abs(step.level - level)) for step, (told, level) in pairs]
    if max(apart) < _TOLERANCE:
        return []
    return [f"the scheduler of {folder} walks t = {', '.join(f'{step.level:.3f}' for step in walked[:8])}"]


def _walk(folder: Path, count: int) -> list[Step]:
    said = reading.described(folder / "scheduler" / "scheduler_config.json")
    kind = scheduler_class(said.get("_class_name"))
    if kind is None:
        raise UserError(f"diffusers has no scheduler {said.get('_class_name')}")
    scheduler = pretrained(kind, str(folder), subfolder="scheduler")
    schedulers.read(scheduler)
    pipeline = reading.described(folder / "model_index.json").get("_class_name")
    return schedulers.steps_of(scheduler, count, even=pipeline in CODECS and CODECS[pipeline].EVEN_SIGMAS)

"""Loading a denoiser with the schedule it was trained on, from a pipeline folder, a model folder or the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from fewstep.core.errors import UserError
from fewstep.models.diffusers import FAMILIES

DENOISERS = ("unet", "transformer")
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Loaded:
    """A float32 denoiser and, where it came with one, its diffusers scheduler."""

    net: nn.Module
    scheduler: Any | None


def locate(source: str) -> Path:
    """`source` as a path from here, or else from the root of the repository, where the built-in assets lie."""
    return Path(source) if Path(source).exists() or not (_ROOT / source).exists() else _ROOT / source


def _class(name: str) -> Any:
    if name not in FAMILIES:
        raise UserError(f"fewstep has no row for the class '{name}': it can use {', '.join(sorted(FAMILIES))}")
    return getattr(diffusers, name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): the model folder is not whole") from None


def _pretrained(kind: Any, folder: str, **where: Any) -> Any:
    try:
        return kind.from_pretrained(folder, **where)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{kind.__name__} cannot be loaded from {folder}: {reason}") from None


def load(source: str, revision: str | None = None) -> Loaded:
    """Loads `source`: a pipeline folder, a bare model folder, or a hub id such as owner/name.

    Raises UserError where nothing is found or the class has no row in the table of families.
    """
    folder = locate(source)
    if (folder / "model_index.json").is_file():
        index = _read_json(folder / "model_index.json")
        return _from_pipeline(str(folder), index, {})
    if (folder / "config.json").is_file():
        return Loaded(_model(str(folder), _read_json(folder / "config.json"), {}), None)
    if folder.exists():
        raise UserError(f"{folder} is no diffusers folder: it has neither model_index.json nor config.json")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"there is no teacher at {source}: give a diffusers folder or a hub id such as owner/name")
    where = {"revision": revision} if revision else {}
    try:
        index = diffusers.DiffusionPipeline.load_config(source, **where)
    except OSError:
        raise UserError(
            f"there is no folder {source}, and the hub has no pipeline of that name within reach: "
            "check the spelling, or download it and give the folder"
        ) from None
    return _from_pipeline(source, index, where)


def _model(folder: str, config: dict[str, Any], where: dict[str, Any]) -> nn.Module:
    kind = _class(config.get("_class_name", "?"))
    return _pretrained(kind, folder, torch_dtype=torch.float32, **where)


def _from_pipeline(source: str, index: dict[str, Any], where: dict[str, Any]) -> Loaded:
    part = next((name for name in DENOISERS if index.get(name, [None])[0]), None)
    if part is None:
        raise UserError(f"the pipeline at {source} has no denoiser: none of {', '.join(DENOISERS)} is there")
    kind = _class(index[part][1])
    net = _pretrained(kind, source, subfolder=part, torch_dtype=torch.float32, **where)
    scheduler_class = getattr(diffusers, index.get("scheduler", [None, "?"])[1] or "?", None)
    if scheduler_class is None:
        raise UserError(f"the pipeline at {source} has no scheduler that diffusers knows")
    return Loaded(net, _pretrained(scheduler_class, source, subfolder="scheduler", **where))


def new(network: dict[str, Any]) -> nn.Module:
    """A network from its `class` and arguments. Raises UserError for another class or wrong arguments."""
    arguments = dict(network)
    name = arguments.pop("class", None)
    if name is None:
        raise UserError(f"model.network needs a class: one of {', '.join(sorted(FAMILIES))}")
    try:
        return _class(name)(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.network cannot be built: {str(error).splitlines()[0]}") from None

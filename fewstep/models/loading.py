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
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): the model folder is not whole") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read (it holds no keys and values): the model folder is not whole")
    return value


def _pretrained(kind: Any, folder: str, weights: bool = True, **where: Any) -> Any:
    try:
        if not weights:
            config = kind.load_config(folder, **where)
            with torch.device("meta"):
                return kind.from_config(config)
        return kind.from_pretrained(folder, **where)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{kind.__name__} cannot be loaded from {folder}: {reason}") from None


def _network(kind: Any, folder: str, weights: bool, **where: Any) -> nn.Module:
    """A float32 network with exactly the tensors of its safetensors file; pickles are never opened."""
    if not weights:
        return _pretrained(kind, folder, weights=False, **where)
    where = {**where, "torch_dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    net, found = _pretrained(kind, folder, **where)
    if wrong := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
        raise UserError(
            f"the weights at {folder} are not those of its {kind.__name__}: "
            f"{len(wrong)} tensors are missing or left over, such as {wrong[0]}"
        )
    return net


def load(source: str, revision: str | None = None, weights: bool = True) -> Loaded:
    """Loads `source`: a pipeline folder, a bare model folder, or a hub id such as owner/name.

    Without `weights` the network is only shaped, on the meta device.
    Raises UserError where nothing is found or the class has no row in the table of families.
    """
    folder = locate(source)
    if (folder / "model_index.json").is_file():
        index = _read_json(folder / "model_index.json")
        return _from_pipeline(str(folder), index, {}, weights)
    if (folder / "config.json").is_file():
        return Loaded(_model(str(folder), _read_json(folder / "config.json"), weights), None)
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
    return _from_pipeline(source, index, where, weights)


def _model(folder: str, config: dict[str, Any], weights: bool) -> nn.Module:
    kind = _class(config.get("_class_name", "?"))
    return _network(kind, folder, weights)


def _class_of(index: dict[str, Any], part: str) -> str | None:
    """The class that a pipeline's index names for `part`: its nodes are [library, class] or [null, null]."""
    node = index.get(part)
    return node[1] if isinstance(node, list) and len(node) == 2 else None


def _from_pipeline(source: str, index: dict[str, Any], where: dict[str, Any], weights: bool) -> Loaded:
    part = next((name for name in DENOISERS if _class_of(index, name)), None)
    if part is None:
        raise UserError(f"the pipeline at {source} has no denoiser: none of {', '.join(DENOISERS)} is there")
    net = _network(_class(index[part][1]), source, weights, subfolder=part, **where)
    scheduler_class = getattr(diffusers, _class_of(index, "scheduler") or "?", None)
    if scheduler_class is None:
        raise UserError(f"the pipeline at {source} has no scheduler that diffusers knows")
    return Loaded(net, _pretrained(scheduler_class, source, subfolder="scheduler", **where))


def new(network: dict[str, Any], weights: bool = True) -> nn.Module:
    """A network from its `class` and arguments. Raises UserError for another class or wrong arguments."""
    arguments = dict(network)
    name = arguments.pop("class", None)
    if name is None:
        raise UserError(f"model.network needs a class: one of {', '.join(sorted(FAMILIES))}")
    try:
        with torch.device("cpu" if weights else "meta"):
            return _class(name)(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.network cannot be built: {str(error).splitlines()[0]}") from None

"""Loading a denoiser with the schedule it was trained on, from a pipeline folder, a model folder or the hub."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from fewstep import reading
from fewstep.core.errors import UserError
from fewstep.models import hub
from fewstep.models.experts import TimeExperts
from fewstep.models.families import FAMILIES

DENOISERS = ("unet", "transformer")
FORMER = ("Transformer2DModel",)
"""Names under which several classes were published; diffusers itself tells them apart, by their configs."""
_ROOT = Path(__file__).resolve().parents[2]
_LONGEST = 1024


@dataclass(frozen=True)
class Loaded:
    """A float32 denoiser and, where it came with one, its diffusers scheduler."""

    net: nn.Module
    scheduler: Any | None


def locate(source: str) -> Path:
    """`source` as a path from here, or else from the root of the repository, where the built-in assets lie."""
    if len(source) > _LONGEST or "\0" in source:
        raise UserError(f"{reading.shown(source, 80)} is no path of a file or folder: it is too long or holds a NUL")
    return Path(source) if Path(source).exists() or not (_ROOT / source).exists() else _ROOT / source


def named(source: str) -> str:
    """A hub id as it is; of a folder or file only its name, since where it lies says nothing to others."""
    return locate(source).resolve().name if locate(source).exists() else source


def commit_of(source: str | None, revision: str | None = None) -> str | None:
    """The commit of a hub id that is loaded; None for a folder or file, and for nothing."""
    return None if source is None or locate(source).exists() else hub.commit_of(source, revision)


def _class(name: str) -> Any:
    if name not in FAMILIES:
        raise UserError(f"fewstep has no row for the class '{name}': it can use {', '.join(sorted(FAMILIES))}")
    return getattr(diffusers, name)


def _published(name: str) -> Any:
    return getattr(diffusers, name) if name in FORMER else _class(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return reading.described(path)
    except UserError as error:
        raise UserError(f"{error}: the model folder is not whole") from None


def _shaping(buffers: bool) -> AbstractContextManager[Any]:
    """What is built inside has no memory, except for its `buffers` where they are wanted."""
    if not buffers:
        return torch.device("meta")
    from accelerate import init_empty_weights  # a second that only several processes wait

    return init_empty_weights(include_buffers=False)


def pretrained(kind: Any, folder: str, weights: bool = True, buffers: bool = False, **where: Any) -> Any:
    """`kind.from_pretrained`, or the shape alone on the meta device. Raises UserError with diffusers' reason."""
    check(folder, where.get("subfolder"), getattr(kind, "config_name", None), where)
    try:
        if not weights:
            config = kind.load_config(folder, **where)
            with _shaping(buffers):
                return kind.from_config(config)
        return kind.from_pretrained(folder, **where)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{kind.__name__} cannot be loaded from {folder}: {reason}") from None


def check(source: str, part: str | None, name: str | None, where: dict[str, Any]) -> None:
    """Raises UserError for a config whose numbers no network has, before anything is built of it."""
    asked = {key: value for key, value in where.items() if key in ("revision", "local_files_only")}
    try:
        file = _file(Pipeline(source, {}, asked), part, name or "config.json")
    except (OSError, ValueError):
        return  # whoever opens it says what is wrong
    if file is not None:
        _read_json(file)


def _network(kind: Any, folder: str, weights: bool, buffers: bool, **where: Any) -> nn.Module:
    """A float32 network with exactly the tensors of its safetensors file; pickles are never opened."""
    if not weights:
        return pretrained(kind, folder, weights=False, buffers=buffers, **where)
    where = {**where, "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    net, found = pretrained(kind, folder, **where)
    if wrong := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
        raise UserError(
            f"the weights at {folder} are not those of its {kind.__name__}: "
            f"{len(wrong)} tensors are missing or left over, such as {wrong[0]}"
        )
    return net


@dataclass(frozen=True)
class Pipeline:
    """Where a pipeline lies: a folder or a hub id, its model_index.json, and how `from_pretrained` finds it."""

    source: str
    index: dict[str, Any]
    where: dict[str, Any]

    def class_of(self, part: str) -> str | None:
        """The class that the index names for `part`: its nodes are [library, class] or [null, null]."""
        node = self.index.get(part)
        return node[1] if isinstance(node, list) and len(node) == 2 else None

    @property
    def parts(self) -> list[str]:
        """The names of the denoiser's folders: one, or one for each expert in time, noisiest first.

        Raises UserError for a pipeline without any, and for several that no boundary in time tells apart.
        """
        parts = [name for name in self.index if name.startswith(DENOISERS) and self.class_of(name)]
        if not parts:
            raise UserError(f"the pipeline at {self.source} has no denoiser: none of {', '.join(DENOISERS)} is there")
        if len(parts) != len(self.bounds) + 1:
            raise UserError(
                f"the pipeline at {self.source} has {' and '.join(parts)}, but fewstep takes one denoiser, or two with "
                "a boundary_ratio in model_index.json"
            )
        return sorted(parts)

    @property
    def bounds(self) -> tuple[float, ...]:
        """The times at which one expert hands over to the next. Raises UserError for what is none."""
        bound = self.index.get("boundary_ratio")
        if bound is None:
            return ()
        if not isinstance(bound, int | float):
            raise UserError(f"{self.source}: model_index.json has boundary_ratio={bound!r}, which is no time")
        return (float(bound),)


def find(source: str, revision: str | None = None) -> Pipeline:
    """The pipeline in the folder `source` or of the hub id `source`. Raises UserError where there is none."""
    folder = locate(source)
    if (folder / "model_index.json").is_file():
        return _known(Pipeline(str(folder), _read_json(folder / "model_index.json"), {}))
    if folder.exists():
        raise UserError(f"{folder} is no diffusers folder: it has neither model_index.json nor config.json")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"there is no teacher at {source}: give a diffusers folder or a hub id such as owner/name")
    where = hub.pinned(source, revision)
    try:
        return _known(Pipeline(source, diffusers.DiffusionPipeline.load_config(source, **where), where))
    except OSError:
        raise UserError(
            f"there is no folder {source}, and the hub has no pipeline of that name within reach: "
            "check the spelling, or download it and give the folder"
        ) from None


def _known(pipeline: Pipeline) -> Pipeline:
    """The pipeline, if it is one of a library. Raises UserError for one that brings its own code."""
    if not isinstance(pipeline.index.get("_class_name", ""), str):
        raise UserError(
            f"the model_index.json of {pipeline.source} names no pipeline of diffusers but code of its own, and no "
            "code of a pipeline is run: give one of diffusers"
        )
    return pipeline


def pipeline_class(source: str, revision: str | None = None) -> str | None:
    """The class of the pipeline at `source`; None for a bare model folder."""
    return None if _is_model(source) else find(source, revision).index.get("_class_name")


def parts_of(pipeline: Any) -> list[str]:
    """The names of an open pipeline's denoiser: one, or one for each expert."""
    there = (name for name, part in pipeline.components.items() if part is not None)
    return sorted(name for name in there if name.startswith(DENOISERS))


def part_of(pipeline: Any) -> str:
    """The name of an open pipeline's denoiser, or of its first expert."""
    return parts_of(pipeline)[0]


def network_of(pipeline: Any) -> nn.Module:
    """The denoiser of an open pipeline."""
    return _together([getattr(pipeline, part) for part in parts_of(pipeline)], pipeline.config.get("boundary_ratio"))


def _together(nets: list[nn.Module], bound: float | None) -> nn.Module:
    return nets[0] if len(nets) == 1 else TimeExperts(nets, [bound])  # type: ignore[list-item]


def load(source: str, revision: str | None = None, weights: bool = True, buffers: bool = False) -> Loaded:
    """Loads `source`: a pipeline folder, a bare model folder, or a hub id such as owner/name.

    Without `weights` the network is only shaped, on the meta device; with `buffers` those are real all the same.
    Raises UserError where nothing is found or the class has no row in the table of families.
    """
    if _is_model(source):
        folder = locate(source)
        return Loaded(_model(str(folder), _read_json(folder / "config.json"), weights, buffers), None)
    return denoiser(find(source, revision), weights, buffers)


def _is_model(source: str) -> bool:
    folder = locate(source)
    return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def _model(folder: str, config: dict[str, Any], weights: bool, buffers: bool) -> nn.Module:
    kind = _published(config.get("_class_name", "?"))
    return _network(kind, folder, weights, buffers)


def weight_files(source: str, revision: str | None = None) -> dict[str, list[Path]]:
    """What stands before the names of tensors -> the safetensors files with them, of the denoiser that `load` reads."""
    if _is_model(source):
        return {"": _weight_files(Pipeline(str(locate(source)), {}, {}), None)}
    place = find(source, revision)
    if not place.bounds:
        return {"": _weight_files(place, place.parts[0])}
    return {f"experts.{i}.": _weight_files(place, part) for i, part in enumerate(place.parts)}


def _weight_files(place: Pipeline, part: str | None) -> list[Path]:
    index = _file(place, part, SAFE_WEIGHTS_INDEX_NAME)
    names = _shards(index) if index else [SAFETENSORS_WEIGHTS_NAME]
    return [file for name in names if (file := _file(place, part, name)) is not None]


def _shards(index: Path) -> list[str]:
    """The files that an index of weights names. Raises UserError for one that lies anywhere else."""
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(map(reading.is_name, files.values())):
        raise UserError(f"{index} cannot be read (its weight_map names no files beside it): give a whole folder")
    return sorted(set(files.values()))


def _file(pipeline: Pipeline, part: str | None, name: str) -> Path | None:
    """The file of that name in the folder of `part`, from the hub where that is its place."""
    if Path(pipeline.source).is_dir():
        file = Path(pipeline.source) / (part or "") / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(pipeline.source, name, subfolder=part, **pipeline.where))
    except EntryNotFoundError:
        return None


def denoiser(pipeline: Pipeline, weights: bool = True, buffers: bool = False) -> Loaded:
    """The denoiser and the scheduler of a pipeline; see `load`."""
    nets = [
        _network(
            _published(str(pipeline.class_of(part))),
            pipeline.source,
            weights,
            buffers,
            subfolder=part,
            **pipeline.where,
        )
        for part in pipeline.parts
    ]
    kind = scheduler_class(pipeline.class_of("scheduler"))
    if pipeline.class_of("scheduler") == "FewStepScheduler":
        raise UserError(
            f"the pipeline at {pipeline.source} carries the scheduler of its own few steps: sample its run folder, or "
            "open it with diffusers as its README.md says"
        )
    if kind is None:
        raise UserError(f"the pipeline at {pipeline.source} has no scheduler that diffusers knows")
    net = _together(nets, *pipeline.bounds) if pipeline.bounds else nets[0]
    return Loaded(net, pretrained(kind, pipeline.source, subfolder="scheduler", **pipeline.where))


def scheduler_class(name: object) -> Any:
    """The scheduler that diffusers has under that name, None for any other part of it."""
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin) else None


def shape_of(pipeline: Pipeline, part: str) -> nn.Module:
    """The VAE or a text encoder of a pipeline on the meta device. Raises UserError with its library's reason."""
    library, name = pipeline.index[part]
    if library == "diffusers":
        kind = _part_class(pipeline, diffusers, name, nn.Module)
        return pretrained(kind, pipeline.source, weights=False, subfolder=part, **pipeline.where)
    import transformers  # only shapes of text encoders are made here

    kind = _part_class(pipeline, transformers, name, transformers.PreTrainedModel)
    config = pretrained(kind.config_class, pipeline.source, subfolder=part, **pipeline.where)
    with torch.device("meta"):
        return kind(config)


def _part_class(pipeline: Pipeline, library: Any, name: str, kind: type) -> Any:
    """The class of that name, a `kind`, in `library`. Raises UserError where there is none."""
    found = getattr(library, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise UserError(f"the pipeline at {pipeline.source} names {name}, which {library.__name__} does not have")
    return found


def new(network: dict[str, Any], weights: bool = True, buffers: bool = False, key: str = "model.network") -> nn.Module:
    """A network from its `class` and arguments, the value of `key`; see `load`.

    Raises UserError for another class or wrong arguments.
    """
    arguments = dict(network)
    name = arguments.pop("class", None)
    if name is None:
        raise UserError(f"{key} needs a class: one of {', '.join(sorted(FAMILIES))}")
    try:
        with torch.device("cpu") if weights else _shaping(buffers):
            return _class(name)(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key} cannot be built: {str(error).splitlines()[0]}") from None

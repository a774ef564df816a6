"""LoRA in the files that diffusers reads: a user's is fused into a pipeline, a voice's is written down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import pad

from fewstep.core.errors import UserError
from fewstep.models import hub, loading
from fewstep.models.lora import Factors

_USUAL = "pytorch_lora_weights.safetensors"


def find(source: str) -> str:
    """The safetensors file of `source`: a file, a folder, or a hub id, which stays as it is. Raises UserError."""
    place = loading.locate(source)
    if place.is_dir():
        return str(_in_folder(place))
    if place.is_file():
        if place.suffix != ".safetensors":
            raise UserError(
                f"model.lora={source} is no .safetensors file, and other formats can run code when they are opened: "
                "convert it to safetensors first"
            )
        return str(place)
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or place.suffix:
        raise UserError(
            f"there is no LoRA at {source}: give a .safetensors file, a folder that holds one, or a hub id such as "
            "owner/name"
        )
    return source


def _in_folder(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if folder / _USUAL in files:
        return folder / _USUAL
    if len(files) != 1:
        there = ", ".join(file.name for file in files) or "no .safetensors file, and no other format is opened"
        raise UserError(f"the folder {folder} has {there}: set model.lora to one .safetensors file")
    return files[0]


@torch.no_grad()
def fuse(pipeline: Any, net: nn.Module, source: str, scale: float = 1.0) -> dict[str, Factors] | None:
    """Adds `scale` times the LoRA `source` to the weights of the denoiser `net` and the encoders of `pipeline`.

    It is read by the pipeline's own loader, so whatever diffusers reads is understood. Returns what each part has
    gained; None where that is more than products B A (LoKr, DoRA, biases). Raises UserError for a LoRA that is not
    there, is no safetensors file, or does not fit.
    """
    file, denoiser = find(source), loading.part_of(pipeline)
    if len(experts := loading.parts_of(pipeline)) > 1:
        raise UserError(f"model.lora goes onto one denoiser, and this pipeline has {' and '.join(experts)}: remove it")
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"diffusers loads no LoRA into a {type(pipeline).__name__}: remove model.lora")
    shaped = getattr(pipeline, denoiser)
    setattr(pipeline, denoiser, net)
    try:
        pipeline.load_lora_weights(file, adapter_name="user", use_safetensors=True, **_where(file))
        parts = {name: part for name, part in pipeline.components.items() if _wears(part)}
        if (meant := _parts_of(pipeline, file)) != set(parts):
            raise ValueError(f"it is for {', '.join(sorted(meant))} and fits {', '.join(sorted(parts)) or 'none'}")
        gained = {name: factors_of(part.float(), "user", scale) for name, part in parts.items()}
        pipeline.fuse_lora(components=list(parts), lora_scale=scale)
        pipeline.unload_lora_weights()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(":.")
        raise UserError(
            f"the LoRA {source} cannot be put on this {type(pipeline).__name__} ({reason}): "
            "give one that was trained on this model"
        ) from None
    finally:
        setattr(pipeline, denoiser, shaped)
    whole = {name: factors for name, factors in gained.items() if factors is not None}
    return whole if len(whole) == len(gained) else None


def _parts_of(pipeline: Any, file: str) -> set[str]:
    """The parts of a pipeline that a LoRA names; diffusers leaves those out that it does not find."""
    state = pipeline.lora_state_dict(file, use_safetensors=True, return_lora_metadata=True, **_where(file))[0]
    return {key.split(".")[0] for key in state}


def _where(file: str) -> dict[str, Any]:
    return {} if Path(file).is_file() else hub.pinned(file)


def _wears(part: Any) -> bool:
    return isinstance(part, nn.Module) and any(isinstance(layer, BaseTunerLayer) for layer in part.modules())


def factors_of(net: nn.Module, adapter: str, scale: float = 1.0) -> Factors | None:
    """What `scale` times the adapter of that name adds to `net`; None where it is more than products B A."""
    layers = {
        name: layer
        for name, layer in net.named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter in layer._all_available_adapter_names()
    }
    if not all(_is_plain(layer, adapter) for layer in layers.values()):
        return None
    halves = {name: (layer.lora_A[adapter], layer.lora_B[adapter]) for name, layer in layers.items()}
    return {
        name: (a.weight.detach().clone(), scale * layers[name].scaling[adapter] * b.weight.detach())
        for name, (a, b) in halves.items()
    }


def _is_plain(layer: Any, adapter: str) -> bool:
    plain = isinstance(layer, LoraLayer) and adapter in layer.lora_A
    return plain and adapter not in layer.lora_variant and not layer.lora_bias.get(adapter)


def added(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> dict[str, Factors]:
    """For each part of a pipeline the LoRA that adds what both add: their ranks side by side."""
    return {part: _side_by_side(one.get(part, {}), other.get(part, {})) for part in {**one, **other}}


def _side_by_side(one: Factors, other: Factors) -> Factors:
    joined: Factors = {}
    for name in {**one, **other}:
        halves = [factors[name] for factors in (one, other) if name in factors]
        joined[name] = torch.cat([a for a, _ in halves]), torch.cat([b for _, b in halves], 1)
    # Zeros up to one rank for all: loaders disagree about the scale of a file whose ranks differ.
    rank = max(len(a) for a, _ in joined.values())
    return {name: (_padded(a, 0, rank), _padded(b, 1, rank)) for name, (a, b) in joined.items()}


def _padded(value: Tensor, dim: int, size: int) -> Tensor:
    behind = [0, 0] * (value.ndim - 1 - dim)
    return pad(value, [*behind, 0, size - value.shape[dim]])


def write(pipeline: Any, folder: Path, parts: Mapping[str, Factors], dtype: torch.dtype, name: str) -> None:
    """Saves the LoRA of the `parts` of a pipeline as the file `name`, by the pipeline's own writer."""
    states = {f"{part}_lora_layers": _state(factors, dtype) for part, factors in parts.items()}
    pipeline.save_lora_weights(folder, weight_name=name, **states)


def _state(factors: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    halves = {
        f"{name}.lora_{half}.weight": w for name, pair in factors.items() for half, w in zip("AB", pair, strict=True)
    }
    return {name: weight.to("cpu", dtype).contiguous() for name, weight in halves.items()}

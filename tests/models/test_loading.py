from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fewstep.core.errors import UserError
from fewstep.models import loading, schedulers

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def bare(tmp_path: Path, tiny_unet: Callable[..., nn.Module]) -> Path:
    """A bare model folder."""
    tiny_unet().save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


@pytest.fixture
def pipeline(tmp_path: Path, tiny_unet: Callable[..., nn.Module]) -> Path:
    """A pipeline folder whose scheduler is DDIM with v-prediction."""
    scheduler = schedulers.vp_scheduler("v_prediction", {"beta_schedule": "linear"})
    diffusers.ConsistencyModelPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def refused(source: Path | str, match: str) -> None:
    """Loading `source` is refused with one sentence that says what `match` says."""
    with pytest.raises(UserError, match=match) as caught:
        loading.load(str(source))
    assert "\n" not in str(caught.value)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return set(mine) == set(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_pipeline_comes_back_with_its_scheduler(pipeline: Path, tiny_unet: Callable[..., nn.Module]) -> None:
    loaded = loading.load(str(pipeline))
    assert same_weights(loaded.net, tiny_unet())
    assert isinstance(loaded.scheduler, diffusers.DDIMScheduler)
    assert schedulers.read(loaded.scheduler)[1] == "v_prediction"


def test_a_bare_folder_comes_back_without_one(bare: Path, tiny_unet: Callable[..., nn.Module]) -> None:
    loaded = loading.load(str(bare))
    assert same_weights(loaded.net, tiny_unet()) and loaded.scheduler is None


def test_half_precision_folders_are_loaded_in_float32(tmp_path: Path, tiny_unet: Callable[..., nn.Module]) -> None:
    tiny_unet().half().save_pretrained(tmp_path)
    dtypes = {p.dtype for p in loading.load(str(tmp_path)).net.parameters()}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_a_dit_pipeline_is_found_by_its_transformer(
    name: str, tmp_path: Path, tiny_dit: Callable[..., nn.Module]
) -> None:
    """Also where it has the name that it was published under."""
    tiny_dit().save_pretrained(tmp_path / "transformer")
    config = tmp_path / "transformer" / "config.json"
    config.write_text(config.read_text().replace("DiTTransformer2DModel", name))
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    index = {
        "transformer": ["diffusers", name],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for weights in (True, False):
        net = loading.load(str(tmp_path), weights=weights).net
        assert type(net) is type(tiny_dit())
    assert same_weights(loading.load(str(tmp_path)).net, tiny_dit())


@pytest.mark.parametrize("source", ["nowhere", "./no/folder", "a/b/c"])
def test_a_missing_folder_is_named(source: str) -> None:
    refused(source, f"no teacher at {source}: give a diffusers folder or a hub id")


def test_a_hub_id_out_of_reach_is_named() -> None:
    refused("nobody/nothing", "nobody/nothing, and the hub has no pipeline of that name within reach")


def test_an_empty_folder_is_no_teacher(tmp_path: Path) -> None:
    refused(tmp_path, "neither model_index.json nor config.json")


@pytest.mark.parametrize("text", ["", "{", '{"_class_name": "UNet2DModel"', "\x00\x01", "[1]", '"UNet2DModel"'])
@pytest.mark.parametrize("name", ["bare/config.json", "pipeline/model_index.json"])
def test_a_corrupt_json_is_named(text: str, name: str, bare: Path, pipeline: Path) -> None:
    (bare.parent / name).write_text(text)
    refused(bare.parent / Path(name).parent, f"{Path(name).name} cannot be read")


@pytest.mark.parametrize("node", [None, "UNet2DModel", [], ["diffusers"], [None, None], {"a": 1}])
@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_a_strange_index_is_refused(node: Any, part: str, pipeline: Path) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, part: node}))
    refused(pipeline, "has no denoiser" if part == "unet" else "has no scheduler")


@pytest.mark.parametrize("config", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_corrupt_part_of_a_pipeline_is_named(config: str, pipeline: Path) -> None:
    (pipeline / config).write_text("{")
    refused(pipeline, f"pipeline/{config} cannot be read: .*: the model folder is not whole")


def test_another_class_is_refused_with_the_table(bare: Path) -> None:
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "_class_name": "UNet3DConditionModel"}))
    refused(bare, "no row for the class 'UNet3DConditionModel': it can use .*DiTTransformer2DModel, .*UNet2DModel")


@pytest.mark.parametrize("keep", [0, 40, 4000])
def test_truncated_weights_are_refused(keep: int, bare: Path) -> None:
    (bare / WEIGHTS).write_bytes((bare / WEIGHTS).read_bytes()[:keep])
    refused(bare, "UNet2DModel cannot be loaded from .*bare")


def test_absent_weights_are_refused(bare: Path) -> None:
    (bare / WEIGHTS).unlink()
    refused(bare, "UNet2DModel cannot be loaded from .*bare")


def test_a_missing_tensor_is_refused_by_name(bare: Path) -> None:
    change_weights(bare, lambda state: state.pop("class_embedding.weight"))
    refused(bare, "class_embedding.weight")


def test_a_left_over_tensor_is_refused_by_name(bare: Path) -> None:
    change_weights(bare, lambda state: state.update({"conv_extra.weight": torch.zeros(2)}))
    refused(bare, "conv_extra.weight")


def test_a_tensor_of_another_shape_is_refused_by_name(bare: Path) -> None:
    change_weights(bare, lambda state: state.update({"conv_in.bias": torch.zeros(3)}))
    refused(bare, "conv_in.bias")


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.marker),))

    def __init__(self, marker: Path):
        self.marker = str(marker)


@pytest.mark.parametrize("innocent", [True, False])
def test_pickled_weights_are_never_opened(innocent: bool, bare: Path) -> None:
    state, marker = load_file(bare / WEIGHTS), bare / "marker"
    (bare / WEIGHTS).unlink()
    if innocent:
        torch.save(state, bare / "diffusion_pytorch_model.bin")
    else:
        (bare / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"conv_in.weight": Trap(marker)}))
    refused(bare, "UNet2DModel cannot be loaded from .*bare")
    assert not marker.exists()


def test_a_network_can_be_shaped_without_its_weights(bare: Path, pipeline: Path) -> None:
    (bare / WEIGHTS).unlink()
    (pipeline / "unet" / WEIGHTS).unlink()
    shapes = []
    for folder in (bare, pipeline):
        net = loading.load(str(folder), weights=False).net
        assert {p.device.type for p in net.parameters()} == {"meta"}
        shapes.append([p.shape for p in net.parameters()])
    assert shapes[0] == shapes[1] and len(shapes[0]) > 50
    new = loading.new({"class": "UNet2DModel", "num_class_embeds": 3}, weights=False)
    assert {p.device.type for p in new.parameters()} == {"meta"}


def test_a_new_network_is_built_from_its_arguments() -> None:
    net = loading.new({"class": "UNet2DModel", "block_out_channels": [32, 32, 32, 64], "num_class_embeds": 3})
    assert isinstance(net, diffusers.UNet2DModel) and net.config.num_class_embeds == 3


@pytest.mark.parametrize(
    "network, match",
    [
        ({}, "needs a class: one of .*DiT"),
        ({"class": "VQModel"}, "no row for the class 'VQModel'"),
        ({"class": "UNet2DModel", "wings": 2}, "cannot be built: .*wings"),
        ({"class": "UNet2DModel", "block_out_channels": [32]}, "cannot be built: Must provide the same number"),
    ],
)
def test_a_wrong_network_is_refused(network: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        loading.new(network)

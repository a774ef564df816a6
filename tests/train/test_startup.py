"""Two processes that start from shapes hold what one process holds, to the bit, and never a whole network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from startup_ranks import answer, pairs, parts_of, whole
from test_parallel import launched

from fewstep import build, config, plan
from fewstep.models import schedulers, tiny
from fewstep.plan import Setting
from fewstep.train import checkpoint
from fewstep.train.live_bytes import GATHERED
from tests.test_lora_files import user_lora

pytestmark = pytest.mark.slow

LORA = {"lora": {"rank": 2, "targets": ["*"]}}
LOW = {"roles": {"real_score": {"precision": "bf16"}}}
CASES: dict[str, dict[str, Any]] = {
    "large": {"teacher": "large"},
    "lora": {"teacher": "wan", "generator": LORA, "fake_score": LORA, "data": {"frames": 5}},
    "low_sd15": {"teacher": "sd15", "model": LOW},
    "low_sd3": {"teacher": "sd3", "model": LOW},
    "wan22": {"teacher": "wan22", "data": {"frames": 9}},
    "low_wan": {"teacher": "wan", "model": LOW, "data": {"frames": 5}},
    "experts": {"teacher": "sd15", "objective": {"name": "phased_dmd"}, "model": {"experts": 2}},
    "worn": {"teacher": "sd15", "model": {"lora": "worn"}},
    "pairs": {"teacher": "small", "objective": {"name": "rectified_flow"}, "pairs": {"count": 6, "steps": 2}},
    "renamed": {"teacher": "renamed"},
    "earlier": {"teacher": "small", "start": {"generator": "earlier", "fake_score": "renamed/unet"}},
    "new": {"model": {"process": {"name": "flow"}, "prediction": "flow_prediction"}},
}

ANSWERS = [name for name in CASES if name.startswith(("low_", "pairs"))]


def unet(width: int) -> Any:
    """A UNet2DModel for the scenes, with attention; of width 64 it has 1.7 million weights."""
    return {
        "sample_size": 16,
        "block_out_channels": [width] * 2,
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "num_class_embeds": 13,
    }


def save_unet(folder: Path, width: int, seed: int) -> Path:
    torch.manual_seed(seed)
    net = diffusers.UNet2DModel(**unet(width))
    diffusers.ConsistencyModelPipeline(unet=net, scheduler=schedulers.flow_scheduler()).save_pretrained(folder)
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def save_teachers(folder: Path) -> None:
    save_unet(folder / "large", 64, 0)
    save_unet(folder / "small", 8, 1)
    file = save_unet(folder / "renamed", 8, 2)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # the names of older files
    state = load_file(file)
    for new, name in old.items():
        state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
    save_file(state, file, {"format": "pt"})
    for family in ("sd15", "sd3", "wan", "wan22"):
        tiny.make(family).save_pretrained(folder / family)
    user_lora("sd15", folder / "worn")


def write(folder: Path, name: str, teacher: str | None = None, **more: Any) -> Path:
    """The config of a case."""
    (folder / "prompts.txt").write_text("a disc\ntwo rings\n")
    model = {"guidance": 1.5, "steps": 2, **more.get("model", {})}
    model |= {"teacher": str(folder / teacher)} if teacher else {"network": {"class": "UNet2DModel", **unet(8)}}
    if "lora" in model:
        model["lora"] = str(folder / model["lora"])
    source = str(folder / "prompts.txt") if teacher in ("sd15", "sd3", "wan", "wan22") else "scenes"
    gan = {} if source == "scenes" else {"gan_weight": 0.0}
    players = {"generator": {"lr": 1e-3, "ema": 0.9, **more.get("generator", {})}}
    if teacher and "pairs" not in more:
        players["fake_score"] = {"lr": 1e-3, **more.get("fake_score", {})}
    node = {
        "name": name,
        "batch": 4,
        "device": "cpu",
        "model": model,
        "objective": more.get("objective", {"name": "dmd2", "ratio": 2, **gan} if teacher else {"name": "diffusion"}),
        "players": players,
        "data": {"source": source, "resolution": 16, **more.get("data", {})},
        "pairs": more.get("pairs", {}),
        "start": {role: str(folder / where) for role, where in more.get("start", {}).items()},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(node))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers, configs, and what two processes made of them."""
    folder = tmp_path_factory.mktemp("startup")
    save_teachers(folder)
    run = build.build(config.load(write(folder, "before", "small"))[0])
    for i, parameter in enumerate(run.players["generator"].followers["ema"].module.parameters()):
        torch.nn.init.normal_(parameter, std=0.1 * (i + 1))
    (folder / "earlier").mkdir()
    checkpoint.save(folder / "earlier" / "checkpoints", 1, run.players, run.objective)
    (folder / "before.yaml").unlink()
    for name, case in CASES.items():
        write(folder, name, **case)
    done = launched("torchrun", str(Path(__file__).with_name("startup_ranks.py")), str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_what_two_processes_start_with_is_what_one_does(name: str, folder: Path) -> None:
    """Weights, adapters, heads, followers, buffers that stand in no file: equal to the bit."""
    run = build.build(config.load(folder / f"{name}.yaml")[0])
    expected, found = whole(run), load_file(folder / f"{name}.safetensors")
    found.pop("answer", None)
    assert expected.keys() == found.keys()
    assert [k for k, v in expected.items() if v.dtype != found[k].dtype or not torch.equal(v, found[k])] == []


@pytest.mark.parametrize("name", ANSWERS)
def test_teachers_of_two_processes_answer_as_one(name: str, folder: Path, tmp_path: Path) -> None:
    """One in bfloat16 keeps in float32 what it keeps there on one process; one that makes pairs makes the same."""
    run = build.build(config.load(folder / f"{name}.yaml")[0])
    mine = pairs(run, tmp_path / "pairs") if name == "pairs" else answer(run)
    theirs = load_file(folder / f"{name}.safetensors")["answer"]
    assert (mine - theirs).norm() < 1e-5 * mine.norm()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_never_holds_a_whole_network(rank: int, folder: Path) -> None:
    """At most what it keeps, and one whole tensor with its part: 2 MB of a network of 5 MB would be too much."""
    found = json.loads((folder / f"rank{rank}.json").read_text())["large"]
    one = sum(p.numel() for p in diffusers.UNet2DModel(**unet(64)).parameters()) * 4
    assert found["held"] < 0.55 * 4 * one + 2**20  # generator, its follower, teacher and critic; the heads are whole
    assert found["peak"] <= found["held"] + 1.5 * found["largest"] + 2**17
    assert 1.5 * found["largest"] < one / 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_trains_with_its_half_and_one_block(rank: int, folder: Path) -> None:
    """Measured in real steps: weights, gradients, moments and followers by role, and all of them at their peak."""
    found = json.loads((folder / f"rank{rank}.json").read_text())["large"]
    (stage,) = config.load(folder / "large.yaml")
    planned = plan.foresee(Setting(stage, gpus=2))[0]
    parts = parts_of(planned)
    assert found["parts"] == pytest.approx(parts, rel=0.1) and len(parts) == 8
    held = sum(size for name, size in parts.items() if not name.endswith("gradients"))
    for player in ("generator", "fake_score"):
        sharded = held + parts[f"{player}/gradients"] + planned.of_kind(GATHERED, player)
        assert 0.9 * held < sum(found[player].values()) < 1.1 * sharded
        assert found[player][GATHERED] > 0


def test_a_sharded_run_can_be_let_go(folder: Path) -> None:
    """Before the leader builds what measures and exports."""
    assert [json.loads((folder / f"rank{rank}.json").read_text())["large"]["left"] for rank in (0, 1)] == [0, 0]

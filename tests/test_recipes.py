"""Recipes for published teachers: their numbers are the sources', and --tiny trains, samples and exports each."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from fewstep import build, carried, cli, config, export, routes, runner
from fewstep.models import precision, tiny
from fewstep.models.codecs import codec_of
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.rollout import Rollout
from fewstep.train import checkpoint

RECIPES = {path.stem: path for path in sorted(Path("configs/recipes").glob("*.yaml"))}
ADAMW = {"betas": [0.9, 0.999], "weight_decay": 0.01, "clip": 10.0}  # DMD2, main/train_sd.py and --max_grad_norm
# The layers that DMD2 (main/sd_unified_model.py) and LCM-LoRA adapt.
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
LAYERS += ["conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]
DMD2_LORA = {"rank": 64, "alpha": 8.0, "targets": LAYERS}  # rank and alpha are the defaults of main/train_sd.py
LCM_LORA = {"rank": 64, "alpha": 64.0, "targets": LAYERS}
RTDMD_PLAYER = {"lr": 3e-5, "betas": [0.9, 0.999], "weight_decay": 0.0, "clip": 1.0}
PCM: dict[str, Any] = {"batch": 20, "model": {"guidance": 1 + (4 + 5) / 2, "steps": 4}}
PCM |= {"objective": {"grid": {"count": 50}, "judge": {"weight": 0.1}, "target": "self", "distance": "huber"}}
PCM |= {
    "players": {"generator": {"lr": 5e-6, "weight_decay": 1e-3, "lora": {"rank": 64}}, "discriminator": {"lr": 1e-5}}
}

# What the sources that the headers name say, stage by stage.
PUBLISHED: dict[str, list[dict[str, Any]]] = {
    # tianweiy/DMD2, experiments/sdv1.5: lr1e-5..dfake10_from_scratch.sh and lr5e-7..gan1e-3..resume_fixdata.sh
    "sd15_dmd2": [
        {"steps": 39_000, "batch": 64 * 32, "model": {"guidance": 1.75, "steps": 1}, "data": {"resolution": 512}}
        | {"objective": {"ratio": 10, "gan_weight": 0.0, "times": {"low": 0.02, "high": 0.98}}}
        | {"players": {"generator": {"lr": 1e-5, **ADAMW}, "fake_score": {"lr": 1e-5, **ADAMW}}},
        {"steps": 2_000, "batch": 64 * 32, "objective": {"ratio": 10, "gan_weight": 1e-3, "gan_critic_weight": 1e-2}}
        | {"players": {"generator": {"lr": 5e-7, **ADAMW}, "fake_score": {"lr": 5e-7, **ADAMW}}},
    ],
    # tianweiy/DMD2, experiments/sdxl: ..lr5e-7_denoising4step_diffusion1000_gan5e-3_guidance8_noinit_noode_backsim..sh
    "sdxl_dmd2": [
        {"steps": 19_000, "batch": 64 * 2, "model": {"guidance": 8.0, "steps": 4}, "data": {"resolution": 1024}}
        | {"objective": {"ratio": 5, "gan_weight": 5e-3, "gan_critic_weight": 1e-2, "backward_simulation": True}}
        | {"players": {"generator": {"lr": 5e-7, **ADAMW}, "fake_score": {"lr": 5e-7, **ADAMW}}}
    ],
    # the same, ..lr5e-5..scratch_lora.sh
    "sdxl_dmd2_lora": [
        {"batch": 64 * 2, "model": {"guidance": 8.0, "steps": 4}, "objective": {"ratio": 5, "gan_weight": 5e-3}}
        | {"players": {role: {"lr": 5e-5, **ADAMW, "lora": DMD2_LORA} for role in ("generator", "fake_score")}}
    ],
    # the same, sdxl_lr1e-5_8node_ode_pretraining_10k_cond399.sh and sdxl_cond399_8node_lr5e-7_1step..sh
    "sdxl_dmd2_one_step": [
        {"steps": 2_000, "batch": 64 * 4, "model": {"guidance": 8.0, "steps": 1}, "pairs": {"count": 10_000}}
        | {"players": {"generator": {"lr": 1e-5, **ADAMW}}},
        {"steps": 24_000, "batch": 64 * 2, "objective": {"ratio": 5, "gan_weight": 5e-3, "gan_critic_weight": 1e-2}}
        | {"players": {"generator": {"lr": 5e-7, **ADAMW}, "fake_score": {"lr": 5e-7, **ADAMW}}},
    ],
    # diffusers, examples/consistency_distillation: README_sdxl.md and the script's defaults
    "sdxl_lcm_lora": [
        {"steps": 1_000, "batch": 12, "data": {"resolution": 1024}}
        | {"objective": {"grid": {"count": 50}, "target": "self", "guidance_low": 1 + 3.0, "guidance_high": 1 + 15.0}}
        | {"players": {"generator": {"lr": 1e-4, "weight_decay": 0.0, "clip": 1.0, "lora": LCM_LORA}}}
    ],
    "sd15_lcm_lora": [
        {"steps": 1_000, "batch": 12, "data": {"resolution": 512}}
        | {"objective": {"embed": False, "guidance_low": 1 + 5.0, "guidance_high": 1 + 15.0}}
        | {"players": {"generator": {"lr": 1e-4, "weight_decay": 0.0, "clip": 1.0, "lora": LCM_LORA}}}
    ],
    # the same, train_lcm_distill_sd_wds.py
    "sd15_lcm": [
        {"steps": 1_000, "batch": 12, "data": {"resolution": 512}}
        | {"objective": {"embed": True, "target_decay": 0.95, "guidance_low": 1 + 5.0, "guidance_high": 1 + 15.0}}
        | {"players": {"generator": {"lr": 1e-6, "weight_decay": 0.0, "clip": 1.0, "lora": None}}}
    ],
    # G-U-N/Phased-Consistency-Model, the script for Stable Diffusion 1.5
    "sd15_pcm": [PCM | {"data": {"resolution": 512}}],
    "sd3_pcm": [
        {"batch": 8 * 2, "model": {"guidance": 1 + (4 + 5) / 2, "steps": 4}, "data": {"resolution": 1024}}
        | {"objective": {"grid": {"count": 100}, "judge": {"weight": 0.1}, "target": "self", "distance": "huber"}}
        | {"players": {"generator": {"lr": 5e-6, "weight_decay": 1e-3, "lora": {"rank": 32}}}}
    ],
    # tianweiy/DMD2, experiments/imagenet
    "dit_dmd2": [
        {"batch": 7 * 40, "model": {"steps": 1}, "objective": {"ratio": 5, "gan_weight": weight}}
        | {"players": {role: {"lr": lr, **ADAMW} for role in ("generator", "fake_score")}}
        for lr, weight in ((2e-6, 0.0), (5e-7, 3e-3))
    ],
    # Gsunshine/meanflow
    "dit_meanflow": [
        {"batch": 256, "objective": {"equal": 0.75, "power": 1.0, "floor": 0.01, "times": {"mean": -0.4, "std": 1.0}}}
        | {"players": {"generator": {"betas": [0.9, 0.95], "ema": 0.9999}}}
    ],
    "sdxl_pcm": [PCM | {"data": {"resolution": 1024}}],
    # arXiv:2402.19159
    "sdxl_tcd": [{"model": {"steps": 4}, "players": {"generator": {"lora": {"rank": 64}}}}],
    # arXiv:2404.13686
    "sdxl_hyper_sd": [
        *({"model": {"steps": 1}, "objective": {"name": "tscd", "segments": k}} for k in (8, 4, 2, 1)),
        {"objective": {"name": "dmd2"}},
    ],
    # arXiv:2502.15681, the table of hyper-parameters
    "sd15_f_distill": [
        {"steps": 60_000, "batch": 1024, "model": {"guidance": 1.75, "steps": 1}, "data": {"resolution": 512}}
        | {"objective": {"ratio": 10, "gan_weight": 1e-3, "ratio_low": 0.1, "ratio_high": 20.0}}
        | {"players": {role: {"lr": 1e-5, "weight_decay": 0.01} for role in ("generator", "fake_score")}}
    ],
    # arXiv:2511.22677 and tianweiy/DMD2, experiments/sdxl
    "sdxl_decoupled_dmd": [
        {"batch": 64 * 2, "model": {"guidance": 8.0, "steps": 4}, "objective": {"ratio": 5, "gan_weight": 0.0}}
        | {"players": {"generator": {"lr": 5e-7, **ADAMW}, "fake_score": {"lr": 5e-7, **ADAMW}}}
    ],
    # arXiv:2312.05239 and VinAIResearch/SwiftBrush
    "sd21_swiftbrush": [
        {"batch": 16 * 4, "model": {"guidance": 4.5, "steps": 1}, "data": {"resolution": 512}}
        | {
            "objective": {
                "weight": "alpha_sigma",
                "label_dropout": 0.1,
                "ratio": 1,
                "times": {"low": 0.02, "high": 0.98},
            }
        }
        | {
            "players": {"generator": {"lr": 1e-6, "weight_decay": 0.0}}
            | {"fake_score": {"lr": 1e-3, "weight_decay": 0.0, "lora": {"rank": 64, "alpha": 108.0}}}
        }
    ],
    # arXiv:2412.02687
    "sd21_snoopi": [
        {"batch": 64, "steps": 60_000, "model": {"steps": 1}}
        | {"objective": {"guidance_low": 0.5, "guidance_high": 4.0, "ratio": 1}}
        | {"players": {"generator": {"lr": 1e-6}} | {"fake_score": {"lr": 1e-3, "lora": {"rank": 64, "alpha": 128.0}}}}
    ],
    # Harahan/RTDMD, configs/cold_start/sd35m.yaml
    "sd35_dmd2": [
        {"steps": 100_000, "batch": 9, "model": {"guidance": 4.5, "steps": 4}, "data": {"resolution": 512}}
        | {"objective": {"ratio": 10, "times": {"low": 0.02, "high": 0.98}, "critic_times": {"law": "logit_normal"}}}
        | {
            "players": {"generator": {**RTDMD_PLAYER, "ema": 0.99, "lora": {"rank": 32, "alpha": 64.0}}}
            | {"fake_score": {**RTDMD_PLAYER, "lora": {"rank": 32, "alpha": 64.0}}}
        }
    ],
    "sd35_ac_dmd": [
        {"steps": 100_000, "batch": 9, "model": {"guidance": 4.5, "steps": 4}, "data": {"resolution": 512}}
        | {"objective": {"ratio": 10, "times": {"low": 0.01, "high": 0.98}}}
        | {
            "players": {"generator": {**RTDMD_PLAYER, "ema": 0.99, "lora": {"rank": 32, "alpha": 64.0}}}
            | {"fake_score": {**RTDMD_PLAYER, "lora": {"rank": 32, "alpha": 64.0}}}
        }
    ],
    # NVlabs/FastGen, WanT2V/config_dmd2.py
    "wan21_dmd2": [
        {"steps": 6_000, "batch": 64, "model": {"guidance": 5.0, "steps": 4, "shift": 5.0}, "data": {"frames": 81}}
        | {"objective": {"ratio": 5, "critic_on_generator_step": False, "times": {"low": 1e-3, "high": 0.999}}}
        | {"players": {"generator": {"lr": 1e-5}, "fake_score": {"lr": 1e-5}}}
    ],
    # NVlabs/rcm, Wan 2.1 1.3B
    "wan21_rcm": [
        {"batch": 64, "model": {"guidance": 5.0, "steps": 4}, "data": {"frames": 81}, "pairs": {"count": 250_000}}
        | {"objective": {"warmup": 1000, "consistency": 100.0, "gap": 2 * 1.0, "times": {"mean": 0.7, "std": 1.6}}}
        | {"players": {"generator": {"lr": 2e-6, "betas": [0.0, 0.999]}, "fake_score": {"lr": 4e-7}}}
    ],
    # magic-research/piecewise-rectified-flow
    "sd15_perflow": [
        {"steps": 4_000, "batch": 1024, "model": {"guidance": 7.5, "steps": 4}, "data": {"resolution": 512}}
        | {"objective": {"solver_steps": 8}, "players": {"generator": {"lr": 8e-5}}}
    ],
    "sdxl_perflow": [{"objective": {"solver_steps": 10}, "players": {"generator": {"lr": 1e-4}}}],
    # arXiv:2503.07274
    "sd21_agd": [{"objective": {"name": "agd"}, "data": {"resolution": 512}}],
    # Luo-Yihong/TDM, README.md and train_tdm_demo.py
    "cogvideox_tdm": [
        {"model": {"guidance": 6.0, "steps": 4}, "objective": {"huber": 1e-3, "own_interval": True, "ratio": 1}}
        | {"players": {"generator": {"lr": 2e-5 / 5, "betas": [0.0, 0.95]}, "fake_score": {"lr": 2e-5}}}
    ],
    "pixart_tdm": [
        {"steps": 10_000, "batch": 32, "model": {"guidance": 4.5, "steps": 4}, "data": {"resolution": 512}}
        | {"objective": {"huber": 1e-3, "own_interval": True, "critic_target": "pred_x0", "ratio": 1}}
        | {
            "players": {"generator": {"lr": 2e-5 / 5, "betas": [0.0, 0.95], "weight_decay": 0.01, "clip": 1.0}}
            | {"fake_score": {"lr": 2e-5, "betas": [0.0, 0.95], "weight_decay": 0.01}}
        }
    ],
    # NVlabs/Sana, SanaSprint_1600M_1024px_allqknorm_bf16_scm_ladd.yaml; diffusers, research_projects/sana
    "sana_sprint": [
        {"steps": 30_000, "batch": 16, "model": {"steps": 2}, "data": {"resolution": 1024}}
        | {
            "objective": {"warmup": 4000, "guidances": [4.0, 4.5, 5.0], "gan_weight": 0.5, "from_noise": 0.5}
            | {"gan_taps": [f"transformer_blocks.{i}" for i in (2, 8, 14, 19)], "gan_loss": "hinge"}
            | {"times": {"mean": round(0.2 + math.log(2), 3), "std": 1.6}}
            | {"gan_times": {"mean": round(-0.6 + math.log(2), 3), "std": 1.0}}
        }
        | {
            "players": {
                role: {"lr": 1e-6, "weight_decay": 1e-4, "clip": 0.1} for role in ("generator", "discriminator")
            }
        }
    ],
    # hustvl/TBCM, configs/600M_1024px_tbcm.yaml and diffusion/utils/config.py
    "sana_tbcm": [
        {"batch": 4 * 8, "model": {"guidance": 4.5, "steps": 1}, "data": {"resolution": 1024}}
        | {"objective": {"warmup": 4000, "states": 16, "route_shift": 2.5, "calm_from": 15_000, "last_share": 0.75}}
        | {"players": {"generator": {"lr": round(1e-5 * math.sqrt(32 / 256), 8), "clip": 0.1, "warmup": 5000}}}
    ],
    # arXiv:2510.27684
    "wan22_phased_dmd": [
        {"batch": 64, "model": {"guidance": 4.0, "steps": 4}, "objective": {"phases": 2, "phase": k, "ratio": 5}}
        | {"players": {"generator": {"lr": 5e-5, "lora": {"rank": 64, "alpha": 8.0}}, "fake_score": {"lr": 4e-7}}}
        for k in (1, 2)
    ],
    "wan21_phased_dmd": [
        {"batch": 64, "model": {"guidance": 4.0, "steps": 4}, "objective": {"phases": 2, "ratio": 5}}
        | {"players": {"generator": {"lr": 5e-5, "lora": {"rank": 64, "alpha": 8.0}}, "fake_score": {"lr": 4e-7}}}
    ],
    # arXiv:2510.27684; ModelTC/LightX2V-Qwen-Image-Lightning, issue 64
    "qwen_image_phased_dmd": [
        {"steps": 10_000, "batch": 64, "model": {"guidance": 4.0, "steps": 4, "shift": 3.0}}
        | {"objective": {"phases": 2, "ratio": 5}}
        | {
            "players": {
                "generator": {"lr": 5e-5, "betas": [0.0, 0.999], "weight_decay": 0.01, "clip": 1.0}
                | {"lora": {"rank": 64, "alpha": 8.0}},
                "fake_score": {"lr": 4e-7},
            }
        }
    ],
    # pnotp/ArcFlow, configs/qwen/arcqwen_2nfe_k16.py, _ddp_train.py and README.md
    "qwen_image_arcflow": [
        {"steps": 15_000, "batch": 4 * 4, "model": {"guidance": 4.0, "steps": 2, "shift": 3.2}}
        | {"objective": {"modes": 16, "mixing": 1000, "window": round(3 / 128, 4)}}
        | {
            "players": {
                "generator": {"lr": 1e-4, "betas": [0.9, 0.95], "warmup": 100, "clip": round(50 / 30, 2)}
                | {"lora": {"rank": 256, "alpha": 256.0}}
            }
        }
    ],
    # inclusionAI/TwinFlow, src/configs/qwenimage_task/qwenimage_full.yaml; the steps of README.md
    "qwen_image_twinflow": [
        {"batch": 4, "model": {"steps": 2, "shift": round(0.6 / 0.4, 6)}, "data": {"resolution": 512}}
        | {"objective": {"rectify": 0.5, "clamp": 1.0, "short_step": 0.01}}
        | {"players": {"generator": {"lr": 1e-5, "betas": [0.9, 0.99], "weight_decay": 0.0, "clip": 1.0}}}
    ],
    # arXiv:2511.22677; Tongyi-MAI/Z-Image, issues 74 and 78; ModelTC/LightX2V-Qwen-Image-Lightning, issue 75
    "z_image_decoupled_dmd": [
        {"model": {"steps": 8, "shift": 3.0}, "players": {"fake_score": {"lr": 1e-5}}}
        | {"objective": {name: {"shift": 3.0} for name in ("times", "guidance_times", "critic_times")}}
    ],
    # Harahan/RTDMD, configs/cold_start/flux1_dev.yaml
    "flux_lora_four_steps": [
        {"steps": 100_000, "batch": 9, "model": {"embedded_guidance": 3.5, "steps": 4}, "data": {"resolution": 512}}
        | {"objective": {"ratio": 10, "times": {"low": 0.02, "high": 0.98}, "critic_times": {"law": "logit_normal"}}}
        | {
            "players": {"generator": {**RTDMD_PLAYER, "ema": 0.99, "lora": {"rank": 32, "alpha": 64.0}}}
            | {"fake_score": {**RTDMD_PLAYER, "lora": {"rank": 32, "alpha": 64.0}}}
        }
    ],
    # pnotp/ArcFlow, configs/flux/arcflux_2nfe_k16.py and _ddp_train.py
    "flux_arcflow": [
        {"steps": 10_000, "batch": 4 * 4, "model": {"embedded_guidance": 3.5, "steps": 2, "shift": 3.2}}
        | {"objective": {"modes": 16, "window": 3 / 128, "mixing": 2000}}
        | {
            "players": {
                "generator": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.0, "warmup": 100}
                | {"clip": round(50 / 30, 2), "lora": {"rank": 256, "alpha": 256.0}}
            }
        }
    ],
    # inclusionAI/TwinFlow, src/configs/sd_task/sd35_lora_2order.yaml
    "flux_twinflow": [
        {"batch": 8, "model": {"steps": 2}, "objective": {"rectify": 0.5}, "data": {"resolution": 512}}
        | {
            "players": {
                "generator": {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.0, "clip": 1.0, "ema": 0.99}
                | {"lora": {"rank": 64, "alpha": 64.0}}
            }
        }
    ],
    # the cards of XCLiu/2_rectified_flow_from_sd_1_5 and XCLiu/instaflow_0_9B_from_sd_1_5
    "sd15_instaflow": [
        {"steps": 70_000, "batch": 64, "objective": {"phase": "reflow"}, "data": {"resolution": 512}},
        {"steps": 25_000, "batch": 1024, "objective": {"phase": "reflow"}},
        {"steps": 21_500, "batch": 1024, "objective": {"phase": "distill", "distance": "l2"}, "model": {"steps": 1}},
    ],
}


def play(recipe: str, out: Path, *more: str) -> Path:
    """The run folder of a recipe tried with --tiny."""
    assert cli.main(["train", str(RECIPES[recipe]), "--tiny", *more, f"--out={out}"]) == 0
    (folder,) = out.iterdir()
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line says to a mistake: one sentence, exit code 2, no traceback."""
    assert cli.main(list(arguments)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("fewstep: ") and "Traceback" not in said
    return said


def holds(node: Any, expected: Any) -> bool:
    if not isinstance(expected, dict):
        return node == (pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected)
    return all(holds(node[key], value) for key, value in expected.items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_numbers_are_the_published_ones(recipe: str) -> None:
    stages = config.load(RECIPES[recipe])
    assert len(stages) == len(PUBLISHED[recipe])
    for stage, published in zip(stages, PUBLISHED[recipe], strict=True):
        plain = OmegaConf.to_container(OmegaConf.create(config.to_yaml(stage)))
        assert [key for key, value in published.items() if not holds(plain[key], value)] == []  # type: ignore[index,call-overload]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_header_says_the_command_the_source_and_that_it_was_never_run(recipe: str) -> None:
    text = RECIPES[recipe].read_text()
    header = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert text.startswith(f"# fewstep train configs/recipes/{recipe}.yaml ") and "add --tiny" in header
    assert re.search(r"Source[^.]*: .*(arXiv:\d{4}\.\d{5}|https://\S+)", header)
    assert "Never run at full size here." in header


def stages_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("stage_*")) or [folder]


def two_real_steps(stage: Path) -> None:
    """Both were saved, and between them some weights of a player changed and all stayed finite."""
    saved = checkpoint.available(stage / "checkpoints")
    assert [path.name for path in saved] == ["0000001", "0000002"]
    before, after = (load_file(path / checkpoint.STATE) for path in saved)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(value.isfinite().all() for value in after.values())
    (settings,) = config.load(stage / "config.yaml")
    moves = checkpoint.verify(saved[-1])["moves"]
    assert set(moves) == set(settings.players) and all(moves.values())


QUICK = ("sd15_dmd2", "sd21_agd", "sd35_ac_dmd", "sdxl_hyper_sd", "sdxl_tcd", "wan21_phased_dmd", "wan21_rcm")
"""Between them they have every family, stages, both kinds of adapters, and exports of each kind."""
POLICIES = [name for name in RECIPES if name.endswith("_arcflow")]
EXPORTED = [name for name in RECIPES if name not in POLICIES]
PLAYED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXPORTED]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", POLICIES)
def test_a_recipe_of_a_policy_trains_and_is_sampled_by_fewstep_alone(recipe: str, tmp_path: Path, capsys) -> None:
    folder, picture = play(recipe, tmp_path / "runs"), tmp_path / "x.png"
    two_real_steps(folder)
    assert cli.main(["sample", str(folder), "--prompt", "a red disc", "--count", "1", f"--out={picture}"]) == 0
    assert picture.stat().st_size > 0 and not (folder / "export").exists()
    assert "a PolicyNet has no stock diffusers pipeline: sample with fewstep" in refused(capsys, "export", str(folder))


@pytest.mark.parametrize("recipe", PLAYED)
def test_a_recipe_trains_samples_and_reloads_in_plain_diffusers(recipe: str, tmp_path: Path) -> None:
    """The exported folder's latents equal our sampler's from the same noise, to 1e-4 of the largest."""
    folder = play(recipe, tmp_path / "runs")
    for stage in stages_of(folder):
        two_real_steps(stage)
    picture = tmp_path / "x.png"
    run = export.load_run(folder)
    asked_for = ["--prompt", "a red disc"] if run.teacher.prompted else ["--label-ids", "0"]
    assert cli.main(["sample", str(folder), *asked_for, "--count", "1", f"--out={picture}"]) == 0
    assert picture.stat().st_size > 0
    trusted = carried.trusted(carried.scheduler_of(run))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "export", **trusted)
    pipeline.set_progress_bar_config(disable=True)
    frames = {"num_frames": run.config.data.frames} if run.config.data.frames else {}
    side = run.config.data.resolution
    asked = {"height": side, "width": side, "num_inference_steps": len(run.rollout), **frames}
    noise = torch.Generator().manual_seed(3)
    routes.draw_from(pipeline, noise)
    assert run.teacher.codec is not None
    codec = codec_of(pipeline).like(run.teacher.codec)
    if codec.PROMPTED:
        asked |= codec.guided_by(1.0)
        latents = pipeline("a disc", **asked, generator=noise, output_type="latent", return_dict=False)[0]
        theirs, told = codec.unpacked(latents, run.shape), codec.encode_prompts(["a disc"], size=(side, side))
        again = export.SameNoise(3, 1, codec)
    else:
        route = routes.Latents(codec)
        theirs, told, again = route.walk(pipeline, len(run.rollout)), route.told(pipeline), export.SameNoise(0, 1)
    with torch.no_grad():
        walk = Rollout(run.rollout.steps, run.rollout.step)  # dials are folded into the weights
        ours = walk(in_float32(run), again.normal("", run.shape), told, again).x0  # type: ignore[arg-type]
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max().clamp(min=1)


def in_float32(run: build.Run) -> DiffusersBackbone:
    """The student's network, which computes in float32 whatever the run does: so does the exported pipeline here."""
    backbone = routes.exportable(run)
    plain = copy.deepcopy(backbone.net).float()
    precision.compute_in(plain, torch.float32)
    return DiffusersBackbone(plain, backbone.schedule, backbone.kind)


def test_an_interrupted_tiny_run_resumes_to_the_same_bits(tmp_path: Path, monkeypatch, capsys) -> None:
    whole = play("sd15_lcm_lora", tmp_path / "whole", "save.export=false")
    after = runner.Training.after

    def stopped(self: runner.Training, step: int, logs: Any) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return after(self, step, logs)

    given = ["train", str(RECIPES["sd15_lcm_lora"]), "--tiny", "save.export=false", f"--out={tmp_path / 'cut'}"]
    with monkeypatch.context() as patched:
        patched.setattr(runner.Training, "after", stopped)
        assert cli.main(given) == 0
    assert "stopped by SIGTERM; saved in " in capsys.readouterr().out
    (folder,) = (tmp_path / "cut").iterdir()
    assert [path.name for path in checkpoint.available(folder / "checkpoints")] == ["0000001"]
    assert cli.main([*given, "--resume", str(folder)]) == 0
    last = Path("checkpoints") / "0000002" / checkpoint.STATE
    assert checkpoint.sha256(folder / last) == checkpoint.sha256(whole / last)


def test_tiny_says_what_it_will_do_and_leaves_what_is_overridden(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES["wan21_dmd2"])
    assert cli.main(["config", recipe, "--tiny", "steps=5", "name=mine"]) == 0
    shown = config.load(RECIPES["wan21_dmd2"])[0]
    (made,) = [OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))]
    assert isinstance(made, dict) and (made["name"], made["steps"], made["batch"]) == ("mine", 5, 2)
    assert (made["data"]["source"], made["data"]["resolution"], made["data"]["frames"]) == ("captioned", 16, 9)
    assert made["model"] == OmegaConf.to_container(OmegaConf.structured(shown.model))
    assert cli.main(["train", recipe, "--tiny", "--dry-run"]) == 0
    assert "player fake_score: " in capsys.readouterr().out


NOT_TINY = {
    "configs/scenes/dmd2.yaml": "model.teacher=assets/teachers/scenes-flow is a folder that is here",
    "configs/teachers/flow16.yaml": "this config has no model.teacher",
    "configs/recipes/sd15_dmd2.yaml model.teacher=somebody/some-model": "no tiny pipeline stands for 'somebody/some-m",
}


@pytest.mark.parametrize("given", NOT_TINY)
def test_what_no_tiny_model_can_stand_for(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "train", *given.split(), "--tiny", f"--out={tmp_path / 'runs'}")
    assert NOT_TINY[given] in said and not (tmp_path / "runs").exists()


def test_a_recipe_without_its_hub_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = [str(RECIPES["sdxl_dmd2"]), "data.source=captioned", f"--out={tmp_path}"]
    assert "the hub has no pipeline of that name within reach" in refused(capsys, "train", *given)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny pipeline folders by family."""
    root = tmp_path_factory.mktemp("families")
    for family in ("sd15", "wan"):
        tiny.make(family).save_pretrained(root / family)
    return {family: root / family for family in ("sd15", "wan")}


LONG = "a very long sentence about a red disc above a green ring, " * 20
# Family, the part of its folder that is taken away, overrides -> what is said.
MISTAKES: dict[str, tuple[str, str, list[str], str]] = {
    "no vae": ("sd15", "vae", [], "has no vae: prompts and images need vae, text_encoder, tokenizer"),
    "no text encoder": ("sd15", "text_encoder", [], "has no text_encoder: "),
    "no tokenizer": ("wan", "tokenizer", [], "has no tokenizer: "),
    "no denoiser": ("sd15", "unet", [], "UNet2DConditionModel cannot be loaded from "),
    "resolution": ("sd15", "", ["data.resolution=15"], "images of 15x15 were asked for, but sizes are multiples of 2"),
    "resolution of a video": ("wan", "", ["data.frames=5", "data.resolution=24"], "sizes are multiples of 16"),
    "frames": ("wan", "", ["data.frames=4"], "4 frames were asked for, but this model makes videos of a multiple of 4"),
    "no frames": ("wan", "", [], "no frames were asked for"),
    "frames of an image": (
        "sd15",
        "",
        ["data.frames=5"],
        "5 frames were asked for, but this model makes single images",
    ),
    "prompt": ("sd15", "", [], "tokens, but this model reads 77, its marks included: shorten it"),
    "prompt of a video": ("wan", "", ["data.frames=5"], "tokens, but this model reads 512"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_with_families_end_with_one_sentence(
    mistake: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, part, overrides, expected = MISTAKES[mistake]
    teacher = shutil.copytree(folders[family], tmp_path / "teacher")
    if part:
        shutil.rmtree(teacher / part)
    (tmp_path / "prompts.txt").write_text(LONG if mistake.startswith("prompt") else "a disc")
    small = [f"model.teacher={teacher}", f"data.source={tmp_path / 'prompts.txt'}", "data.resolution=16", "batch=2"]
    given = ["configs/scenes/dmd2.yaml", "objective.gan_weight=0", *small, *overrides]
    assert expected in refused(capsys, "train", *given, f"--out={tmp_path / 'runs'}")


FOREIGN = {
    "HiDreamImageTransformer2DModel": (
        "transformer",
        "has no row for the class 'HiDreamImageTransformer2DModel': it can use AuraFlow",
    ),
    "UNet2DConditionModel": (
        "unet",
        "no codec for the pipeline 'HiDreamImagePipeline': it can use StableDiffusionPipeline",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_family_is_named(kind: str, folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    part, expected = FOREIGN[kind]
    teacher = shutil.copytree(folders["sd15"], tmp_path / "teacher")
    index = {
        "_class_name": "HiDreamImagePipeline",
        part: ["diffusers", kind],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (teacher / "model_index.json").write_text(json.dumps(index))
    given = ["configs/scenes/dmd2.yaml", f"model.teacher={teacher}", f"--out={tmp_path / 'runs'}"]
    assert expected in refused(capsys, "train", *given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    given = ["configs/scenes/dmd2.yaml", f"model.teacher={folders['sd15']}", "device=cuda", f"--out={tmp_path}"]
    assert "device: cuda was asked for, but torch sees no GPU here: use cpu or auto" in refused(capsys, "train", *given)

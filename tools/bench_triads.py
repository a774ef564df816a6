"""DMD2 on networks of SDXL's and Wan 2.1's size, random weights: time, rate and memory of a cycle, case by case.

    python tools/bench_triads.py [--families sdxl wan] [--rounds 3] [--limit 600] [--out assets/benchmarks/triads.json]

Every case is a process of its own: the roles (full copies, or adapters on one network) with each attention kernel, and
compiled. A cycle is one generator move and two critic moves, in bf16 with checkpointing; `ratio` is its time over that
of its bare network passes, both in turn. TFLOP/s count what is computed, recomputation included, as torch's counter
has it under sdpa; the share is of the rate of a large matrix product on the same device. Where there is no GPU the
networks are tiny and in float32, on one thread: that shows that the script works, and no speed of anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from bare_passes import Bare, cycle_of
from torch.utils.flop_counter import FlopCounterMode

from fewstep import build, config, memory, plan
from fewstep.core.errors import UserError
from fewstep.models import tiny
from fewstep.models.tiny import parts

GPU = torch.cuda.is_available()
KERNELS = ("sdpa", "math", "flash", "xformers", "flex")
SIZES: dict[str, list[str]] = {
    "sdxl": ["data.resolution=256", "data.cache=8", "batch=2", "model.guidance=8", "objective.gan_weight=5.0e-3"],
    "wan": ["data.resolution=480", "data.frames=81", "batch=1", "model.guidance=5", "objective.gan_weight=0"],
}
"""The latents are those of 1024 x 1024 pixels (the stand-in for the VAE halves), and of 81 frames of 480 x 480."""
TINY: dict[str, list[str]] = {
    "sdxl": [*SIZES["sdxl"], "data.resolution=16"],
    "wan": [*SIZES["wan"], "data.resolution=16", "data.frames=5"],
}
CONFIG = """
name: triads
steps: 1000
model: {precision: bf16, checkpointing: true}
objective: {name: dmd2, ratio: 2}
players: {generator: {lr: 1.0e-6}, fake_score: {lr: 1.0e-6}}
data: {source: captioned}
"""
UNSEEN = range(2, 4)  # steps whose prompts were not encoded while the run was built
LORA = [f"players.{role}.lora.rank=64" for role in ("generator", "fake_score")]


@dataclass(frozen=True)
class Case:
    family: str
    roles: str = "full"
    attention: str = "sdpa"
    compile: bool = False

    def settings(self) -> list[str]:
        more = [f"model.attention={self.attention}", f"model.compile={str(self.compile).lower()}"]
        more += LORA if self.roles == "lora" else []
        return [*SIZES[self.family], *more] if GPU else [*TINY[self.family], *more, "model.precision=fp32"]


def cases(family: str) -> list[Case]:
    """Each choice by itself, and the two that a long run would take together. Scores written out would not fit."""
    kernels = [kernel for kernel in KERNELS if not (GPU and kernel == "math")]
    return [
        *(Case(family, attention=kernel) for kernel in kernels),
        Case(family, compile=True),
        Case(family, "lora"),
        Case(family, "lora", compile=True),
    ]


def sdxl() -> Any:
    """Stable Diffusion XL with the published UNet's shape; encoders and VAE are stand-ins of the right widths."""
    pipeline = tiny.MAKERS["sdxl"]()
    unet = diffusers.UNet2DConditionModel(
        sample_size=128,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        block_out_channels=[320, 640, 1280],
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    pipeline.register_modules(unet=unet, text_encoder=parts.clip(768), text_encoder_2=parts.clip(1280, projection=1280))
    return pipeline


def wan() -> Any:
    """Wan 2.1 with the published 1.3B transformer's shape; encoder and VAE are stand-ins of the right widths."""
    channels = 16
    pipeline = tiny.MAKERS["wan"]()
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=128,
        in_channels=channels,
        out_channels=channels,
        text_dim=4096,
        freq_dim=256,
        ffn_dim=8960,
        num_layers=30,
    )
    sizes = {
        **pipeline.vae.config,
        "z_dim": channels,
        "latents_mean": [0.0] * channels,
        "latents_std": [1.0] * channels,
    }
    encoder = parts.t5(transformers.UMT5Config, transformers.UMT5EncoderModel, 4096)
    vae = diffusers.AutoencoderKLWan.from_config(sizes)
    pipeline.register_modules(transformer=transformer, text_encoder=encoder, vae=vae)
    return pipeline


def write(family: str, folder: Path) -> None:
    if not folder.exists():
        torch.manual_seed(0)
        pipeline = {"sdxl": sdxl, "wan": wan}[family]() if GPU else tiny.make(family)
        pipeline.to(dtype=torch.bfloat16 if GPU else torch.float32).save_pretrained(folder)


def seconds(work: Callable[[], None]) -> float:
    """Wall time on a GPU, time of the process where there is none: other work would be in the first."""
    if not GPU:
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def matrix_rate() -> float:
    """TFLOP/s of a large matrix product, the best of ten."""
    side, dtype, device = (8192, torch.bfloat16, "cuda") if GPU else (1024, torch.float32, "cpu")
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    times = [seconds(lambda: torch.mm(a, b)) for _ in range(11)]
    return 2 * side**3 / min(times[1:]) / 1e12


def measured(case: Case, folder: Path, rounds: int) -> dict[str, Any]:
    """One row. Raises UserError for what the framework refuses."""
    settings = [f"model.teacher={folder / case.family}", *case.settings()]
    file = folder / "triads.yaml"
    file.write_text(CONFIG)
    chosen = config.load(file, settings)[0]
    run = build.build(chosen)
    build.prepare(run, folder, None)
    weights = {name: p.numel() for name, p in run.teacher.net.named_parameters() if ".lora_" not in name}
    row: dict[str, Any] = {"parameters": sum(weights.values())}
    if not GPU:
        row["peak_gb"] = memory.account(run, UNSEEN).peak / 2**30
    cycle, bare = cycle_of(run), Bare(run).cycle
    if case.attention == "sdpa" and not case.compile:
        with FlopCounterMode(display=False) as counter:
            bare()
        row["tflop"] = counter.get_total_flops() / 1e12
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        build.batches(run)(UNSEEN[0])
    row["first_cycle"] = seconds(cycle)
    if GPU:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
    seconds(bare)
    pairs = [(seconds(cycle), seconds(bare)) for _ in range(rounds)]
    row["cycle"] = statistics.median(whole for whole, _ in pairs)
    row["ratio"] = statistics.median(whole / alone for whole, alone in pairs)
    row["images_per_second"] = chosen.batch * chosen.objective.ratio / row["cycle"]  # type: ignore[attr-defined]
    if not case.compile:
        row["planned_gb"] = plan.foresee(plan.Setting(chosen))[0].peak / 2**30
    return row


def apart(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The row of a case, from a process of its own; where there is none, one sentence says why."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--rounds", str(options.rounds)]
    try:
        done = subprocess.run([*command, "--work", str(folder)], capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"refused": f"not done after {options.limit} s"}
    lines = done.stdout.splitlines() if done.returncode == 0 else done.stderr.splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 else {"refused": lines[-1] if lines else "killed"}


def rated(rows: list[dict[str, Any]], rate: float) -> None:
    """Adds the rate of each row; the kernels and the compiler leave what is to be computed as it is."""
    flops = {(row["family"], row["roles"]): row["tflop"] for row in rows if "tflop" in row}
    for row in rows:
        if "cycle" in row and (key := (row["family"], row["roles"])) in flops:
            row["tflop"] = flops[key]
            row["tflop_per_second"] = row["tflop"] / (row["cycle"] / row["ratio"])
            row["share"] = row["tflop"] / row["cycle"] / rate


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("cycle", "ratio", "share", "images_per_second", "peak_gb", "planned_gb")
    head = ["family", "roles", "attention", "compile", *columns]
    done = [row for row in rows if "refused" not in row]
    cells = [
        [row["family"], row["roles"], row["attention"], "yes" if row["compile"] else "no"]
        + [f"{row[c]:.3g}" if c in row else "-" for c in columns]
        for row in done
    ]
    refused = [f"{row['family']}, {row['roles']}: {row['refused']}" for row in rows if "refused" in row]
    return "\n".join([*plan.aligned([head, *cells]), *refused])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=600, help="seconds for one case")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks/triads.json"))
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not GPU:
        torch.set_num_threads(1)
    if options.case is not None:
        try:
            print(json.dumps(measured(Case(**options.case), options.work, options.rounds)))
        except UserError as error:
            sys.exit(str(error))
        return
    hardware = torch.cuda.get_device_name() if GPU else "CPU, 1 thread: tiny networks, for want of a GPU"
    print(hardware)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    rate, rows = matrix_rate(), []
    with tempfile.TemporaryDirectory() as temporary:
        for family in options.families:
            write(family, Path(temporary) / family)
            for case in cases(family):
                rows.append({**asdict(case), **apart(case, options, Path(temporary))})
                print("done:", " ".join(map(str, asdict(case).values())), flush=True)
    rated(rows, rate)
    record = {
        "commit": commit,
        "date": f"{date.today():%Y-%m-%d}",
        "hardware": hardware,
        "matrix_tflop_per_second": rate,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

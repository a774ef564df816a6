"""Every reader of files from outside: a sound example of what it reads, and the reading of it."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from fewstep import card, config, export, hooks, measure, runner, sampling
from fewstep.data.folder import FolderSource
from fewstep.data.shards import ShardSource
from fewstep.data.source import PromptSource
from fewstep.evals import references
from fewstep.evals.reader import load_reader
from fewstep.health import exported, record
from fewstep.models import hub, loading, lpips
from fewstep.objectives import base as objectives
from fewstep.report import found
from fewstep.report.page import page
from fewstep.store import Store
from fewstep.train import checkpoint
from fewstep.train.rundir import RunDir
from tests.faults import weights


@dataclass(frozen=True)
class Reader:
    """`read(folder)` looks at `file` in a folder that `make` has filled.

    One that is `tolerant` may go on without a file that is none, and says so; all others refuse it. `repair` makes
    changed bytes whole again where a checksum or a length would hide what lies behind it.
    """

    name: str
    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    tolerant: bool = False
    repair: Callable[[bytes], bytes] | None = None
    cost: int = 1
    """how many times as long as the quickest one it takes"""


CONFIG = """name: nothing
seed: 1
steps: 4
batch: 4
objective: {name: dmd2, ratio: 2}
model: {teacher: some/where, steps: 2, transition: ode, negative_prompt: "no & <b>"}
players:
  generator: {lr: 1.0e-4}
  fake_score: {lr: 1.0e-4}
data: {source: scenes, resolution: 16}
stages:
  - {steps: 2}
  - {steps: 3, model: {steps: 1}}
"""
LOG = "".join(
    json.dumps({"step": i, "images": 4 * i, "seconds": 0.5 * i, "generator/loss": 1 / i}) + "\n" for i in (1, 2)
)
TABLE = {"protocol": "of 4", "columns": ["frechet"], "rows": [{"name": "student", "frechet": 1.5, "passes": 2}]}


def png(shade: int = 90, size: tuple[int, int] = (8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 20, 30)).save(file, "PNG")
    return file.getvalue()


def sealed_png(changed: bytes) -> bytes:
    """Right checksums in every chunk that is still one."""
    out, at = changed[:8], 8
    while at + 12 <= len(changed):
        (size,) = struct.unpack(">I", changed[at : at + 4])
        body = changed[at + 4 : at + 8 + size]
        out += changed[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return out


def sealed_safetensors(changed: bytes) -> bytes:
    """The length of the header as it is now."""
    end = changed.find(b"}}") + 2
    header = changed[8:end] + b" " * (-(end) % 8)
    return struct.pack("<Q", len(header)) + header + changed[end:]


def sealed_manifest(changed: bytes) -> bytes:
    """A manifest that swears to be what was written."""
    try:
        manifest = json.loads(changed)
        return json.dumps({**manifest, "seal": checkpoint.seal(manifest)}).encode()
    except (ValueError, TypeError, RecursionError):
        return changed


def sealed_tar(changed: bytes) -> bytes:
    """Right checksums in every header that may be one."""
    blocks = [changed[i : i + 512] for i in range(0, len(changed), 512)]
    for i, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            bare = block[:148] + b" " * 8 + block[156:]
            blocks[i] = block[:148] + b"%06o\0 " % sum(bare) + block[156:]
    return b"".join(blocks)


def text(name: str, said: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(said) and None  # type: ignore[func-returns-value]


def make_run(folder: Path) -> None:
    for name, said in (("config.yaml", CONFIG), ("log.jsonl", LOG), ("evals.jsonl", LOG.replace("loss", "frechet"))):
        (folder / name).write_text(said)
    (folder / "table.json").write_text(json.dumps(TABLE))
    (folder / "origin.json").write_text(json.dumps({"command": "fewstep train", "commit": "0" * 40}))
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "comparison").mkdir(exist_ok=True)
    (folder / "samples" / "0000002.png").write_bytes(png())
    told = {"names": {"teacher": "teacher", "student": "student"}, "asked": ["a disc"]}
    (folder / "comparison" / "pairs.json").write_text(json.dumps(told))
    for name in told["names"]:
        (folder / "comparison" / f"{name}_00.png").write_bytes(png())


def look(folder: Path) -> str:
    """The page of a run, which leaves out what cannot be read."""
    return page(found.read(RunDir(folder)))


def make_checkpoint(folder: Path) -> None:
    place = folder / "0000004"
    place.mkdir(exist_ok=True)
    save_file({"generator/network/weight": torch.ones(2, 3)}, place / checkpoint.STATE)
    sums = {checkpoint.STATE: checkpoint.sha256(place / checkpoint.STATE)}
    manifest = {"format": 2, "step": 4, "moves": {"generator": 2}, "sha256": sums}
    (place / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "seal": checkpoint.seal(manifest)}))


def read_checkpoint(folder: Path) -> None:
    dict(checkpoint.read_network(folder / "0000004", "generator", "ema"))


def read_sworn(folder: Path) -> None:
    """A state whose manifest was made for it, by whoever made it."""
    place = folder / "0000004"
    if not (place / checkpoint.STATE).is_file() or (place / checkpoint.STATE).stat().st_size > 2**20:
        return read_checkpoint(folder)
    manifest = {"format": 2, "step": 4, "moves": {"generator": 2}}
    manifest["sha256"] = {checkpoint.STATE: checkpoint.sha256(place / checkpoint.STATE)}
    (place / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "seal": checkpoint.seal(manifest)}))
    return read_checkpoint(folder)


def make_store(folder: Path) -> None:
    for i, rows in enumerate((2, 1)):
        save_file({"x": torch.ones(rows, 3), "id": torch.arange(rows)}, folder / f"shard-{i:05d}.safetensors")
    index = {"recipe": {"seed": 1}, "count": 3, "shards": {f"shard-{i:05d}.safetensors": "0" * 64 for i in range(2)}}
    (folder / "index.json").write_text(json.dumps(index))


def read_store(folder: Path) -> None:
    from fewstep import made

    store = Store(folder, json.dumps({"seed": 1}), 3, 2)
    if not store.finished():
        made.refuse_other(store)
        return
    store.read()
    store.tensors()["x"][torch.tensor([0, 2])]


def make_reference(folder: Path) -> None:
    file = io.BytesIO()
    protocol = np.array(json.dumps({"weights": "0", "extractor": "reader"}))
    np.savez(file, mu=np.zeros(2), sigma=np.eye(2), n=np.int64(4), features=np.ones((4, 2), "f4"), protocol=protocol)
    (folder / "a.npz").write_bytes(file.getvalue())


def make_lpips(folder: Path) -> None:
    torch.save({"lin0.model.1.weight": torch.ones(1, 2, 1, 1)}, folder / "lpips.pt")
    save_file({"lin0.model.1.weight": torch.ones(1, 2, 1, 1)}, folder / "lpips.safetensors")


def make_attributes(folder: Path) -> None:
    from fewstep.evals.reader import Reader as Network

    net = Network({"kind": ("disc", "square")}, 4, [(8, 1)])
    save_file(net.state_dict(), folder / "reader.safetensors")
    said = {"attributes": {"kind": ["disc", "square"]}, "resolution": 4, "layers": [[8, 1]]}
    (folder / "reader.json").write_text(json.dumps(said))


def make_model(folder: Path) -> None:
    import diffusers

    net = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=[4],
        layers_per_block=1,
        down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"],
        norm_num_groups=2,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.ConsistencyModelPipeline(unet=net, scheduler=scheduler).save_pretrained(folder)
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").rename(folder / "index.json")


def read_index(folder: Path) -> None:
    index = folder / "index.json"
    loading._shards(index)


def read_scheduler(folder: Path) -> None:
    if wrong := exported.differences(folder, [[1.0, 1.0]]):
        assert "scheduler" in wrong[0] or "walk" in wrong[0]


def make_card(folder: Path) -> None:
    header = {"num_inference_steps": 2, "resolution": 8, "id2label": {0: "disc"}, "license": "mit"}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(header)}---\n\n# A student\n")


def read_best(folder: Path) -> None:
    (folder / "checkpoints" / "0000004").mkdir(parents=True, exist_ok=True)
    export._checkpoint(folder, "best")
    run: Any = SimpleNamespace(config=config.Config(name="x", objective=None))
    run.config.evals = SimpleNamespace(best="a/b", hooks={"a": SimpleNamespace(metric="frechet")})
    hooks.Best(run, folder / "best.json", 4)


def read_stored_row(folder: Path) -> None:
    said = SimpleNamespace(teacher=str(folder), lora=None, guidance=1.0)
    data = SimpleNamespace(resolution=16, source="scenes")
    measure.stored_row(SimpleNamespace(config=SimpleNamespace(model=said, data=data)), 4)  # type: ignore[arg-type]


def make_stored_row(folder: Path) -> None:
    (folder / "unet").mkdir(exist_ok=True)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    known = {"guidance": 1.0, "weights_sha256": measure.weights_sha256(folder), "resolution": 16}
    (folder / "evals.json").write_text(json.dumps({**known, "rows": {"4": {"frechet": 2.0}}}))


def make_folder(folder: Path) -> None:
    for label in ("a", "b"):
        (folder / label).mkdir(exist_ok=True)
        (folder / label / "0.png").write_bytes(png())
        (folder / label / "0.txt").write_text("a disc")
    lines = [json.dumps({"file_name": "a/0.png", "text": "a disc"}), json.dumps({"file_name": "../x", "text": "b"})]
    (folder / "captions.jsonl").write_text("\n".join(lines))


def read_pictures(source: FolderSource | ShardSource) -> None:
    rows = torch.arange(2)
    source.images(rows), source.captions(rows), source.label_of(rows)


def make_shard(folder: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, held in (("a.png", png()), ("a.txt", b"a disc"), ("b.png", png(9)), ("b.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(held)
            tar.addfile(member, io.BytesIO(held))
        member = tarfile.TarInfo("c/" + "d" * 150 + ".json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    (folder / "a.tar").write_bytes(file.getvalue()[: 18 * 512])


def resumed() -> config.Config:
    return config.Config(name="nothing", objective=objectives.typed(OmegaConf.create({"name": "dmd2"})))  # type: ignore[arg-type]


def make_resumed(folder: Path) -> None:
    (folder / "config.yaml").write_text(config.to_yaml(resumed()))


def read_origin(folder: Path) -> None:
    hub.pin_as_recorded(folder / "origin.json")


TEACHER = {"source": "a/b", "revision": None, "commit": "0" * 40, "lora": "c/d", "lora_commit": "1" * 40}
ORIGIN = json.dumps({"teacher": {**TEACHER, "beside": {"e/f": "2" * 40}}})
BEST = json.dumps({"name": "a/b", "value": 1.0, "step": 4})
PROMPTS = "a disc\n\n  two discs \u00e9\n<b>bold</b>\n"

READERS = (
    Reader("config", "a.yaml", text("a.yaml", CONFIG), lambda f: config.load(f / "a.yaml"), cost=20),
    Reader("run's config", "config.yaml", make_run, record.read, cost=3),
    Reader("resumed config", "config.yaml", make_resumed, lambda f: runner.check_resumed(resumed(), f), cost=15),
    Reader("log", "log.jsonl", make_run, record.read, True, cost=40),
    Reader("cut log", "log.jsonl", make_run, lambda f: RunDir(f).truncate("log.jsonl", 1), True, cost=20),
    Reader("protocols", "protocols.json", text("protocols.json", "{}"), lambda f: RunDir(f).note_protocols({})),
    *(
        Reader(f"page, {file}", file, make_run, look, True, repair, cost=100)
        for file, repair in (
            ("log.jsonl", None),
            ("evals.jsonl", None),
            ("table.json", None),
            ("origin.json", None),
            ("config.yaml", None),
            ("comparison/pairs.json", None),
            ("comparison/student_00.png", sealed_png),
            ("samples/0000002.png", sealed_png),
        )
    ),
    Reader("manifest", "0000004/manifest.json", make_checkpoint, read_checkpoint, False, sealed_manifest),
    Reader("state", "0000004/state.safetensors", make_checkpoint, read_sworn, False, sealed_safetensors),
    Reader("store", "index.json", make_store, read_store, True),
    Reader("shard of a store", "shard-00001.safetensors", make_store, read_store, True, sealed_safetensors),
    Reader("statistics", "a.npz", make_reference, lambda f: references.read(f / "a.npz"), cost=2),
    Reader("lpips", "lpips.pt", make_lpips, lambda f: lpips._read(f / "lpips.pt")),
    Reader(
        "lpips, safetensors",
        "lpips.safetensors",
        make_lpips,
        lambda f: lpips._read(f / "lpips.safetensors"),
        False,
        sealed_safetensors,
    ),
    Reader("reader's description", "reader.json", make_attributes, load_reader, cost=3),
    Reader("reader", "reader.safetensors", make_attributes, load_reader, False, sealed_safetensors, cost=3),
    Reader("pipeline's index", "model_index.json", make_model, lambda f: loading.find(str(f)).parts, cost=1),
    Reader("network's config", "unet/config.json", make_model, lambda f: loading.load(str(f)), cost=40),
    Reader(
        "network",
        "unet/diffusion_pytorch_model.safetensors",
        make_model,
        lambda f: loading.load(str(f)),
        False,
        sealed_safetensors,
        cost=40,
    ),
    Reader("index of weights", "index.json", make_model, read_index),
    Reader("scheduler", "scheduler/scheduler_config.json", make_model, read_scheduler, True, cost=5),
    Reader("model card", "README.md", make_card, lambda f: card.read_card(f / "README.md"), True, cost=3),
    Reader("best step", "best.json", text("best.json", BEST), read_best),
    Reader("teacher's row", "evals.json", make_stored_row, read_stored_row, True),
    Reader("prompts", "a.txt", text("a.txt", PROMPTS), lambda f: PromptSource(f / "a.txt", 8, 0), True),
    Reader("prompts file", "a.txt", text("a.txt", PROMPTS), lambda f: sampling._lines(f / "a.txt"), True),
    Reader("captions", "captions.jsonl", make_folder, lambda f: read_pictures(FolderSource(f, 4, 0)), True, cost=5),
    Reader("caption", "a/0.txt", make_folder, lambda f: read_pictures(FolderSource(f, 4, 0)), True, cost=5),
    Reader("picture", "a/0.png", make_folder, lambda f: read_pictures(FolderSource(f, 4, 0)), True, sealed_png, cost=5),
    Reader("shard", "a.tar", make_shard, lambda f: read_pictures(ShardSource(str(f), 4, 0)), False, sealed_tar, cost=5),
    Reader("CLIP's config", "open_clip_config.json", weights.make_clip, weights.read_clip, cost=40),
    Reader(
        "CLIP",
        "open_clip_model.safetensors",
        weights.make_clip,
        weights.read_clip,
        False,
        sealed_safetensors,
        cost=40,
    ),
    Reader("DINOv2's config", "config.json", weights.make_dinov2, weights.read_dinov2, cost=40),
    Reader(
        "DINOv2",
        "model.safetensors",
        weights.make_dinov2,
        weights.read_dinov2,
        False,
        sealed_safetensors,
        cost=40,
    ),
    Reader("LoRA", "lora.safetensors", weights.make_lora, weights.read_lora, False, sealed_safetensors, cost=150),
    Reader(
        "origin", "origin.json", text("origin.json", ORIGIN), lambda f: hub.pin_as_recorded(f / "origin.json"), True
    ),
)
TABLES = tuple(
    Reader(f"table's {file}", file, lambda f: weights.make_table(f, [png(), png(9), png(40)]), weights.read_table, True)
    for file in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow")
)
"""for where the datasets library is"""
NAMED = {reader.name: reader for reader in READERS}


def header_of(shape: list[int], dtype: str = "F32", end: int = 24) -> bytes:
    """A safetensors file of one tensor whose header says what it likes."""
    header = json.dumps({"generator/network/weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}})
    return struct.pack("<Q", len(header)) + header.encode() + bytes(24)

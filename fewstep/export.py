"""A run becomes a folder that plain diffusers loads, with the right times inside; and a run folder a run again."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep import adapter, reading
from fewstep import build as building
from fewstep import config as configs
from fewstep.build import Run
from fewstep.card import CARD, card
from fewstep.carried import scheduler_of, trusted
from fewstep.config import Config, RoleConfig
from fewstep.core.errors import UserError
from fewstep.models import hub
from fewstep.models.codec import Codec
from fewstep.models.diffusers import DiffusersBackbone
from fewstep.models.loading import network_of
from fewstep.rollout import Rollout
from fewstep.routes import Route, exportable, left_out, route_of, save_plainly, stock
from fewstep.train import checkpoint, stored
from fewstep.train.stored import Stored

# Far above rounding (1e-6 for eight steps), far below what a wrong time costs (1e-2 and more).
_TOLERANCE = 1e-3


def export(run: Run, folder: Path, dtype: torch.dtype = torch.float32, licence: str | None = None) -> Path:
    """Writes the evaluated generator as a diffusers pipeline in `folder`, which appears whole or not at all.

    The folder is re-opened and walked beside the run's own rollout before it gets its name; an earlier export
    there is replaced. `licence` is an identifier for the model card; default: the teacher's, where its card is at
    hand. Raises UserError for a run without a route in stock diffusers and for a place that is something else already,
    and OSError for one that cannot be written.
    """
    backbone, scheduler = exportable(run), scheduler_of(run)
    route, net = route_of(run, backbone.net), stock(backbone.net, dtype)
    if net.config.get("sample_size", 0) is None:
        net.register_to_config(sample_size=run.shape[-1])
    folder = Path(folder).absolute()
    aside = folder.with_name(f".{folder.name}.partial")
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder.parent):
        _tidy(folder)
        try:
            pipeline = route.pipeline(net, scheduler, partial(stock, dtype=dtype))
            save_plainly(pipeline, aside)
            adapter.write(run, pipeline, aside, dtype)
            _check(run, backbone, net, route, aside)
            (aside / CARD).write_text(card(run, dtype, route.tag, licence))
            _replace(aside, folder)
        except SafetensorError as error:
            raise OSError(f"the weights of the export to {folder} could not be written: {error}") from None
        finally:
            _tidy(folder)
    return folder


def _refuse_foreign(folder: Path) -> None:
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, and an export replaces what is there: give the folder that it leads to")
    if folder.exists() and not (folder / "model_index.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and is no earlier export: choose a new or an empty folder")


@contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """A second export beside waits for the first. The lock is the folder's own: nothing of it stays behind."""
    opened = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _put_by(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _replace(aside: Path, folder: Path) -> None:
    if folder.exists():
        folder.rename(_put_by(folder))
    aside.rename(folder)


def _tidy(folder: Path) -> None:
    """Half of a new export goes; an earlier one that was put by goes too, or gets its name back where none has it."""
    old = _put_by(folder)
    _remove(folder.with_name(f".{folder.name}.partial"))
    if folder.exists() or old.is_symlink():
        _remove(old)
    elif old.is_dir():
        old.rename(folder)


def _remove(path: Path) -> None:
    """A folder, or the link that stands in its place."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


class SameNoise:
    """Stands in for Draw where a pipeline's noise is wanted: `count` rows a draw from one torch generator.

    It is drawn for latents as the pipeline of `codec` packs them: the start, which has no purpose, only where it is
    packed there too.
    """

    def __init__(self, seed: int, count: int, codec: Codec | None = None):
        self.generator, self.count, self.codec = torch.Generator().manual_seed(seed), count, codec

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(self.count, *shape, generator=self.generator)
        if self.codec is None or not (purpose or self.codec.STARTS_PACKED):
            return drawn
        return self.codec.scattered(drawn)


@torch.no_grad()
def _check(run: Run, backbone: DiffusersBackbone, net: nn.Module, route: Route, folder: Path) -> None:
    """Re-opens `folder` and walks it beside the run's rollout. Raises OSError or UserError if they differ."""
    lacking: dict[str, Any] = left_out(run.teacher.codec.pipeline) if run.teacher.codec is not None else {}
    lacking |= trusted(scheduler_of(run))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **lacking)
    pipeline.set_progress_bar_config(disable=True)
    opened, meant = network_of(pipeline).eval(), net.state_dict()
    if any(not torch.equal(value, meant[name].to(value.dtype)) for name, value in opened.state_dict().items()):
        raise OSError("its weights are not those that were written")
    theirs = route.walk(pipeline, len(run.rollout))
    noise = SameNoise(0, 1, run.teacher.codec)
    plain = DiffusersBackbone(opened, backbone.schedule, backbone.kind)
    walk = Rollout(run.rollout.steps, run.rollout.step)  # a second time is folded into the weights
    ours = walk(plain, noise.normal("", run.shape), route.told(pipeline), noise).x0  # type: ignore[arg-type]
    apart = ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1)).item()
    if not apart < _TOLERANCE:
        raise UserError(
            f"{type(pipeline.scheduler).__name__} does not walk these {len(run.rollout)} steps as the run does "
            f"(relative difference {apart:.1e}), so nothing was exported: use fewer steps or another model.transition"
        )


def load_run(folder: Path, step: int | str | None = None, last: bool = True) -> Run:
    """The run of a run folder with the generator of its newest checkpoint, of `step` or of the "best": to be used.

    Of a run of stages the last one with a checkpoint is meant. The checkpoint is verified before anything is
    built; a critic gets no memory. Without the `last` weights the generator is its average, where the run keeps one.
    Raises UserError for an absent folder, no checkpoint, no such step, and Damaged for a damaged checkpoint.
    """
    place = stage_of(Path(folder))
    # All of it before anything is built: a run that still trains removes its old checkpoints.
    path, manifest, state = checkpoint.steady(lambda: _checkpoint(place, step), _opened)
    weights = checkpoint.network_in(state, path, "generator", None if last else "ema")
    (config,) = configs.load(place / "config.yaml")
    hub.pin_as_recorded(place / "origin.json")
    used = _for_use(config)
    run = building.build(used if last else _without_average(used), idle=("fake_score",))
    run.config, player = used, run.players["generator"]
    building.load_weights(run.triad.generator, weights, str(path))
    if "ema" in player.followers:
        averaged = checkpoint.network_in(state, path, "generator", "ema")
        building.load_weights(player.followers["ema"].module, averaged, str(path))
    for name, other in run.players.items():
        other.moves = manifest["moves"].get(name, 0)
    return run


def _opened(path: Path) -> tuple[Path, dict[str, Any], Stored]:
    return path, checkpoint.verify(path), stored.files([path / checkpoint.STATE])


def _for_use(config: Config) -> Config:
    """The config without what only training needs: where weights started, and a GPU that may not be here.

    What networks compute in is a part of them; by which kernels is not.
    """
    precise = {role: RoleConfig(precision=own.precision) for role, own in config.model.roles.items()}
    model = dataclasses.replace(config.model, attention="sdpa", checkpointing=False, compile=False, roles=precise)
    device = "auto" if config.device == "cuda" else config.device
    return dataclasses.replace(config, start={}, device=device, model=model)


def _without_average(config: Config) -> Config:
    generator = dataclasses.replace(config.players["generator"], ema=0.0)
    return dataclasses.replace(config, players={**config.players, "generator": generator})


def stage_of(folder: Path) -> Path:
    """The folder itself, or that of its last stage which has a checkpoint. Raises UserError for no run folder."""
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}: give one that `fewstep train` has made")
    stages = sorted(folder.glob("stage_*"), key=lambda p: (len(p.name), p.name))
    saved = [stage for stage in stages if checkpoint.available(stage / "checkpoints")]
    place = saved[-1] if saved else folder
    if not (place / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder, it has no config.yaml: give one that `fewstep train` has made")
    return place


def _checkpoint(place: Path, step: int | str | None) -> Path:
    if step is None:
        return building.latest(place)
    best: dict[str, Any] | None = None
    if step == "best":
        if not (place / "best.json").is_file():
            raise UserError(f"{place} has no best checkpoint: a run keeps one where evals.best names a hook")
        best = reading.fields(place / "best.json")
        step = _counted(best)
    found = {int(path.name): path for path in checkpoint.available(place / "checkpoints")}
    if step not in found and best is not None and isinstance(best.get("before"), dict):
        step = _counted(best["before"])  # the new one is still being written
    if step not in found:
        raise UserError(f"{place} has no checkpoint of step {step}: it has {', '.join(map(str, found)) or 'none'}")
    return found[step]


def _counted(row: dict[str, Any]) -> int | None:
    return step if isinstance(step := row.get("step"), int) else None

"""Checkpoints that are whole or absent: written aside, verified by re-opening, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep import reading
from fewstep.core.errors import UserError
from fewstep.train import parallel, processes, stored
from fewstep.train.player import Player
from fewstep.train.stored import Stored

T = TypeVar("T")

STATE = "state.safetensors"
MANIFEST = "manifest.json"
ASIDE, GONE = ".partial", ".gone"
"""endings of hidden names: what is being written, and what is being removed"""
_FORMAT = 2  # 1 had no seal on the manifest


class Damaged(UserError):
    """A checkpoint whose bytes are not the ones that were written."""


def collect(players: Mapping[str, Player], extra: nn.Module) -> dict[str, Tensor]:
    """Everything that changes during training, as flat names -> tensors: networks, followers, optimizers, buffers."""
    state: dict[str, Tensor] = {f"objective/{k}": v for k, v in extra.state_dict().items()}
    for name, player in players.items():
        state |= {f"{name}/network/{k}": v for k, v in player.modules[0].state_dict().items()}
        for label, follower in player.followers.items():
            state |= {f"{name}/follower.{label}/{k}": v for k, v in follower.module.state_dict().items()}
        # Sharding can leave an optimizer without its state and without an error.
        kept = player.optimizer.state or not player.moves or processes.size() == 1
        assert kept, f"the optimizer of {name} has lost its state"
        names = {id(p): n for n, p in player.named_parameters()}
        for parameter, moments in player.optimizer.state.items():
            state |= {f"{name}/optimizer/{names[id(parameter)]}/{k}": v for k, v in moments.items()}
    return state


def restore(state: Mapping[str, Tensor], players: Mapping[str, Player], extra: nn.Module) -> None:
    """The inverse of `collect`, strict: raises Damaged when a tensor is missing or left over."""
    kept, left = stored.held(state), set(state)

    def take(prefix: str) -> Stored:
        chosen = kept.under(prefix)
        left.difference_update(chosen.names.values())
        return chosen

    try:
        extra.load_state_dict(take("objective/"))
        for name, player in players.items():
            fill(player.modules[0], take(f"{name}/network/"))
            for label, follower in player.followers.items():
                fill(follower.module, take(f"{name}/follower.{label}/"))
            for key, parameter in player.named_parameters():
                moments = take(f"{name}/optimizer/{key}/")
                if moments:
                    if moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                        raise ValueError(f"the optimizer of {name} has {', '.join(sorted(moments))} of {key}")
                    # A copy, for what was read may lie in the file.
                    own = {k: parallel.like(v, parameter).to(parameter.device, copy=True) for k, v in moments.items()}
                    player.optimizer.state[parameter] = own
    except (RuntimeError, ValueError) as error:
        said = str(error).splitlines()[:2][-1].strip()
        raise Damaged(f"the checkpoint does not fit the configured networks: {said}") from None
    if left:
        raise Damaged(f"the checkpoint holds {len(left)} tensors this run has no place for, such as {min(left)}")


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads the whole tensors of `state` one by one, of which a sharded `module` takes its own part.

    Raises ValueError where they are not those of `module`.
    """
    places = module.state_dict()
    for what, names in (("missing", places.keys() - state.keys()), ("left over", state.keys() - places.keys())):
        if names:
            raise ValueError(f"{len(names)} tensors are {what}, such as {min(names)}")
    for name, place in places.items():
        whole = state[name]
        if whole.shape != place.shape:
            raise ValueError(f"{name} has the shape {tuple(whole.shape)} and not {tuple(place.shape)}")
        parallel.put(whole, place)


def gather(players: Mapping[str, Player], extra: nn.Module) -> dict[str, Tensor]:
    """`collect` in whole tensors on the CPU. Every process takes part; the leader alone keeps them."""
    whole = ((k, parallel.full(v.detach())) for k, v in collect(players, extra).items())
    return {k: v.cpu().contiguous() for k, v in whole if processes.leads()}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def seal(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest without its seal."""
    bare = {k: v for k, v in manifest.items() if k != "seal"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def save(folder: Path, step: int, players: Mapping[str, Player], extra: nn.Module) -> Path:
    """Writes `folder`/<step>, the number of steps done; the same file from any number of processes.

    Raises OSError, in the leader, when the disk is full or read-only.
    """
    final = folder / f"{step:07d}"
    state = gather(players, extra)
    if processes.leads():
        write(final, step, {name: player.moves for name, player in players.items()}, state)
    processes.wait()
    return final


def write(final: Path, step: int, moves: Mapping[str, int], state: dict[str, Tensor]) -> None:
    """Puts state and manifest aside, and in their place when they are whole."""
    folder = final.parent
    folder.mkdir(exist_ok=True)  # never its parents: a run whose folder was removed would go on in half of one
    aside = folder / f".{step:07d}{ASIDE}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        write_state(aside / STATE, state)
        manifest = {
            "format": _FORMAT,
            "step": step,
            "moves": dict(moves),
            "sha256": {STATE: sha256(aside / STATE)},
        }
        write_text(aside / MANIFEST, json.dumps({**manifest, "seal": seal(manifest)}, indent=1))
        flush(aside)
        if wrong(final) is None and (final / MANIFEST).read_bytes() == (aside / MANIFEST).read_bytes():
            return
        discard(final)
        aside.rename(final)
        flush(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_state(path: Path, state: dict[str, Tensor]) -> None:
    """Saves `state`, flushes it to disk and re-opens it. Raises OSError when what is there is not what was meant."""
    try:
        save_file(_apart(state), path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        with safe_open(path, framework="pt") as read:
            if set(read.keys()) != set(state) or not all(same_bits(read.get_tensor(k), v) for k, v in state.items()):
                raise OSError(f"{path} does not hold what was written to it")
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each with a storage of its own, as safetensors wants them; most have one already."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        own = place not in seen and tensor.is_contiguous()
        apart[name] = tensor if own else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(place)
    return apart


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on the CPU have one type, one shape and the same bytes; a NaN equals itself."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)))


def write_text(path: Path, text: str) -> None:
    """Puts `text` in the place of the file `path`, whole or not at all: what was there before stays until then."""
    aside = path.with_name(f".{os.getpid()}.{path.name}{ASIDE}")  # two commands may write the same report
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def flush(folder: Path) -> None:
    """Puts the names in `folder` on the disk, where a file system can do that."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def available(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = (p for p in folder.glob("*") if p.name.isascii() and p.name.isdecimal() and p.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are whole. Raises Damaged, naming the file and the newest that is."""
    if (damage := wrong(path)) is not None:
        sound = newest_sound(path.parent) or _of_earlier_stage(path)
        instead = f"resume from the newest that is whole with --resume {sound}" if sound else "no other one is whole"
        raise Damaged(f"the checkpoint {path} is damaged ({damage}): {instead}")
    return reading.fields(path / MANIFEST)


def wrong(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None where all are as they were written."""
    try:
        manifest = reading.fields(path / MANIFEST)
        sums = {STATE: manifest["sha256"][STATE], **manifest["sha256"]}
        if manifest["format"] not in (1, _FORMAT) or (manifest["format"] > 1 and manifest["seal"] != seal(manifest)):
            raise ValueError("the manifest is not the one that was written")
        if not (_is_count(manifest["step"]) and all(map(_is_count, manifest["moves"].values()))):
            raise ValueError("steps and moves are counted")
        if not all(map(reading.is_name, sums)):
            raise ValueError("its files lie beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    for name, expected in sums.items():
        try:
            reading.safetensors(path / name)  # a device, or a file that is all hole, would never end
            found = sha256(path / name)
        except (OSError, UserError):
            found = ""
        if found != expected:
            return f"{name} is not what was written"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose files are whole."""
    return next((path for path in reversed(available(folder)) if wrong(path) is None), None)


def load(path: Path, players: Mapping[str, Player], extra: nn.Module) -> int:
    """Restores players and objective from `path`; returns the number of steps done. Raises Damaged."""
    manifest = verify(path)
    restore(stored.files([path / STATE]), players, extra)
    for name, player in players.items():
        if name not in manifest["moves"]:
            raise Damaged(f"the checkpoint {path} does not say how often the player {name} has moved")
        player.moves = manifest["moves"][name]
        if player.moves and not player.optimizer.state:
            raise Damaged(f"the checkpoint {path} holds no optimizer state of the player {name}")
    return manifest["step"]


def steady(choose: Callable[[], Path], read: Callable[[Path], T]) -> T:
    """What `read` finds in the checkpoint that `choose` names: the next one, where a run that trains removes that."""
    while True:
        path = choose()
        try:
            return read(path)
        except (UserError, OSError):
            if path.exists():
                raise


def _of_earlier_stage(path: Path) -> Path | None:
    """The newest whole checkpoint of the stages before that of the checkpoint `path`."""
    stage = path.parent.parent
    number = lambda folder: int(folder.name.removeprefix("stage_"))
    if not (stage.name.removeprefix("stage_").isdecimal() and stage.name.startswith("stage_")):
        return None
    beside = (f for f in stage.parent.glob("stage_*") if f.name.removeprefix("stage_").isdecimal())
    earlier = sorted((folder for folder in beside if number(folder) < number(stage)), key=number, reverse=True)
    return next((sound for folder in earlier if (sound := newest_sound(folder / "checkpoints"))), None)


def prune(newest: Path, keep: int, best: int | None = None) -> None:
    """Once `newest` is verified, removes its elders beyond `keep`, but that of the step `best`, and all after it.

    Those after it are of a run that was gone back on. Raises Damaged, and leaves all there is, where it is not whole.
    """
    folder, every = newest.parent, available(newest.parent)
    tidy(folder)
    if newest not in every:
        raise FileNotFoundError(errno.ENOENT, "it has gone since it was written", str(newest))
    here = every.index(newest) + 1
    elders, later = every[:here], every[here:]
    old = [path for path in elders[:-keep] if int(path.name) != best] + later
    if old:
        verify(newest)
    for path in old:
        discard(path)


def discard(path: Path) -> None:
    """Removes a checkpoint, if it is there. Its name goes first: a kill leaves none that is half there."""
    if path.exists():
        gone = path.with_name(f".{path.name}{GONE}")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Removes what interrupted writes and removals have left in `folder`."""
    for ending in (ASIDE, GONE):
        for stale in folder.glob(f".*{ending}"):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)


def read_network(path: Path, player: str, follower: str | None) -> Stored:
    """The weights of one network of a verified checkpoint: the follower's when asked for and there."""
    verify(path)
    return network_in(stored.files([path / STATE]), path, player, follower)


def network_in(state: Stored, path: Path, player: str, follower: str | None) -> Stored:
    """The same of a `state` that was read from `path`."""
    for part in ([f"follower.{follower}"] if follower else []) + ["network"]:
        if found := state.under(f"{player}/{part}/"):
            return found
    raise UserError(f"the checkpoint {path} holds no network called {player}")

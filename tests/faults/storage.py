"""Disks that are full, slow, read-only or gone, at every write of a run; and checkpoints whose bytes have changed."""

from __future__ import annotations

import errno
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.train import checkpoint
from tests.faults.harness import Done, Server, different, leftovers, resumable, the_run, traces
from tests.faults.kills import SCENES, Whole, whole

SCENE = SCENES["pairs_then_gan"]
FULL = "No space left on device"


def write_sites(server: Server, scene: Whole, out: Path) -> list[str]:
    """What an undisturbed run writes below `out`, in its order."""
    done = server.run(scene.scene.arguments(scene.teacher, out), {"site": -1, "root": str(out)})
    assert done.code == 0, done.errors[-2000:]
    return done.counted["sites"]


def refused(done: Done, *words: str) -> list[str]:
    """What is wrong with the answer of a command that had to give up: one sentence with one of `words`."""
    try:
        said = done.sentence
    except AssertionError as error:
        return [f"no clear sentence: {error}"]
    return [] if any(word in said for word in words) else [f"another sentence: {said}"]


def unsound(run: Path | None) -> list[str]:
    """Checkpoints of a run that are not whole, and temporary files."""
    if run is None:
        return []
    saved = [path for place in run.rglob("checkpoints") for path in checkpoint.available(place)]
    return [f"{path} is damaged" for path in saved if checkpoint.wrong(path)] + leftovers(run)


def mended(server: Server, scene: Whole, out: Path) -> list[str]:
    """Goes on in `out`, where there is room again, and says what differs from the run that was left alone."""
    run, arguments = the_run(out), scene.scene.arguments(scene.teacher, out)
    if run is not None and not resumable(run):
        shutil.rmtree(run)
        run = None
    done = server.run([*arguments, *(["--resume", str(run)] if run is not None else [])])
    if done.code != 0:
        return [f"the resume ended with {done.code}: {done.errors[-1500:]}"]
    run = the_run(out)
    assert run is not None
    return [f"{name} differs" for name in different(scene.left, traces(run))] + leftovers(run)


def full(server: Server, scene: Whole, site: int | str, out: Path, half: bool = False) -> list[str]:
    """What is wrong when the disk is full from write number `site` on, and has room again when the run is resumed."""
    fault = {"site": site, "root": str(out), "half": half}
    done = server.run(scene.scene.arguments(scene.teacher, out), fault)
    return refused(done, FULL) + unsound(the_run(out)) + mended(server, scene, out)


def removed(server: Server, scene: Whole, site: int | str, out: Path) -> list[str]:
    """What is wrong when everything is removed just before write number `site`."""
    out.mkdir(exist_ok=True)
    fault = {"site": site, "root": str(out), "remove": str(out)}
    done = server.run(scene.scene.arguments(scene.teacher, out), fault)
    left = [str(path) for path in out.rglob("*")] if out.exists() else []
    return refused(done, "has gone", "could not be written") + left


def read_only(server: Server, scene: Whole, site: int | str, out: Path) -> list[str]:
    """What is wrong when the disk becomes read-only at write number `site`."""
    fault = {"site": site, "root": str(out), "error": errno.EROFS}
    done = server.run(scene.scene.arguments(scene.teacher, out), fault)
    return refused(done, "Read-only file system") + mended(server, scene, out)


def slow(server: Server, scene: Whole, seconds: float, out: Path) -> list[str]:
    """What is wrong when every write takes so long."""
    fault = {"site": -1, "root": str(out), "pause": seconds}
    done = server.run(scene.scene.arguments(scene.teacher, out), fault)
    run = the_run(out)
    assert run is not None and done.code == 0, done.errors[-2000:]
    return [f"{name} differs" for name in different(scene.left, traces(run))] + leftovers(run)


def truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(1, len(content))]


def flipped(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def zeroed(content: bytes, draw: random.Random) -> bytes:
    """A block of the disk that came back empty."""
    at = draw.randrange(max(1, len(content) - 512))
    changed = content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :]
    return changed if changed != content else flipped(content, draw)


def emptied(content: bytes, draw: random.Random) -> bytes:
    return b""


HARMS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": truncated,
    "flipped": flipped,
    "zeroed": zeroed,
    "emptied": emptied,
}


def damage(path: Path, tries: int, seed: int) -> dict[str, tuple[int, int]]:
    """File and harm -> how often it was tried on the checkpoint `path`, and how often that was noticed."""
    draw, found = random.Random(seed), {}
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for name, harm in HARMS.items():
            count = 1 if harm is emptied else tries
            caught = 0
            for _ in range(count):
                file.write_bytes(harm(whole, draw))
                caught += checkpoint.wrong(path) is not None
            found[f"{file.name} {name}"] = (count, caught)
        file.write_bytes(whole)
    assert checkpoint.wrong(path) is None
    return found


def offered(server: Server, scene: Whole, run: Path, harm: str, name: str) -> list[str]:
    """What is wrong with the answer to `--resume` where a file of the newest checkpoint of `run` is damaged."""
    saved = [path for place in sorted(run.rglob("checkpoints")) for path in checkpoint.available(place)]
    newest, before = saved[-1], saved[-2]
    whole = (newest / name).read_bytes()
    try:
        (newest / name).write_bytes(HARMS[harm](whole, random.Random(1)))
        done = server.run([*scene.scene.arguments(scene.teacher, run.parent), "--resume", str(run)])
    finally:
        (newest / name).write_bytes(whole)
    return refused(done, f"--resume {before}") + refused(done, str(newest))


def real_disks(server: Server, scene: Whole, folder: Path) -> dict[str, Any]:
    """Small file systems of the kernel's own, full at several sizes and then enlarged, and one that is read-only."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return {"real_disks": 0}
    tried, faults = 0, []
    try:
        for size in (64, 200, 400, 800, 1200, 1600, 2000, 2400, 3000, 3600):
            remount(folder, f"size={size}k")
            done = server.run(scene.scene.arguments(scene.teacher, folder / "out"))
            tried += 1
            faults += [] if done.code == 0 else refused(done, FULL, "could not be written")
            faults += unsound(the_run(folder / "out"))
            remount(folder, "size=64m")
            faults += mended(server, scene, folder / "out")
            shutil.rmtree(folder / "out")
        remount(folder, "ro")
        done = server.run(scene.scene.arguments(scene.teacher, folder / "out"))
        faults += refused(done, "Read-only file system")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
    assert not faults, faults
    return {"real_disks": tried, "real_read_only": 1}


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def soak(folder: Path, seed: int = 8) -> dict[str, Any]:
    """Every write site in turn, and many damages. Raises AssertionError where one is not met as promised."""
    with Server() as server:
        scene = whole(server, replace(SCENE, more=(*SCENE.more, "evals.samples=0")), folder / "whole")
        sites = write_sites(server, scene, folder / "sites")
        opened = [i for i, site in enumerate(sites) if site.startswith("open") and "/comparison/" not in site]
        trained = next(i for i, site in enumerate(sites) if "comparison" in site)
        cases: list[tuple[str, Callable[[Path], list[str]]]] = []
        cases += [("full", lambda out, i=i: full(server, scene, i, out)) for i in range(len(sites))]
        cases += [("half_written", lambda out, i=i: full(server, scene, i, out, half=True)) for i in opened]
        cases += [("removed", lambda out, i=i: removed(server, scene, i, out)) for i in range(1, trained, 2)]
        cases += [("read_only", lambda out, i=i: read_only(server, scene, i, out)) for i in range(0, trained, 6)]
        cases += [("slow_disk", lambda out: slow(server, scene, 0.05, out))]
        tried: dict[str, int] = {}
        faults: list[str] = []
        for number, (name, case) in enumerate(cases):
            place = folder / f"case_{number}"
            wrong = case(place)
            shutil.rmtree(place, ignore_errors=True)
            tried[name] = tried.get(name, 0) + 1
            faults += [f"{name} {number}: {one}" for one in wrong]
            print(f"{name} {number} of {len(cases)}: {wrong or 'as it should be'}", flush=True)
        run = the_run(folder / "sites")
        assert run is not None
        answers = {f"{name} {harm}": offered(server, scene, run, harm, name) for name in FILES for harm in HARMS}
        faults += [f"{name}: {one}" for name, wrong in answers.items() for one in wrong]
        disks = real_disks(server, scene, folder / "disk")
    counts = damage(run / "stage_2" / "checkpoints" / "0000004", 3000, seed)
    faults += [f"{name}: {caught} of {count} noticed" for name, (count, caught) in counts.items() if caught < count]
    figures = {
        "write_sites": len(sites),
        "tried": tried,
        "as_promised": sum(tried.values()) - len({fault.split(":")[0] for fault in faults}),
        **disks,
        "damaged_files": {name: {"tried": count, "caught": caught} for name, (count, caught) in counts.items()},
        "newest_sound_offered": len(answers),
    }
    assert not faults, (json.dumps(figures), faults)
    return figures


FILES = (checkpoint.STATE, checkpoint.MANIFEST)

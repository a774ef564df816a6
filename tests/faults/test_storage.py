"""Full, slow, read-only and removed disks end in one sentence, and a resume ends as if nothing had been."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fewstep.train import checkpoint
from tests.faults import storage
from tests.faults.harness import Server, the_run
from tests.faults.kills import Whole


@pytest.mark.slow
def test_every_kind_of_file_is_among_the_write_sites(server: Server, gan: Whole, tmp_path: Path) -> None:
    sites = storage.write_sites(server, gan, tmp_path)
    names = ("config.yaml", "origin.json", "log.jsonl", "evals.jsonl", "best.json", "protocols.json", "index.json")
    names += ("state.safetensors", "manifest.json", "png", "pairs.json", "model_index.json", "report.html")
    assert all(any(name in path for path in sites) for name in names) and len(sites) > 90


@pytest.mark.parametrize(
    "ending, half",
    [
        pytest.param(".config.yaml.partial", False, marks=pytest.mark.slow),
        pytest.param("shard-00001.safetensors.partial", False, marks=pytest.mark.slow),
        ("stage_2/log.jsonl", True),
        pytest.param("evals.jsonl", False, marks=pytest.mark.slow),
        ("stage_2/checkpoints/.0000002.partial/state.safetensors", False),
        pytest.param("diffusion_pytorch_model.safetensors", False, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_one_sentence_and_no_loss(
    ending: str, half: bool, server: Server, gan: Whole, tmp_path: Path
) -> None:
    assert storage.full(server, gan, ending, tmp_path, half) == []


def test_a_folder_removed_during_the_run_is_said(server: Server, gan: Whole, tmp_path: Path) -> None:
    assert storage.removed(server, gan, "stage_1/checkpoints/.0000002.partial", tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["stage_1/samples", "stage_1/samples/.0000002.png.partial"])
def test_a_disk_that_is_or_becomes_read_only_is_said(where: str, server: Server, gan: Whole, tmp_path: Path) -> None:
    assert storage.read_only(server, gan, where, tmp_path) == []


def finished(gan: Whole) -> Path:
    run = the_run(gan.teacher.parent / "counted")
    assert run is not None
    return run


def test_every_damage_of_a_checkpoint_is_noticed(gan: Whole, tmp_path: Path) -> None:
    path = shutil.copytree(finished(gan) / "stage_2" / "checkpoints" / "0000004", tmp_path / "0000004")
    counts = storage.damage(path, 40, seed=1)
    assert set(counts) == {f"{file} {harm}" for file in storage.FILES for harm in storage.HARMS}
    assert all(tried == caught for tried, caught in counts.values()), counts


@pytest.mark.parametrize("name, harm", [(checkpoint.STATE, "flipped"), (checkpoint.MANIFEST, "emptied")])
def test_the_newest_sound_checkpoint_is_offered(
    name: str, harm: str, server: Server, gan: Whole, tmp_path: Path
) -> None:
    run = shutil.copytree(finished(gan), tmp_path / "run")
    assert storage.offered(server, gan, run, harm, name) == []


@pytest.mark.slow
def test_a_slow_disk_changes_nothing(server: Server, gan: Whole, tmp_path: Path) -> None:
    assert storage.slow(server, gan, 0.005, tmp_path) == []

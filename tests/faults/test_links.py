"""A link in a folder that came from elsewhere leads no run out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep import cli
from fewstep.core.errors import UserError
from fewstep.train import lock
from tests.faults.harness import make_teacher


@pytest.mark.parametrize("name", ["samples", "checkpoints", "log.jsonl", "stage_1", "comparison/teacher_00.png"])
def test_a_run_with_a_link_in_it_is_not_gone_on_with(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, outside = tmp_path / "runs" / "one", tmp_path / "outside"
    (outside / ".precious.gone").mkdir(parents=True)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(outside)
    (run / "checkpoints").mkdir(exist_ok=True)
    given = ["configs/scenes/dmd2.yaml", f"model.teacher={make_teacher(tmp_path / 'teacher')}", "steps=1", "batch=2"]
    assert cli.main(["train", *given, f"--out={tmp_path / 'runs'}", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{run / name} is a link" in said and said.count("\n") == 1
    assert [path.name for path in outside.iterdir()] == [".precious.gone"] and (run / name).is_symlink()


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with lock.held(tmp_path / "run"):
        assert (tmp_path / "disk" / lock.NAME).is_file()
    (tmp_path / "disk" / "best.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"best\.json is a link"), lock.held(tmp_path / "run"):
        pass

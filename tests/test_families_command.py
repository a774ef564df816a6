"""`fewstep families`: every family with what its file says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep import cli, families
from fewstep.core.errors import UserError
from fewstep.models.families import CODECS, FAMILIES

ROWS = {one.name: one.row() for one in families.known()}


def test_every_file_of_the_folder_is_a_family_and_none_is_empty() -> None:
    files = {path.stem for path in Path("fewstep/models/families").glob("*.py")} - {"__init__"}
    assert set(ROWS) == files
    assert {name for one in families.known() for name in one.rows} == set(FAMILIES)
    assert {name for one in families.known() for name in one.codecs} == set(CODECS)
    assert all(one.rows and one.title for one in families.known())


def test_the_lines_are_those_that_are_not_blank() -> None:
    text = Path("fewstep/models/families/wan.py").read_text()
    assert int(ROWS["wan"]["lines"]) == len([line for line in text.splitlines() if line.strip()])
    assert all(10 < int(row["lines"]) <= 150 for row in ROWS.values())


@pytest.mark.parametrize(
    ("name", "column", "said"),
    [
        ("dit", "reads", "labels"),
        ("wan", "makes", "videos"),
        ("wan", "reads", "prompts, 512"),
        ("pixart", "reads", "prompts, 120 or 300"),
        ("stable_diffusion", "pipelines", "StableDiffusionPipeline, StableDiffusionXLPipeline"),
        ("unet2d", "pipelines", "on pixels alone"),
        ("flux", "told", "3.5"),
        ("flux", "times", "even"),
        ("qwen_image", "guidance", "by norm"),
        ("stable_diffusion_3", "guidance", "a line"),
    ],
)
def test_a_row_says_what_its_codec_says(name: str, column: str, said: str) -> None:
    assert ROWS[name][column] == said


def test_the_command_prints_the_table_and_one_family_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == list(ROWS["wan"])
    assert [line.split()[0] for line in table[1 : len(ROWS) + 1]] == list(ROWS)
    assert cli.main(["families", "wan"]) == 0
    told = capsys.readouterr().out
    for part in ("network WanTransformer3DModel", "WanAttnProcessor", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"):
        assert part in told


def test_an_unknown_name_is_answered_with_the_one_that_was_meant() -> None:
    with pytest.raises(UserError, match=r"there is no family 'fluks': did you mean 'flux'\? use one of unet2d, dit"):
        families.describe("fluks")

"""Every cell of the table of families; `tools/family_table.py` prints what they return."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.family_cells import CELLS, REFUSED, SHARDED, Bench, two_processes
from tests.family_runs import FAMILIES
from tools import family_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("table")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> None:
    two_processes(folder, list(FAMILIES))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell(family: str, cell: str, folder: Path) -> None:
    """A number, or the sentence by which a kernel without a GPU is refused."""
    found = CELLS[cell](Bench(family, folder))
    if cell.startswith("attention") and cell.split()[1] in ("flash", "xformers", "flex"):
        assert found.startswith(REFUSED) and "needs a GPU" in found
    else:
        assert float(found) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("cell", SHARDED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_of_two_processes(family: str, cell: str, folder: Path, ranks: None) -> None:
    assert float(SHARDED[cell](Bench(family, folder))) < 1e-4


def test_the_table_that_is_shown_has_every_cell_and_none_failed() -> None:
    shown = json.loads(Path("assets/benchmarks/families.json").read_text())["families"]
    assert set(shown) == set(FAMILIES)
    for family in FAMILIES:
        assert list(shown[family]["cells"]) == [*CELLS, *SHARDED]
        assert not [cell for cell, found in shown[family]["cells"].items() if found.startswith("FAILED")]


def test_the_page_is_made_from_what_stands() -> None:
    stored = json.loads(Path("assets/benchmarks/families.json").read_text())["families"]
    assert family_table.PAGE.read_text() == family_table.page(stored)

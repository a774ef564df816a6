"""The notebook: readable as it is shipped, and its cells run from top to bottom on a run of the built-in world."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewstep import cli

NOTEBOOK = Path(__file__).parents[1] / "tools/notebooks/evaluate_checkpoint.ipynb"
LARGEST = 1_500_000
RUN = re.compile(r'Path\("runs/[^"]*"\)')


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def sources() -> list[str]:
    return ["".join(cell["source"]) for cell in code_cells()]


def play(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell; the value of its last line where that is an expression, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NOTEBOOK.name, "exec"), names)
    return eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names) if last else None


def test_it_is_readable_without_running() -> None:
    assert NOTEBOOK.stat().st_size < LARGEST
    cells = code_cells()
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    printed = "".join("".join(output.get("text", [])) for output in outputs)
    assert "student, 4 steps" in printed and "label_accuracy" in printed and "ConsistencyModelPipeline" in printed


def test_an_absent_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"There is no run folder .*none: set RUN to one that `fewstep train`"):
        play(RUN.sub(f"Path({str(tmp_path / 'none')!r})", sources()[0]), {})


@pytest.mark.slow
def test_its_cells_run(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["batch=4", "evals.every=0", "evals.samples=24", "steps=4", "model.steps=3", "objective.gan_weight=0"]
    given = [*quick, f"model.teacher={tiny_teacher}", "--out", str(tmp_path)]
    assert cli.main(["train", "configs/scenes/dmd2.yaml", *given]) == 0
    (folder,) = tmp_path.iterdir()
    first, *rest = sources()
    names: dict[str, Any] = {}
    assert len(RUN.findall(first)) == 1
    play(RUN.sub(f"Path({str(folder)!r})", first), names)
    names |= {"SAMPLES": 48, "COLUMNS": 6}
    shown = [play(source, names) for source in rest]
    grids = [picture.size for picture in shown if isinstance(picture, Image.Image)]
    assert len(grids) == 4
    # Teacher, teacher at three steps, student; x0 after each of three steps; four ways through noise; each 16 * 5 + 2.
    assert [height for _, height in grids[:3]] == [3 * 82 + 2, 3 * 82 + 2, 4 * 82 + 2]
    assert len(names["believed"]) == 3 and all(value > 0 for value in names["moved"])
    # The last belief is what the student makes.
    assert (names["believed"][-1] - names["rows"]["student"]).abs().max() < 1e-4
    # Both ends of the way are plain samples, and it is walked gradually.
    way = names["along"](0)
    jumps = (way[1:] - way[:-1]).flatten(1).norm(dim=1)
    assert jumps.max() < (way[-1] - way[0]).norm()
    assert len(names["share"]) == 12 and all(value > 0 for value in names["share"].values())
    printed = capsys.readouterr().out
    assert "student, 3 steps" in printed and "page: report.html" in printed
    assert (folder / "export" / "model_index.json").exists()

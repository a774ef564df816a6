"""The page of a run: complete, escaped, without anything from outside, from whatever lies in the folder."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import cli, measure, report
from fewstep.core.errors import UserError
from fewstep.evals.grid import save_grid
from fewstep.report import charts
from fewstep.report.html import Html, joined, tag
from fewstep.report.measures import best
from fewstep.report.versus import names_of
from fewstep.train.rundir import RunDir

NASTY = '<script>alert("x")</script> & "quotes"'


def rare(name: str, share: float, lost: bool) -> dict[str, Any]:
    return {"name": name, "true_share": 0.04, "share": share, "upper": share + 0.001, "lost": lost}


TABLE: dict[str, Any] = {
    "protocol": f"2000 images; {NASTY}",
    "columns": ["frechet", "recall", "rare_kept", "diversity", "passes", "unheard_of"],
    "rows": [
        {"name": "teacher, 50 steps", "frechet": 1.2345, "recall": 0.91234, "rare_kept": "2 / 2", "passes": 50}
        | {"diversity": None, "rare": [rare("texture=striped", 0.0391, False), rare("size=large", 0.0402, False)]},
        {"name": f"student {NASTY}", "frechet": 4.5, "recall": None, "rare_kept": "1 / 2", "passes": 1}
        | {"diversity": 0.5, "rare": [rare("texture=striped", 0.0011, True), rare("size=large", 0.0377, False)]},
    ],
}


def log_row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "seconds": step * 0.5 if step <= 60 else (step - 60) * 0.5,  # resumed after step 60
        "images": step * 32,
        "generator/moves": step // 2,
        "fake_score/moves": step,
        "generator/lr": 1e-4,
        "fake_score/loss": 1.0 / step,
        "fake_score/grad_norm": 3.0 / step,
        **({"generator/loss": 2.0 / step, "gap": 1.0, "x0/mean": 0.0, "x0/std": 0.5} if step % 2 == 0 else {}),
        "gan/accuracy": 0.6,
        "something/<new>": float(step),
    }


def fill(root: Path, *parts: str) -> RunDir:
    """A run folder with some of its parts."""
    folder = RunDir(root)
    root.parent.mkdir(exist_ok=True)
    folder.create()
    images = torch.linspace(-1, 1, 14 * 3 * 4 * 4).reshape(14, 3, 4, 4)
    if "log" in parts:
        (root / "log.jsonl").write_text("".join(json.dumps(log_row(i)) + "\n" for i in range(1, 101)))
    if "evals" in parts:
        rows = [{"step": i, "frechet": 90.0 / i, "samples": 100} for i in (20, 40, 60)]
        (root / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if "table" in parts:
        (root / "table.json").write_text(json.dumps(TABLE))
    if "config" in parts:
        text = f"name: {json.dumps(NASTY)}\nsteps: 100\nobjective: {{name: dmd2}}\n"
        (root / "config.yaml").write_text(text + "model: {teacher: some/where/teacher_a, steps: 2, transition: ode}\n")
    if "origin" in parts:
        origin = {"command": f"fewstep train {NASTY}", "commit": "0123456789abcdef", "hardware": "one <abacus>"}
        (root / "origin.json").write_text(json.dumps(origin))
    if "pairs" in parts:
        models = {"teacher": ("teacher, 50 steps", images), "student": (f"student {NASTY}", -images)}
        measure.save_pairs(root / "comparison", models, [f"prompt {i} {NASTY}" for i in range(14)])
    if "images" in parts:
        save_grid(images, root / "comparison.png", columns=6)
        for step in range(100, 3100, 100):
            save_grid(images.roll(step, -1), folder.samples / f"{step:07d}.png", columns=6)
    return folder


class Page(HTMLParser):
    """Collects what a page has: its text, the attributes that fetch something, and whether its tags balance."""

    VOID = ("meta", "img", "input", "path", "use", "rect")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.images = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        self.images += tag == "img"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)


def page_of(folder: RunDir) -> tuple[str, Page]:
    path = report.write_report(folder)
    assert path == folder.root / "report.html"
    text = path.read_text()
    page = Page(text)
    assert not page.open
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not re.search(r"https?:|@import|url\((?!#)|<link|<iframe", text)
    assert (
        text.count("<script>") == 1 and "<script>alert" not in text and "<new>" not in text and "<abacus>" not in text
    )
    return text, page


def test_a_full_page(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", "log", "evals", "table", "config", "origin", "images", "pairs")
    text, page = page_of(folder)
    words = " ".join(" ".join(page.words).split())
    for said in (
        NASTY,
        "A student of 2 steps, distilled from teacher_a by dmd2.",
        "An image takes 1 pass through the network; its teacher takes 50.",
        "finished after 100 steps",
        "Fréchet distance, lower is better 4.50 teacher, 50 steps: 1.23",
        f"prompt 13 {NASTY}",
        "2 more",
        "50.0 s",  # 30 s, then 20 s after the log's clock began anew
        "3,200",
        "moves, fake score 100",
        "one <abacus>",
        "0123456789ab ",
        "1.23",
        "0.912",
        "4.50",
        "1 / 2",
        "lost 0.11 %",
        "keeps 1 of 2",
        "dashed: teacher, 50 steps",
        "something/<new>",
        "step 3,000",
        "fewstep train",
        "teacher: some/where/teacher_a",
    ):
        assert said in words, said
    assert page.images == 2 * 14 + 24 and text.count(" hidden>") == 23
    assert words.index("4.50") < words.index("prompt 0") < words.index("Result") < words.index("Samples while")
    assert "unheard of" not in words
    for title in ("Result", "Samples while training", "Curves", "Rare attributes"):
        assert f"<h2>{title}</h2>" in text
    # Losses of both players, gap, norms, x0, accuracy, the unknown one, the rate, and one measure.
    assert text.count("<svg") == 9
    clips = re.findall(r'id="([mp][0-9a-f]{10})"', text)
    assert set(re.findall(r"url\(#(\w+)\)", text)) <= set(clips)
    assert set(re.findall(r'href="#(\w+)"', text)) <= set(clips)
    assert "#030401" not in text and "var(--c2)" in text


@pytest.mark.parametrize("parts", [(), ("log",), ("table",), ("images",), ("evals",), ("pairs",), ("config", "origin")])
def test_a_sparse_folder_still_gives_a_page_that_says_what_is_missing(tmp_path: Path, parts: tuple[str, ...]) -> None:
    text, page = page_of(fill(tmp_path / "some_run", *parts))
    assert ("some_run" in page.words) == ("config" not in parts)
    for sentence, pieces in (
        ("no log of training steps", ("log",)),
        ("Nothing was measured here", ("table",)),
        ("no sample grids", ("images",)),
        ("no picture of teacher and student", ("images", "pairs")),
        ("no config.yaml", ("config",)),
    ):
        assert (sentence in text) == (not set(pieces) & set(parts)), sentence
    assert ("<h2>Curves</h2>" in text) == ("log" in parts) and ("<h2>Result</h2>" in text) == ("table" in parts)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", "log", "images", "pairs")
    (folder.root / "table.json").write_text('{"rows": [')
    (folder.root / "origin.json").write_text("[1]")
    (folder.root / "config.yaml").write_text("a: [")
    (folder.samples / "0000100.png").write_bytes(b"no picture")
    (folder.root / "comparison" / "student_03.png").unlink()
    (folder.root / "evals.jsonl").write_bytes(b"\xff\xfe")
    with (folder.root / "log.jsonl").open("a") as file:
        file.write('{"step": 101, "gap": NaN, "generator/loss": Infinity}\n"a"\n{"step": 102')
    text, page = page_of(folder)
    for name in ("table.json", "origin.json", "config.yaml", "samples/0000100.png", "evals.jsonl"):
        assert f"{name} is there but cannot be read" in text
    assert "log.jsonl breaks off: line 103 of 103 cannot be read" in text
    assert "comparison/ misses pictures" in text and page.images == 23 + 1  # the grids, and the whole comparison.png
    (folder.root / "table.json").write_text('{"rows": [1]}')
    assert "table.json is there but cannot be read" in page_of(folder)[0]


def test_large_pictures_are_made_small(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run")
    Image.new("RGB", (1600, 1600)).save(folder.samples / "0000001.png")
    text = report.write_report(folder).read_text()
    assert text.count("data:image/jpeg;base64,") == 1 and len(text) < 60_000


def test_what_is_not_markup_is_escaped() -> None:
    assert tag("p", NASTY) == "<p>&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; &quot;quotes&quot;</p>"
    assert tag("p", tag("b", "<"), class_='"x"', open=True, id=None) == '<p class="&quot;x&quot;" open><b>&lt;</b></p>'
    assert joined(["<", Html("<br>"), ""], " & ") == "&lt; &amp; <br>" and tag("br") == "<br>"
    assert tag("p", f"{Html('<b>')}") == "<p>&lt;b&gt;</p>"  # an f-string is text again


def other(root: Path, **changes: Any) -> RunDir:
    """A second run: another student, the same teacher and protocol, `changes` in its student's row."""
    folder = fill(root, "log", "evals", "config", "pairs", "images")
    teacher, student = TABLE["rows"]
    table = TABLE | {"rows": [teacher | {"images_per_second": 3.0}, student | {"name": "student"} | changes]}
    (root / "table.json").write_text(json.dumps(table))
    text = (root / "config.yaml").read_text().replace("transition: ode", "transition: renoise, added: 1")
    (root / "config.yaml").write_text(text + "batch: 7\n")
    return folder


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    first = fill(tmp_path / "first", "log", "evals", "table", "config", "origin", "pairs")
    second = other(tmp_path / "second", frechet=3.0)
    path = report.write_comparison([first, second], tmp_path / "both.html")
    text = path.read_text()
    page = Page(text)
    words = " ".join(" ".join(page.words).split())
    assert not page.open and "<script>alert" not in text and text.count("<script>") == 1
    # One teacher, two students, the better one marked; one group of three pictures for each noise.
    assert "first against second" in words and words.count("teacher, 50 steps first second") == 1
    assert '<strong title="the best">3.00</strong>' in text and '<strong title="the best">4.50' not in text
    assert page.images == 3 * 14
    assert "model.transition ode renoise" in words and "2 keys that only some of the configs know" in words
    assert "model.added - 1" in words and "batch - 7" in words and "objective.name" not in words
    assert text.count("<svg") >= 9 and "first ends at" in text and "second ends at" in text
    assert "do not compare" not in words


def test_runs_that_do_not_compare_say_so(tmp_path: Path) -> None:
    first = fill(tmp_path / "first", "table", "config", "pairs")
    second = other(tmp_path / "second", frechet=3.0)
    table = json.loads((second.root / "table.json").read_text())
    (second.root / "table.json").write_text(json.dumps(table | {"protocol": "24 images"}))
    save_grid(torch.ones(1, 3, 4, 4), second.root / "comparison" / "teacher_00.png", 1, 1)
    third = fill(tmp_path / "third")
    text = report.write_comparison([first, second, third], tmp_path / "all.html").read_text()
    words = " ".join(" ".join(Page(text).words).split())
    assert "do not compare" in words and "second: 24 images." in words and 'title="the best"' not in text
    assert Page(text).images == 2 * 2 * 14 and "third: There is no log of training steps" in words


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    places = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "b" / "y"]
    found = [report.read(fill(place, "config")) for place in places]
    assert names_of(found) == [str(places[0]), str(places[1]), "y"]
    assert names_of([found[2], found[2]]) == [str(places[2]), f"{places[2]} (2)"]


def test_the_best_of_a_line() -> None:
    assert best("frechet", [3.0, 2.0, None, float("nan")]) == {1} and best("recall", [0.1, 0.5, 0.5]) == {1, 2}
    assert best("diversity", [0.8, 1.1]) == {1} and best("recall", [1.0, 1.0]) == set()
    assert best("samples", [1, 2]) == set() and best("rare_kept", ["1 / 2"]) == set()


def test_the_command_takes_one_run_or_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (str(fill(tmp_path / name, "config").root) for name in ("one", "two"))
    assert cli.main(["report", one, two, "--out", str(tmp_path / "both.html")]) == 0
    assert cli.main(["report", one, "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "both.html").exists() and (tmp_path / "page.html").exists()
    assert cli.main(["report", one, str(tmp_path / "none")]) == 2
    assert "there is no run folder" in capsys.readouterr().err
    assert cli.main(["report", one, two, "--out", str(tmp_path / "no" / "place.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_stages_are_put_one_after_the_other(tmp_path: Path) -> None:
    """The last config with a log counts; steps, images and grids go on from stage to stage."""
    for stage in (2, 10):
        fill(tmp_path / f"stage_{stage}", "log", "images", "evals")
    (tmp_path / "stage_10" / "config.yaml").write_text("name: the tenth\nsteps: 120")
    (tmp_path / "stage_11").mkdir()
    found = report.read(RunDir(tmp_path))
    alone = report.read(RunDir(tmp_path / "stage_2"))
    assert found.before == 100 and len(found.log) == 2 * len(alone.log)
    assert [row["step"] for row in found.log[-3:]] == [100 + row["step"] for row in alone.log[-3:]]
    assert found.log[-1]["images"] == 2 * alone.log[-1]["images"]
    assert found.evals[-1]["step"] == 100 + alone.evals[-1]["step"]
    words = page_of(RunDir(tmp_path))[1].words
    assert "the tenth" in words and any("at step 200 of 220" in word for word in words)
    assert len(found.samples) == len(alone.samples) == 24 and found.samples[0].parts[-3] == "stage_2"
    assert "stage 10, step" in (RunDir(tmp_path).root / "report.html").read_text()


def test_an_unwritable_place(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", "log")
    (folder.root / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        report.write_report(folder)


def test_the_table_as_text() -> None:
    text = report.as_text(TABLE)
    assert text.isascii()
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "measure" and lines[0].endswith("better") and set(lines[1]) == {"-"}
    cells = {line.split()[0]: re.split(r"\s{2,}", line) for line in lines[2:7]}
    assert cells["frechet"] == ["frechet", "1.23", "4.50", "lower"]
    assert cells["recall"] == ["recall", "0.912", "-", "higher"]
    assert cells["diversity"] == ["diversity", "-", "0.500", "near 1"]
    assert cells["rare_kept"] == ["rare_kept", "2 / 2", "1 / 2", "higher"]
    assert "unheard_of" not in text
    ends = {line.index(value) + len(value) for line, value in zip(lines[2:4], ("1.23", "0.912"), strict=True)}
    assert len(ends) == 1
    assert any(line.endswith("has lost: texture=striped") for line in lines)
    assert report.as_text({"protocol": "", "columns": [], "rows": [{"name": "one"}]}).startswith("measure")
    lossy = {"columns": ["frechet"], "rows": [{"name": "é", "frechet": float("nan")}]}
    assert "not finite" in report.as_text(lossy)
    many = [rare(f"a={i}", 0.0, True) for i in range(11)]
    assert report.as_text({"columns": [], "rows": [{"name": "x", "rare": many}]}).endswith("a=7 and 3 more")


def test_curves_keep_their_spikes_and_their_mean() -> None:
    x, y = np.arange(5000.0), np.zeros(5000)
    y[1234] = 7.0
    places, values = charts._thinned(x, y)
    assert len(places) <= 400 and values.max() == 7.0 and (np.diff(places) > 0).all()
    assert np.allclose(charts._smoothed(np.full(100, 3.0)), 3.0)
    line = charts._smoothed(x)
    assert np.allclose(line[200:-200], x[200:-200])


@pytest.mark.parametrize(
    "values", [[1.0], [2.0] * 50, [float("nan")] * 20, [0.0, -1.0], list(np.geomspace(1e-6, 1e3, 99))]
)
def test_charts_of_odd_values(values: list[float]) -> None:
    line = charts.Series("x", list(range(len(values))), values)
    for log in (False, True):
        drawn = charts.chart([line, line], "salt", log=log, level=1.0)
        assert drawn.startswith("<svg viewBox") and drawn.endswith("</svg>") and "http" not in drawn

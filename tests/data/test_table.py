"""A folder that the `datasets` library has saved: which columns are read, which split, and what is said without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import damaged, picture

from fewstep.core.errors import UserError
from fewstep.data.pictures import NO_LABEL, UNREADABLE
from fewstep.data.source import open_source
from fewstep.data.table import TableSource
from tests.faults import files, fuzz
from tests.faults.readers import TABLES, Reader

FILES = [picture(10), picture(20), damaged("truncated.jpg"), picture(40), picture(50)]


def table(**changes: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    columns: dict[str, Any] = {
        "photo": [{"bytes": content, "path": None} for content in FILES],
        "caption": ["one", " two\n discs ", "three", None, "five"],
        "kind": [0, 1, 0, 1, None],
    }
    kinds = {
        "photo": datasets.Image(),
        "caption": datasets.Value("string"),
        "kind": datasets.ClassLabel(names=["cat", "dog"]),
    }
    kept = {name: value for name, value in {**columns, **changes}.items() if value is not None}
    return datasets.Dataset.from_dict(kept, datasets.Features({name: kinds[name] for name in kept}))


def test_images_labels_and_captions(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path)
    source = open_source(str(tmp_path), 8, 1)
    assert isinstance(source, TableSource) and source.labels == ("cat", "dog") and source.size == 3
    assert source.skipped == {UNREADABLE: [tmp_path / "row 2"], NO_LABEL: [tmp_path / "row 4"]}
    reds = ((source.images(torch.arange(3))[:, 0, 4, 4] + 1) * 12.75).round().int().tolist()
    told = {1: ("one", 0), 2: ("two discs", 1), 4: ("dog", 1)}
    said = zip(source.captions(torch.arange(3)), source.label_of(torch.arange(3)).tolist(), strict=True)
    assert sorted(reds) == [1, 2, 4] and list(said) == [told[red] for red in reds]


def test_images_alone(tmp_path: Path) -> None:
    table(caption=None, kind=None).save_to_disk(tmp_path)
    source = open_source(str(tmp_path), 8, 1)
    assert source.size == 4 and source.labels == () and source.captions(torch.arange(4)) == [""] * 4


def test_of_several_splits_the_one_for_training_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(train=table(), test=table()).save_to_disk(tmp_path / "both")
    assert open_source(str(tmp_path / "both"), 8, 1).size == 3
    assert open_source(str(tmp_path / "both" / "test"), 8, 1).size == 3
    datasets.DatasetDict(test=table()).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match=r"has no split named train: name one of its folders, .*one/test$"):
        open_source(str(tmp_path / "one"), 8, 1)


def test_a_table_without_images_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    table(photo=None).save_to_disk(tmp_path / "words")
    with pytest.raises(UserError, match="has no column of images, but caption, kind"):
        open_source(str(tmp_path / "words"), 8, 1)
    (tmp_path / "words" / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be opened by the datasets library"):
        open_source(str(tmp_path / "words"), 8, 1)


@pytest.mark.parametrize("reader", TABLES, ids=lambda reader: reader.name)
def test_whatever_stands_in_a_table_is_read_or_refused(reader: Reader, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    table = fuzz.Fuzzed(reader, tmp_path)
    ends, wrong = table.run(range(2000), [picture(10), table.sound])
    assert wrong == [] and sum(ends.values()) == 2000 and min(ends.values()) > 0
    for i, kind in enumerate(files.KINDS):
        (tmp_path / str(i)).mkdir()
        assert files.attempt(reader, kind, tmp_path / str(i)) is None, kind


def test_a_label_without_a_name_is_refused(tmp_path: Path) -> None:
    table(kind=[0, 1, 0, 1, 1]).save_to_disk(tmp_path)
    described = tmp_path / "dataset_info.json"
    said = json.loads(described.read_text())
    said["features"]["kind"]["names"] = ["cat"]
    described.write_text(json.dumps(said))
    with pytest.raises(UserError, match="row 1 has the label 1, and 1 have names"):
        open_source(str(tmp_path), 8, 1)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"which is not here: pip install 'fewstep\[datasets\]'$"):
        open_source(str(tmp_path), 8, 1)

"""Ten thousand cases over every reader, each read or refused in one sentence; the million is `tools/soak.py fuzz`."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest

from tests.faults import fuzz
from tests.faults.readers import NAMED, READERS

CASES = 10_000


def test_whatever_stands_in_a_file_is_read_or_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends, wrong = fuzz.fuzz(tmp_path, CASES)
    assert wrong == []
    assert sum(sum(counted.values()) for counted in ends.values()) >= CASES * 0.99
    assert ends.keys() == {reader.name for reader in READERS}
    assert sum(counted["refused"] for counted in ends.values()) > CASES / 4 < 2 * sum(e["read"] for e in ends.values())


def test_a_case_is_the_same_every_time(tmp_path: Path) -> None:
    one = fuzz.Fuzzed(NAMED["manifest"], tmp_path)
    others = [one.sound]
    cases = [fuzz.case(one.reader, i, one.sound, others) for i in range(50)]
    assert cases == [fuzz.case(one.reader, i, one.sound, others) for i in range(50)]
    assert len(set(cases)) > 40


@pytest.mark.parametrize(
    "read, sign",
    [
        (lambda folder: (folder / "a.txt").read_text(), "UnicodeDecodeError"),
        (lambda folder: bytes(2**32), "MemoryError"),
        (lambda folder: {}["a"], "KeyError"),
    ],
)
def test_the_harness_sees_what_is_wrong(read: object, sign: str, tmp_path: Path) -> None:
    weak = dataclasses.replace(NAMED["prompts"], read=read)
    wrong = fuzz.Fuzzed(weak, tmp_path).run(range(60), [b"\xff\xfe\x00"])[1]
    assert any(sign in said for said in wrong)

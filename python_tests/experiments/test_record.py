# SPDX-License-Identifier: BSD-3-Clause
import json
import re
from pathlib import Path

import pytest

from ssmkernels.experiments.record import Entry, Plot, Record, read_record, write_record
from ssmkernels.experiments.report import write_report
from ssmkernels.experiments.spec import load_tables

RESULTS = Path(__file__).parents[2] / "docs" / "results"
RECORD = Record(
    name="simmatch-table1",
    title="SimMatch, Table 1: accuracy",
    paper="SimMatch",
    budget="short",
    data="CIFAR-10",
    seeds=(1, 2),
    command="ssmkernels reproduce simmatch-table1 --data DIR --budget short",
    entries=(
        Entry("SimMatch", "40 labels", "top-1", "%", "94.40 ± 1.37", (93.5, 92.25)),
        Entry("FixMatch", "40 labels", "top-1", "%", "-", (), ("out of memory",)),
    ),
    plots=(Plot("curves", "curves.png", "it rises"),),
    deviations=("Smaller network.",),
    notes="| q̂ | 1 |",
    seconds=12.5,
    machine="2 x CPU, no GPU",
    versions={"torch": "2.15.0"},
)


def written(tmp_path, **changes):
    """A record on disk with some of its members replaced, as a hand or another version might have left it."""
    write_record(tmp_path, RECORD)
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))
    return tmp_path


def test_a_record_comes_back_as_it_was(tmp_path):
    write_record(tmp_path / "new" / "folder", RECORD)
    assert read_record(tmp_path / "new" / "folder") == RECORD
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["record.json"]


def test_defaults_need_not_be_there(tmp_path):
    record = read_record(written(tmp_path, plots=[{"title": "t", "file": "f.png"}]))
    assert record.plots == (Plot("t", "f.png"),)


def test_a_crash_while_writing_leaves_the_old_record(tmp_path, monkeypatch):
    write_record(tmp_path, RECORD)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_record(tmp_path, Record(**{**vars(RECORD), "title": "another"}))
    assert read_record(tmp_path) == RECORD


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": [{"row": "x"}]}, "missing 5 required positional arguments: 'column', 'figure'"),
        ({"entries": [7]}, "'int' object has no attribute 'items'"),
        ({"entries": 7}, "'int' object is not iterable"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"record\.json is not a readable record: .*{re.escape(message)}"):
        read_record(written(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b'{"name": "x"', b"\xff\xfe{}", b"[]", b'{"name": "x"}'])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'record.json'} is not a readable record")):
        read_record(tmp_path)


def test_no_file_is_no_record(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path)


def test_the_records_of_this_project_are_read():
    """The older ones were written before entries had seeds and records claims."""
    records = [read_record(path.parent) for path in (RESULTS / "runs").glob("*/record.json")]
    assert len(records) >= 3 and all(any(entry.has_run for entry in record.entries) for record in records)
    assert {True, False} == {bool(record.claims) for record in records}


def test_the_report_of_this_project_is_of_its_records(tmp_path):
    write_report(RESULTS / "runs", tmp_path / "report.html", load_tables())
    of_now = (tmp_path / "report.md").read_text()
    links = re.compile(r"]\([^#)]*/")  # those to pictures depend on where the page lies
    assert links.sub("](", of_now) == links.sub("](", (RESULTS / "report.md").read_text())

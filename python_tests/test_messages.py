# SPDX-License-Identifier: BSD-3-Clause
"""What every command says of a folder that it cannot write to: one line, before any work, that names the option."""

from __future__ import annotations

import importlib

import pytest

from ssmkernels import cli
from ssmkernels._files import WriteError

WRITERS = {
    "demo": (),
    "reproduce": ("mlsn-mnist", "--budget", "smoke"),
    "bench": ("memory", "--quick"),
    "report": ("FOLDER",),
}


@pytest.fixture
def file(tmp_path):
    """Nobody, root neither, can make a folder below a file."""
    path = tmp_path / "file"
    path.write_text("")
    return path


@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_that_cannot_be_written_is_named_with_its_option(command, file, tmp_path, capsys):
    pytest.importorskip(cli.COMMANDS[command].module)
    name = {"bench": "folder/results.json", "report": "folder/report.html"}.get(command, "folder")
    (tmp_path / "records").mkdir()
    arguments = [argument.replace("FOLDER", str(tmp_path / "records")) for argument in WRITERS[command]]
    assert cli.main([command, *arguments, "--out", str(file / name)]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"ssmkernels {command}: {file / 'folder'} cannot be written (Not a directory); ")
    assert printed.err.endswith("give another folder with --out\n")
    assert printed.out == ""


def test_checking_a_folder_leaves_nothing(tmp_path):
    from ssmkernels._files import check_folder

    check_folder(tmp_path / "runs" / "new", "--out")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "runs").mkdir()
    check_folder(tmp_path / "runs" / "new", "--out")
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


def test_a_disk_that_is_full_is_one_line(monkeypatch, capsys):
    module = importlib.import_module("ssmkernels.info")

    def fail(argv):
        raise WriteError(28, "No space left on device", "runs/a/record.json")

    monkeypatch.setattr(module, "main", fail)
    assert cli.main(["info"]) == 1
    message = "ssmkernels info: runs/a/record.json cannot be written: No space left on device"
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_no_markup_and_ends_well(command, capsys):
    module = pytest.importorskip(cli.COMMANDS[command].module)
    try:
        status = module.main(["--help"])
    except SystemExit as stop:
        status = stop.code
    text = capsys.readouterr().out
    assert status == 0 and text.startswith(f"usage: ssmkernels {command}")
    assert "``" not in text and ":func:" not in text and ":class:" not in text

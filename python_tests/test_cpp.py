# SPDX-License-Identifier: BSD-3-Clause
"""examples/cpp is built with find_package(ssmkernels) from the installed package, as a C++ user does, and run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ssmkernels import info

TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def call(*command, **settings):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **settings)


@pytest.mark.skipif(importlib.util.find_spec("cmake") is None, reason="needs the extra dev")
def test_example_project(source_tree, tmp_path, capsys):
    assert info.main(["--cmakedir"]) == 0
    folder = capsys.readouterr().out.strip()
    cmake, ninja = (shutil.which(name, path=TOOLS) for name in ("cmake", "ninja"))
    options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-Dssmkernels_DIR={folder}"]
    for command in (
        [cmake, "-S", source_tree / "examples" / "cpp", "-B", tmp_path, *options],
        [cmake, "--build", tmp_path],
        [tmp_path / "example"],
    ):
        result = call(*command)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "laplacian_solve: " in result.stdout and "instance_matching: " in result.stdout


def test_every_installed_header_is_found_by_its_includes():
    """The headers include one another by relative paths; none may lie outside the folder, or be missing in it."""
    root = info.PACKAGE / "cpp" / "include" / "ssmkernels"
    headers = [*root.rglob("*.h")]
    assert {path.parent.name for path in headers} == {"common", "graph", "memory", "pairs", "ranking"}
    for path in headers:
        for line in path.read_text().splitlines():
            if line.startswith('#include "'):
                assert (path.parent / line.split('"')[1]).resolve() in headers, f"{path.name}: {line}"


def test_message_where_it_was_not_built(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(info, "PACKAGE", tmp_path)
    assert info.main(["--cmakedir"]) == 1
    assert "the kernels for C++ are not there; " in capsys.readouterr().err

# SPDX-License-Identifier: BSD-3-Clause
"""A user's script under mypy and under pyright: it passes, and wrong choices are refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "typing" / "user_script.py"
WRONG = {number for number, line in enumerate(SCRIPT.read_text().splitlines(), 1) if line.endswith("# wrong")}

MYPY = """\
[mypy]
strict = true
ignore_missing_imports = true
follow_imports = silent
"""
# No type of the script is defined there, and it is two thirds of what mypy would read.
UNSEEN = [
    *("torch._dynamo", "torch._inductor", "torch._functorch", "torch._subclasses", "torch._higher_order_ops"),
    *("torch._decomp", "torch._refs", "torch._prims", "torch._prims_common", "torch._export", "torch.export"),
    *("torch.fx", "torch.distributed", "torch.onnx", "torch.ao", "torch.testing", "torch.utils._sympy", "sympy"),
]


def run(*command, root):
    environment = {**os.environ, "PYTHONPATH": str(root), "MYPYPATH": str(root)}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=environment).stdout


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs the extra dev")
def test_mypy(source_tree, tmp_path):
    unseen = ",".join(f"{package}.*" for package in UNSEEN)
    (tmp_path / "mypy.ini").write_text(f"{MYPY}[mypy-{unseen}]\nfollow_imports = skip\n")
    options = [f"--config-file={tmp_path / 'mypy.ini'}", f"--cache-dir={tmp_path}"]
    output = run(sys.executable, "-m", "mypy", *options, SCRIPT, root=source_tree)
    errors = [line for line in output.splitlines() if ": error: " in line]
    assert {int(line.split(":")[1]) for line in errors} == WRONG, output


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("basedpyright") is None, reason="needs the extra dev")
def test_pyright(source_tree, tmp_path):
    """basedpyright: pyright as a wheel that brings its Node; pyright's own fetches it when it is run."""
    settings = {"typeCheckingMode": "standard", "include": [str(SCRIPT)], "extraPaths": [str(source_tree)]}
    project = tmp_path / "pyrightconfig.json"
    project.write_text(json.dumps(settings))
    output = run(
        sys.executable,
        "-m",
        "basedpyright",
        "--outputjson",
        "-p",
        project,
        "--pythonpath",
        sys.executable,
        root=source_tree,
    )
    errors = [entry for entry in json.loads(output)["generalDiagnostics"] if entry["severity"] == "error"]
    assert {entry["range"]["start"]["line"] + 1 for entry in errors} == WRONG, output

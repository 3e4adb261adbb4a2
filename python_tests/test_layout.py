# SPDX-License-Identifier: BSD-3-Clause
"""The rules of the house that a compiler does not check."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess

import pytest

# A room imports only rooms of lower floors; the ground imports no other room at all.
FLOORS = [
    {"data", "models", "metrics", "reference", "distributed", "info"},
    {"_library"},
    {"ops"},
    {"graph"},
    {"nn", "estimators"},
    {"trainers", "bench"},
    {"experiments"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SOURCE_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}
FOREIGN_INCLUDE = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)')
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def imported_rooms(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("ssmkernels."))


def test_kernels_include_neither_torch_nor_python(source_tree):
    files = [path for path in (source_tree / "csrc" / "kernels").rglob("*") if path.suffix in SOURCE_SUFFIXES]
    assert files
    assert not [str(path) for path in files if FOREIGN_INCLUDE.search(path.read_text())]


def test_include_rule_sees_what_it_forbids():
    forbidden = [
        "#include <torch/csrc/stable/tensor.h>",
        '#include "ATen/ATen.h"',
        "# include <Python.h>",
        "#include <c10/util/Half.h>",
    ]
    assert all(FOREIGN_INCLUDE.search(line) for line in forbidden)
    assert not FOREIGN_INCLUDE.search('#include "../common/isa.h"')


def test_rooms_import_only_from_below(source_tree):
    package = source_tree / "ssmkernels"
    wrong = []
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room == "__init__":
            assert not set(imported_rooms(path.read_text())), "ssmkernels/__init__.py imports nothing by itself"
            continue
        rooms = {name for name in imported_rooms(path.read_text()) if not name.startswith("__") and name != room}
        wrong += [
            f"{path.relative_to(source_tree)} imports {name}" for name in rooms if FLOOR_OF[name] >= FLOOR_OF[room]
        ]
    assert not wrong


def test_every_source_is_listed_and_has_a_licence(source_tree):
    cmake = "".join((source_tree / folder / "CMakeLists.txt").read_text() for folder in (".", "csrc/torch"))
    sources = [path for path in (source_tree / "csrc").rglob("*") if path.suffix in SOURCE_SUFFIXES]
    assert not [
        str(path)
        for path in sources
        if path.suffix in {".cpp", ".cu"} and str(path.relative_to(source_tree)) not in cmake
    ]
    scripts = [
        path
        for room in ("ssmkernels", "python_tests", "bench", "docs", "examples")
        for path in (source_tree / room).rglob("*.py")
    ]
    licence = re.compile(r"(//|#) SPDX-License-Identifier: BSD-3-Clause\n")
    assert not [str(path) for path in sources + scripts if not licence.match(path.read_text())]


def test_objects_of_an_instruction_set_share_no_symbol(source_tree):
    """A weak symbol of two sets is kept once, whichever comes first: AVX-512 code could then run on a processor
    without it.
    """
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("binutils are not installed")
    for isa in INSTRUCTION_SETS:
        objects = sorted((source_tree / "build" / "kernels").glob(f"CMakeFiles/kernels_cpu_{isa}.dir/**/*.o"))
        if not objects:
            pytest.skip(f"not built in this source tree for {isa}")
        listing = subprocess.run(
            [nm, "-C", "--defined-only", *map(str, objects)], capture_output=True, text=True, check=True
        ).stdout
        shared = re.findall(r"^[0-9a-f]+ [WVu] (?!DW\.ref)(.*)$", listing, re.MULTILINE)
        assert shared
        foreign = [name for name in shared if f"ssmkernels::{isa}::" not in name]
        assert not foreign, "put it into the namespace of the instruction set, or make it static"

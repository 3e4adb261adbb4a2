# SPDX-License-Identifier: BSD-3-Clause
"""Rules of the source tree that a compiler does not check."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess

import pytest

# A module imports only modules of lower layers; those of the lowest import no other.
LAYERS = [
    {"_files", "_names", "_text"},
    {"_locks", "_plots", "data", "models", "reference", "distributed", "info"},
    {"_library"},
    {"ops"},
    {"metrics"},
    {"graph"},
    {"nn", "estimators"},
    {"trainers", "lightning"},
    {"bench"},
    {"experiments", "finished"},
    {"cli"},
    {"__main__"},
]
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
SOURCE_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}
FOREIGN_INCLUDE = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)')
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def imported_modules(source):
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


def test_modules_import_only_from_lower_layers(source_tree):
    package = source_tree / "ssmkernels"
    wrong = []
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).parts[0].removesuffix(".py")
        if module == "__init__":
            assert not set(imported_modules(path.read_text())), "ssmkernels/__init__.py imports nothing by itself"
            continue
        for name in sorted(set(imported_modules(path.read_text())) - {module, "__version__"}):
            if LAYER_OF[name] >= LAYER_OF[module]:
                wrong.append(f"{path.relative_to(source_tree)} imports {name}")
    assert not wrong


def test_figures_are_drawn_by_one_helper(source_tree):
    """pyplot keeps figures and changes settings for all; a figure's size, resolution and palette are _plots.py's."""
    own = re.compile(r"\bpyplot\b|\bmatplotlib\.(?:use|style|rcParams)|\bfrom matplotlib\.figure import|\bsavefig\b")
    for_types = re.compile(r"^if TYPE_CHECKING:\n(?:    .*\n|\n(?=    ))+", re.MULTILINE)
    wrong = [
        str(path.relative_to(source_tree))
        for folder in ("ssmkernels", "bench", "docs", "examples")
        for path in (source_tree / folder).rglob("*.py")
        if path.name != "_plots.py" and own.search(for_types.sub("", path.read_text()))
    ]
    assert not wrong
    assert own.search("figure.savefig(path)") and own.search("import matplotlib.pyplot as plt")


def test_every_source_is_where_the_build_looks_and_has_a_licence(source_tree):
    sources = [path for path in (source_tree / "csrc").rglob("*") if path.suffix in SOURCE_SUFFIXES]
    compiled = [path.relative_to(source_tree) for path in sources if path.suffix in {".cpp", ".cu"}]
    patterns = re.findall(r"csrc/[\w/*]+\.(?:cpp|cu)\b", (source_tree / "CMakeLists.txt").read_text())
    assert compiled
    assert not [str(path) for path in compiled if not any(path.match(pattern) for pattern in patterns)]
    scripts = [
        path
        for folder in ("ssmkernels", "python_tests", "bench", "docs", "examples")
        for path in (source_tree / folder).rglob("*.py")
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

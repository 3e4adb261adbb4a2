# SPDX-License-Identifier: BSD-3-Clause
"""How much of its error bound each op uses: largest error over bound, which is to stay below one half on every machine.

python bench/margins.py [--seeds 20] [--out docs/internals/margins.md]

Under every instruction set of the kernels with one and two threads, and under the modes of the libraries that torch's
own products come from, each in a process of its own. A kind of processor has its own section in the file that is
written; those of others stay.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ssmkernels import _library, info, ops, reference
from ssmkernels._files import write_atomically
from ssmkernels._text import markdown_table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python_tests/ops"))
from cases import CASES, DTYPES, double  # noqa: E402

ALLOWED = 0.5
MODES = {
    "torch default": {"ATEN_CPU_CAPABILITY": "default"},
    "torch avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "torch avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "oneDNN sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "oneDNN avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "MKL avx2": {"MKL_CBWR": "AVX2"},
    "MKL avx512": {"MKL_CBWR": "AVX512"},
}


def has_lanes_only() -> bool:
    """Whether the avx512 of this build is its lanes in AVX instructions (CMake's SSM_AVX512_LANES)."""
    return any("lanes" in isa for isa in info.collect()["build"]["instruction_sets"])


def columns() -> dict[str, dict[str, str]]:
    """Their environments. Of a build with the lanes of AVX-512 alone, those: the rest is measured with the other
    build.
    """
    isas = ["avx512"] if has_lanes_only() else _library.library().available_isas()
    kernels: dict[str, dict[str, str]] = {f"{isa} × {threads}": {} for isa in isas for threads in (1, 2)}
    return kernels if has_lanes_only() else kernels | modes()


def modes() -> dict[str, dict[str, str]]:
    """Those that this processor and this torch have."""
    wide = "avx512" in _library.library().available_isas()
    mkl = torch.backends.mkl.is_available()
    return {name: mode for name, mode in MODES.items() if (wide or "avx512" not in name) and (mkl or "MKL" not in name)}


def problems(seeds: int) -> Iterator[dict[str, Any]]:
    """Every variant at an odd size with all seeds, and each size once; with the exact results and the bounds."""
    for name, case in CASES.items():
        drawn = [(case.sizes[2], variant, seed) for variant in case.variants for seed in range(seeds)]
        drawn += [(size, case.variants[0], 0) for size in case.sizes]
        for dtype in DTYPES:
            for size, variant, seed in drawn:
                inputs = case.draw(size, dtype, seed, **variant)
                grads = case.grads(inputs, seed)
                exact = case.evaluate(reference, double(inputs), grads)
                bounds = case.bound(inputs, grads or {})
                yield {"case": name, "inputs": inputs, "grads": grads, "exact": exact, "bounds": bounds}


def measure(path: str, column: str) -> dict[str, float]:
    """Largest margin of every "op dtype result"."""
    isa, threads = column.split(" × ") if " × " in column else (None, "1")
    torch.set_num_threads(int(threads))
    if isa:
        _library.library().set_isa(isa)
    margins: dict[str, float] = {}
    for problem in torch.load(path, weights_only=False):
        case = CASES[problem["case"]]
        results = case.evaluate(ops, problem["inputs"], problem["grads"])
        dtype = next(problem["inputs"][name].dtype for name in case.floating(problem["inputs"]))
        for result, margin in case.margins(results, problem["exact"], problem["bounds"]).items():
            key = f"{case.name}|{str(dtype)[6:]}|{result}"
            margins[key] = max(margins.get(key, 0.0), margin)
    return margins


def collect(seeds: int) -> dict[str, dict[str, float]]:
    """Margins of every column, each measured in a process of its own."""
    margins = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "problems.pt")
        torch.save(list(problems(seeds)), path)
        for column, environment in columns().items():
            command = [sys.executable, __file__, "--measure", path, "--column", column]
            done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True)
            margins[column] = json.loads(done.stdout)
            print(f"{column}: largest {max(margins[column].values()):.2f}", file=sys.stderr, flush=True)
    return margins


def section(margins: dict[str, dict[str, float]], seeds: int) -> str:
    """One row per op and result: the largest margin over dtypes in every column."""
    keys = list(next(iter(margins.values())))
    rows: dict[tuple[str, str], list[float]] = {}
    for key in keys:
        op, _, result = key.split("|")
        values = [margins[column][key] for column in margins]
        rows[op, result] = [max(pair) for pair in zip(values, rows.get((op, result), values), strict=True)]
    cells = [[f"`{op}`", result, *(f"{value:.2g}" for value in values)] for (op, result), values in rows.items()]
    model = f"{info.collect()['cpu']['model']} ({info.cpu_kind()})"
    if has_lanes_only():
        model += ", the lanes of AVX-512 in AVX instructions"
    heading = (
        f"torch {torch.__version__}; `python bench/margins.py --seeds {seeds}`; {len(keys)} results × {len(margins)}"
        " columns, the largest"
    )
    heading += (
        f" over float64, float32, bfloat16 and float16: {max(max(by_key.values()) for by_key in margins.values()):.2f}"
    )
    return f"## {model}\n\n{textwrap.fill(heading, 120)}\n\n{markdown_table(['op', 'result', *margins], cells)}\n"


def write(path: Path, text: str) -> None:
    """Puts the section in the place of that of the same processor."""
    title = text.split("\n", 1)[0]
    head, *sections = re.split(r"(?m)^(?=## )", path.read_text())
    kept = [part for part in sections if not part.startswith(title + "\n")]
    write_atomically(path, head + "\n".join(part.rstrip("\n") + "\n" for part in [*kept, text]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--column", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.column)))
        return
    margins = collect(args.seeds)
    text = section(margins, args.seeds)
    print(text)
    if args.out:
        write(args.out, text)
    over = {
        f"{key} ({column})": value for column in margins for key, value in margins[column].items() if value > ALLOWED
    }
    if over:
        sys.exit(f"margins above {ALLOWED}: {over}")


if __name__ == "__main__":
    main()

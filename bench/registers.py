# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA kernels take of a multiprocessor, as ptxas reports it, and how many instructions of some kinds they
have; fails where one spills registers on sm_90. `make registers` builds and runs it:

    cmake -G Ninja -S . -B build/registers -DSSM_CUDA=ON -DSSM_PTXAS_VERBOSE=ON -DCMAKE_CUDA_ARCHITECTURES=90
    cmake --build build/registers --target kernels_cuda --clean-first >build/registers/ptxas.log 2>&1
    python bench/registers.py build/registers/ptxas.log [--objects build/registers] \
      [--out bench/results/sm_90-registers.md]

Spilled bytes are stores/loads; shared memory is what is not given at launch. The counts are of the machine code as it
stands, not of what runs: a loop's body counts once. They take cuobjdump.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ssmkernels._files import write_atomically

INSTRUCTIONS = {
    "HMMA": "HMMA",
    "LDSM": "LDSM",
    "LDGSTS": "cp.async",
    "FFMA": "FFMA",
    "DFMA": "DFMA",
    "LDL": "LDL",
    "STL": "STL",
}
DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "Tf32Engine": "tf32", "double": "float64", "float": "float32"}
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")
FUNCTION = re.compile(r"Function : (\w+)")
ARCHITECTURE = re.compile(r"arch = (sm_\w+)")
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{ *)?(?:@!?U?P\w+ +)?([A-Z][A-Z0-9]*)")


@dataclass
class Kernel:
    symbol: str
    architecture: str
    stack: int = 0
    stores: int = 0
    loads: int = 0
    registers: int = 0
    shared: int = 0


def read_log(lines: Iterator[str]) -> Iterator[Kernel]:
    kernel = None
    for line in lines:
        if entry := ENTRY.search(line):
            kernel = Kernel(entry[1], entry[2])
        elif kernel and (spills := SPILLS.search(line)):
            kernel.stack, kernel.stores, kernel.loads = (int(count) for count in spills.groups())
        elif kernel and (used := USED.search(line)):
            kernel.registers, kernel.shared = int(used[1]), int(used[2] or 0)
            yield kernel
            kernel = None


def instruction_counts(folder: Path) -> dict[tuple[str, str], Counter[str]]:
    """By symbol and architecture, of the object files below `folder`."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for path in sorted(folder.rglob("*.cu.o")):
        sass = subprocess.run(["cuobjdump", "-sass", str(path)], check=True, capture_output=True, text=True).stdout
        architecture, count = "", Counter[str]()
        for line in sass.splitlines():
            if match := ARCHITECTURE.search(line):
                architecture = match[1]
            elif match := FUNCTION.search(line):
                count = counts[match[1], architecture] = Counter()
            elif match := OPCODE.match(line):
                count[match[1]] += 1
    return counts


def demangled(symbols: list[str]) -> list[str]:
    names = subprocess.run(
        ["c++filt", "-p"], input="\n".join(symbols), check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [re.sub(r"\(anonymous namespace\)::|\w+::|(?<=>) (?=>)", "", name) for name in names]


def dtype_of(name: str) -> str:
    return next((dtype for word, dtype in DTYPES.items() if re.search(rf"\b{word}\b", name)), "")


def markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * 3 + ["---:"] * (len(titles) - 3), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="output of the build")
    parser.add_argument("--objects", type=Path, help="build folder, to count instructions")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with args.log.open() as lines:
        kernels = list(read_log(lines))
    if not kernels:
        parser.error(f"{args.log} has no report of ptxas: build with -DSSM_PTXAS_VERBOSE=ON, from the start")
    counts = instruction_counts(args.objects) if args.objects else {}
    names = demangled([kernel.symbol for kernel in kernels])
    table: dict[tuple[str, ...], list[str]] = {}  # a kernel of several files once
    spilling = []
    for name, kernel in sorted(zip(names, kernels, strict=True), key=lambda pair: pair[0]):
        count = counts.get((kernel.symbol, kernel.architecture), Counter())
        columns = [str(kernel.registers), str(kernel.shared), str(kernel.stack), f"{kernel.stores}/{kernel.loads}"]
        columns += [str(count[opcode]) for opcode in INSTRUCTIONS] if args.objects else []
        table[name, dtype_of(name), kernel.architecture] = columns
        if kernel.architecture == "sm_90" and kernel.stores + kernel.loads > 0:
            spilling.append(f"{name} spills {kernel.stores} bytes of registers and loads {kernel.loads}")
    titles = ["kernel", "dtype", "architecture", "registers", "static shared bytes", "stack bytes", "spilled bytes"]
    titles += list(INSTRUCTIONS.values()) if args.objects else []
    text = markdown_table(titles, [[f"`{key[0]}`", *key[1:], *columns] for key, columns in table.items()])
    print(text)
    if args.out:
        version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[
            -2
        ]
        write_atomically(args.out, f"{version}; `python bench/registers.py {' '.join(sys.argv[1:])}`\n\n{text}\n")
    print("\n".join(spilling) or f"{len(table)} kernels, none spills on sm_90", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())

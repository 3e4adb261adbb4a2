# SPDX-License-Identifier: BSD-3-Clause
"""What the CPU kernels gain from wider vectors: each op with every instruction set that this processor runs, in turn in
one process.

python bench/instruction_sets.py [--seconds 4] [--out bench/results/cpu-instruction-sets.md]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from ssmkernels import _library, info
from ssmkernels._files import write_atomically
from ssmkernels._text import markdown_table
from ssmkernels.bench import graph, memory, pairs, ranking
from ssmkernels.bench.case import Case
from ssmkernels.bench.measure import Function, time_alternating
from ssmkernels.graph import label_propagation


def cases() -> Iterator[Case]:
    cpu, real = "cpu", torch.float32
    yield from (case for case in memory.cases_of_size(64, 12_800, 100, cpu, real) if case.op != "memory_update_")
    for classes in (10, 100):
        points = graph.clustered(5000, classes)
        propagated = label_propagation(points.graph, points.labels).to(real)
        for backward in (False, True):
            yield graph.edges_case(points.graph.to(real), propagated, backward=backward, peers=False)
    yield graph.short_solve_case(points.graph.to(real), points.labels)
    for interaction in ("concat", "absdiff"):
        yield pairs.case_of_size(interaction, 256, 128, None, cpu, real)
    for margin in (ranking.MARGIN, ranking.ALL_ACTIVE_MARGIN):
        yield ranking.loss_case(1024, 128, margin, "forward + backward", cpu, real)
    yield ranking.mined_case(512, 128, cpu, real)
    yield ranking.moments_case(1024, 128, cpu, real)


def under(name: str, function: Function) -> Function:
    def run() -> object:
        _library.library().set_isa(name)
        return function()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names = _library.library().available_isas()
    rows = []
    for case in cases():
        timings = time_alternating({name: under(name, case.ours) for name in names}, seconds=args.seconds)
        best = timings[names[-1]].median
        size = " ".join(f"{key}={value:,}" for key, value in case.size.items())
        rows.append(
            [
                f"`{case.op}`",
                case.phase,
                size,
                f"{1e3 * best:.2f}",
                *(f"{timings[name].median / best:.2f}" for name in names[:-1]),
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    machine = info.collect()
    heading = f"{machine['cpu']['processors']} cores of an {machine['cpu']['model']}, torch {torch.__version__}; "
    heading += (
        f"`python bench/instruction_sets.py --seconds {args.seconds:g}`; medians, times of the narrower sets over that"
        " of the widest"
    )
    titles = ["op", "phase", "size", f"{names[-1]}, ms", *(f"{name}, ×" for name in names[:-1])]
    text = f"{heading}\n\n{markdown_table(titles, rows)}\n"
    print(text)
    if args.out:
        write_atomically(args.out, text)


if __name__ == "__main__":
    main()

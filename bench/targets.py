# SPDX-License-Identifier: BSD-3-Clause
"""The project's targets on a CPU: medians of several runs of `ssmkernels bench`'s cases, beside what they should be.

python bench/targets.py [--runs 3] [--op leave_one_edge_out] [--out bench/results/cpu-targets.md]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from ssmkernels import info
from ssmkernels._files import write_atomically
from ssmkernels._text import markdown_table
from ssmkernels.bench import graph, memory, pairs, ranking
from ssmkernels.bench.case import Case, Result, run
from ssmkernels.bench.measure import device_rates
from ssmkernels.graph import label_propagation

PML = "pytorch-metric-learning"
PRODUCTS = "÷ its matrix products"
Target = tuple[str, float]
"""What is compared with, and the least ratio, or for PRODUCTS the most."""


def cases() -> Iterator[tuple[str, Case, list[Target]]]:
    cpu, real = "cpu", torch.float32
    split = [("split, torch.compile", 6.0), ("torch.compile", 6.0), ("eager", 100.0)]
    yield (
        "pair_focal_loss, concat, n = m = 1,024, h = 128",
        pairs.case_of_size("concat", 1024, 128, None, cpu, real),
        split,
    )
    small = [("split, torch.compile", 4.0), ("torch.compile", 4.0)]
    yield (
        "pair_focal_loss, concat, n = m = 128, h = 128",
        pairs.case_of_size("concat", 128, 128, None, cpu, real),
        small,
    )
    for classes, targets in (
        (100, [("eager", 100.0), ("torch.compile", 12.0)]),
        (10, [("eager", 60.0), ("torch.compile", 8.0)]),
    ):
        points = graph.clustered(10_000, classes)
        propagated = label_propagation(points.graph, points.labels).to(real)
        case = graph.edges_case(points.graph.to(real), propagated, backward=False)
        yield f"leave_one_edge_out, N = 10,000, k = 50, C = {classes}", case, targets
    matching = next(memory.cases_of_size(320, 128_000, 1000, cpu, real))
    yield "instance_matching, 320 × 128,000, D = 128, L = 1,000", matching, [(PRODUCTS, 1.4)]
    for rows, dim, least in ((4096, 64, 5.0), (4096, 128, 3.5), (4096, 512, 2.0)):
        for margin, which in ((ranking.MARGIN, "few pairs active"), (ranking.ALL_ACTIVE_MARGIN, "all pairs active")):
            case = ranking.loss_case(rows, dim, margin, "forward + backward", cpu, real)
            yield f"pair_ranking_loss, n = {rows:,}, d = {dim}, {which}", case, [(PML, least), (PRODUCTS, 1.25)]
    yield (
        "pair_ranking_loss, n = 256, d = 128",
        ranking.loss_case(256, 128, ranking.MARGIN, "", cpu, real),
        [(PML, 3.0)],
    )


def figure(result: Result, which: str) -> float:
    if which == PRODUCTS:
        assert result.products is not None
        return result.ours.median / result.products.median
    return result.ratio(which)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--op", help="only this one")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rates = device_rates("cpu", {"float32": torch.float32})
    rows = []
    for title, case, targets in cases():
        if args.op not in (None, case.op):
            continue
        torch.compiler.reset()
        wanted = {name for name, _ in targets}
        case = dataclasses.replace(case, peers={name: peer for name, peer in case.peers.items() if name in wanted})
        measure = functools.partial(
            run, case, device="cpu", rates=rates, seconds=args.seconds, say=functools.partial(print, flush=True)
        )
        results = [measure() for _ in range(args.runs)]
        for which, bar in targets:
            values = [figure(result, which) for result in results]
            median = statistics.median(values)
            most = which == PRODUCTS
            met = median <= bar if most else median >= bar
            sign, digits = ("≤" if most else "≥"), (2 if most else 1)
            rows.append(
                [
                    title,
                    which if most else f"× {which}",
                    f"{sign} {bar:g}",
                    f"**{median:.{digits}f}**",
                    ", ".join(f"{value:.{digits}f}" for value in values),
                    "met" if met else "**not met**",
                ]
            )
    machine = info.collect()
    heading = f"{machine['cpu']['processors']} cores of an {machine['cpu']['model']}, torch {torch.__version__}; "
    heading += f"`python bench/targets.py --runs {args.runs}{f' --op {args.op}' if args.op else ''}`"
    text = f"{heading}\n\n{markdown_table(['case', 'against', 'target', 'median', 'runs', ''], rows)}\n"
    print(text)
    if args.out:
        write_atomically(args.out, text)


if __name__ == "__main__":
    main()

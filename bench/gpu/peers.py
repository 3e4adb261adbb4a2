# SPDX-License-Identifier: BSD-3-Clause
"""Each op at its main size in turn with each of its peers, as users call them; torch.compile for one case a family."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch

from bench.gpu.main_sizes import cases
from bench.gpu.rows import Rows, arguments
from ssmkernels.bench.case import Case, run
from ssmkernels.bench.measure import Rates

ROW_SECONDS = 40
SECONDS = {"cuda": 0.3, "cpu": 0.0}  # of measuring a row
DTYPES = (torch.bfloat16, torch.float32)
ON_THE_CPU = {"scipy cg", "GraphLearning"}
COMPILED = {"instance_matching", "pair_focal_loss", "pair_ranking_loss", "leave_one_edge_out"}


def measure(case: Case, peer: str, device: str) -> dict[str, Any]:
    alone = dataclasses.replace(case, peers={peer: case.peers[peer]}, products={}, product_counts={})
    rates = Rates(float("inf"), {})  # of the step before; floors are there
    return dataclasses.asdict(run(alone, device=device, rates=rates, seconds=SECONDS[device], say=lambda line: None))


def show(row: Mapping[str, Any]) -> str:
    ((_, peer),) = row["peers"].items()
    theirs, ours = peer["median"], row["ours"]["median"]
    return f"{1e3 * theirs:.3f} ms, ours {1e3 * ours:.3f} ms, {theirs / ours:.1f} times"


def measure_all(rows: Rows, device: str) -> None:
    compiled: dict[str, Case] = {}
    for family, case in cases(rows, device, DTYPES):
        for peer in sorted(set(case.peers) - ON_THE_CPU):
            if "torch.compile" not in peer:
                rows.run(f"{case.label()}: {peer}", lambda case=case, peer=peer: measure(case, peer, device), show)
        if case.op in COMPILED and "torch.compile" in case.peers:
            compiled.setdefault(family, case)
    for case in compiled.values():  # last: each takes seconds to compile
        rows.run(f"{case.label()}: torch.compile", lambda case=case: measure(case, "torch.compile", device), show)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv, "The ops in turn with their peers.")
    rows = Rows(args.out, ROW_SECONDS)
    with torch.compiler.set_stance("default" if args.device == "cuda" else "force_eager"):
        measure_all(rows, args.device)
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())

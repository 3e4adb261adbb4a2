# SPDX-License-Identifier: BSD-3-Clause
"""Every op in every dtype, forward and backward, beside the reference in float64 on the CPU: how much of its bound it
uses.

The cases and bounds are those of the tests (python_tests/ops/cases.py).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from bench.gpu.rows import Rows, arguments
from bench.gpu.steps import ROOT
from ssmkernels import ops, reference

sys.path.insert(0, str(ROOT / "python_tests/ops"))
from cases import CASES, DTYPES, Case, double, to

ROW_SECONDS = 20


def problems(case: Case) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Every variant at one odd size, and one more size."""
    return [*((case.sizes[2], variant) for variant in case.variants), (case.sizes[3], case.variants[0])]


def check(case: Case, dtype: torch.dtype, device: str, *, backward: bool) -> dict[str, Any]:
    """The largest error over its bound of the outputs, or of the gradients."""
    worst, name = 0.0, "nothing"
    for size, variant in problems(case):
        inputs = case.draw(size, dtype, **variant)
        grads = case.grads(inputs) if backward else None
        results = case.evaluate(ops, to(inputs, device), grads and to(grads, device))
        exact = case.evaluate(reference, double(inputs), grads)
        results = {name: value.cpu() for name, value in results.items() if name.startswith("grad ") == backward}
        for result, margin in case.margins(results, exact, case.bound(inputs, grads or {})).items():
            if margin >= worst:
                worst, name = margin, result
    return {"state": "passed" if worst <= 1 else "failed", "share_of_bound": worst, "of": name}


def show(row: Mapping[str, Any]) -> str:
    return f"{row['share_of_bound']:.2g} of its bound ({row['of']})"


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv, "Every op beside float64.")
    rows = Rows(args.out, ROW_SECONDS)
    for case in CASES.values():
        for dtype in DTYPES:
            for phase in ("forward", "backward") if case.differentiable else ("forward",):
                label = f"{case.name} {str(dtype).removeprefix('torch.')} {phase}"
                rows.run(label, partial(check, case, dtype, args.device, backward=phase == "backward"), show)
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())

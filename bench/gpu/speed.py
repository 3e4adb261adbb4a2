# SPDX-License-Identifier: BSD-3-Clause
"""What the device reaches in copies and matrix products, then each op at its main size as a CUDA graph."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch

from bench.gpu.device import Cuda, StandIn, device_of, time_call
from bench.gpu.main_sizes import cases
from bench.gpu.rows import Rows, arguments
from ssmkernels.bench.case import Case
from ssmkernels.bench.measure import Rates, device_rates

ROW_SECONDS = 20
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def measure(case: Case, device: Cuda | StandIn, rates: Rates) -> dict[str, Any]:
    timed = time_call(device, case.ours)
    products = case.flops / rates.matmul.get(str(case.dtype).removeprefix("torch."), float("inf"))
    floor = max(case.bytes / rates.copy, products)
    return dataclasses.asdict(timed) | {"floor": floor, "bytes": case.bytes, "flops": case.flops}


def show(row: Mapping[str, Any]) -> str:
    share = 100 * row["floor"] / row["cold"]
    return f"{1e6 * row['cold']:.1f} us, {1e6 * row['warm']:.1f} warm; the floor is {share:.0f} %"


def show_rates(row: Mapping[str, Any]) -> str:
    return f"copy {row['copy'] / 1e9:.0f} GB/s, products " + ", ".join(
        f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in row["matmul"].items()
    )


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv, "The device's rates, and the ops as CUDA graphs.")
    rows = Rows(args.out, ROW_SECONDS)
    measured = DTYPES if args.device == "cuda" else (torch.float32,)  # a CPU takes its time for products of half types
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in measured}
    rows.run("rates", lambda: dataclasses.asdict(device_rates(args.device, dtypes)), show_rates)
    measured_rates = rows.rows["rates"]
    rates = Rates(measured_rates.get("copy", float("inf")), measured_rates.get("matmul", {}))
    device = device_of(args.device)
    for _, case in cases(rows, args.device, DTYPES):
        rows.run(case.label(), lambda case=case: measure(case, device, rates), show)
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())

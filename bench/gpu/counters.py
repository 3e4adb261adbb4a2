# SPDX-License-Identifier: BSD-3-Clause
"""Nsight Compute's counters of the main kernels at the main sizes: shares of the memory, L2, tensor and issue rates.

python -m bench.gpu.counters --out FILE.json          # runs ncu on itself
python -m bench.gpu.counters --out FILE.json --calls  # what ncu watches: each op once
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.main_sizes import FAMILIES
from bench.gpu.rows import Rows, arguments

ROW_SECONDS = 45
KERNELS = (
    "sweep",
    "sweep_concat",
    "sweep_interaction",
    "sweep_large_loss",
    "sweep_gradient",
    "solve_laplacian",
    "compute_pairs",
)
ELAPSED, ACTIVE = ".avg.pct_of_peak_sustained_elapsed", ".avg.pct_of_peak_sustained_active"
METRICS = {  # as a row names them
    "nanoseconds": "gpu__time_duration.sum",
    "memory %": f"dram__throughput{ELAPSED}",
    "L2 %": f"lts__throughput{ELAPSED}",
    "issue %": f"smsp__issue_active{ACTIVE}",
    "tensor %": f"sm__pipe_tensor_cycles_active{ACTIVE}",
    "tensor instructions %": f"sm__inst_executed_pipe_tensor{ACTIVE}",  # the two are not on every chip
}
MAIN_DTYPE = {"memory": torch.bfloat16, "pairs": torch.bfloat16, "ranking": torch.bfloat16, "graph": torch.float32}


def available(listing: str) -> dict[str, str]:
    """Those of METRICS that ``ncu --query-metrics`` lists: one that the chip lacks would end the run."""
    names = {line.split()[0] for line in listing.splitlines() if line.strip()}
    return {title: metric for title, metric in METRICS.items() if metric.split(".")[0] in names}


def ncu_command(metrics: Iterable[str], log: Path, calls: list[str]) -> list[str]:
    """The card's clocks are left as they are."""
    command = [
        "ncu",
        "--clock-control",
        "none",
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
        "--log-file",
        str(log),
    ]
    return [*command, "--metrics", ",".join(metrics), "--kernel-name", f"regex:^({'|'.join(KERNELS)})$", *calls]


def parse(text: str, metrics: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of ncu's raw page: a line of titles, one of units, then one a launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches = list(csv.DictReader(io.StringIO("\n".join(lines))))[1:]
    rows = []
    for launch in launches:
        counted = {title: _number(launch.get(metric)) for title, metric in metrics.items()}
        rows.append({"kernel": launch["Kernel Name"], **counted})
    return rows


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def call_each_op(device: str) -> None:
    for family, build in FAMILIES.items():
        for case in build(device, MAIN_DTYPE[family]):
            try:
                case.ours()
            except RuntimeError as error:
                print(f"{case.label()}: {error}", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def profile(log: Path, calls: list[str]) -> dict[str, Any]:
    """What ncu counts in each launch. Its own file stays beside the results."""
    if shutil.which("ncu") is None:
        raise FileNotFoundError("ncu is not on PATH")
    metrics = available(_run(["ncu", "--query-metrics"]).stdout)
    log.unlink(missing_ok=True)
    result = _run(ncu_command(metrics.values(), log, calls))
    text = log.read_text() if log.exists() else ""
    launches = parse(text, metrics)
    if not launches:
        output = (text + result.stdout + result.stderr)[-1500:]
        raise RuntimeError(f"ncu gave no launch (exit {result.returncode}): {output}")
    return {
        "launches": launches,
        "missing": sorted(set(METRICS) - set(metrics)),
        "kernels without launch": _without(launches),
    }


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _without(launches: list[dict[str, Any]]) -> list[str]:
    seen = {name for launch in launches for name in re.findall(r"\w+", launch["kernel"])}
    return [kernel for kernel in KERNELS if kernel not in seen]


def main(argv: list[str] | None = None, call: Callable[[str], None] = call_each_op) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "--calls" in argv:
        call(arguments([argument for argument in argv if argument != "--calls"], "Calls each op once.").device)
        return 0
    args = arguments(argv, "Counters of the main kernels.")
    rows = Rows(args.out, ROW_SECONDS)
    if args.device == "cpu":
        rows.run("calls", lambda: call("cpu") or {})  # type: ignore[func-returns-value]
        return rows.finish()
    calls = [sys.executable, "-m", "bench.gpu.counters", *argv, "--calls"]
    log = args.out.with_suffix(".csv")
    rows.run("launches", lambda: profile(log, calls), lambda row: f"{len(row['launches'])} launches")
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())

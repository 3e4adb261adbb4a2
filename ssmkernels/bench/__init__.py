# SPDX-License-Identifier: BSD-3-Clause
"""``ssmkernels bench [FAMILY …]``: every op beside its peers and its floor, as a table, JSON and plots."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmkernels.bench.case import Result
    from ssmkernels.bench.measure import Rates

FAMILIES = ("memory", "graph", "pairs", "ranking")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ssmkernels bench", description="Measure the ops beside their peers.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"which of: {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--op", metavar="NAME", help="only this op of the families")
    parser.add_argument("--quick", action="store_true", help="a few small sizes, seconds instead of minutes")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="time for one case and its peers (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="results; a table and a plot go beside it (default: runs/bench/DEVICE.json)"
    )
    args = parser.parse_args(argv)
    unknown = [family for family in args.families if family not in FAMILIES]
    if unknown:
        parser.error(f"unknown family {unknown[0]!r}; there is {', '.join(FAMILIES)}")

    import torch

    from ssmkernels.bench import case, graph, measure, memory, pairs, ranking, report

    rooms = {"memory": memory, "graph": graph, "pairs": pairs, "ranking": ranking}

    if args.device == "cuda" and not torch.cuda.is_available():
        print("ssmkernels bench: --device cuda, but torch sees no CUDA device; `ssmkernels info` says why", file=sys.stderr)
        return 1
    dtype, out = getattr(torch, args.dtype), args.out or Path(f"runs/bench/{args.device}.json")
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} CPU threads, {args.dtype}; times are medians", flush=True)
    rates = measure.device_rates(args.device, {args.dtype: dtype})
    print(f"copy {rates.copy / 1e9:.0f} GB/s, matrix product {rates.matmul[args.dtype] / 1e9:.0f} GFLOP/s", flush=True)
    results: list[case.Result] = []
    try:
        for family in args.families or FAMILIES:
            for each in rooms[family].cases(device=args.device, dtype=dtype, quick=args.quick):
                if args.op not in (None, each.op):
                    continue
                torch.compiler.reset()  # every size is compiled for itself, as its user would have it
                results.append(
                    case.run(each, device=args.device, rates=rates, seconds=args.seconds, say=functools.partial(print, flush=True))
                )
                _write(out, _document(args, argv, rates, results))
    except KeyboardInterrupt:
        print("stopped; what was measured so far:", file=sys.stderr)
    if not results:
        print(
            "ssmkernels bench: nothing was measured" + (f"; no case of these families is of {args.op!r}" if args.op else ""),
            file=sys.stderr,
        )
        return 1
    print("\n" + report.table(results))
    out.with_suffix(".md").write_text(report.table(results) + "\n")
    plots = report.plot(results, out)
    print(f"\nwrote {', '.join([str(out), out.with_suffix('.md').name, *plots])}")
    return 0


def _write(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all: an interrupted run leaves the cases it finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    unfinished.replace(path)


def _document(args: argparse.Namespace, argv: list[str] | None, rates: Rates, results: list[Result]) -> dict[str, Any]:
    from ssmkernels import info

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = info.collect()
    return {
        "command": " ".join(["ssmkernels bench", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit or None,
        "device": args.device,
        "versions": {"ssmkernels": machine["ssmkernels"]["version"], "python": machine["python"]["version"], **machine["packages"]},
        "machine": {key: machine[key] for key in ("cpu", "cuda", "torch", "build")},
        "rates": dataclasses.asdict(rates),
        "results": [dataclasses.asdict(result) for result in results],
    }

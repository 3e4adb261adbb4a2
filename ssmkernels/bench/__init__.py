# SPDX-License-Identifier: BSD-3-Clause
"""``ssmkernels bench [FAMILY …]``: every op beside its peers and its floor, as a table, JSON and plots."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmkernels import _names, info
from ssmkernels._files import check_folder, write_atomically

if TYPE_CHECKING:
    from ssmkernels.bench.case import Result
    from ssmkernels.bench.measure import Rates

    Measured = tuple[Rates, dict[str, list[Result]]]

STORED = Path("bench/results")
"""Where each kind of processor has its table of each family."""

FAMILIES = ("memory", "graph", "neighbours", "pairs", "ranking", "overhead", "training", "growth")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ssmkernels bench", description="Measure the ops beside their peers.")
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"which of: {', '.join(FAMILIES)} (default: all, a process each)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--op", metavar="NAME", help="only this op of the families")
    parser.add_argument("--quick", action="store_true", help="a few small sizes, seconds instead of minutes")
    parser.add_argument(
        "--seconds", type=float, default=4.0, metavar="S", help="time for one case and its peers (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="results; a table and plots go beside it (default: runs/bench/DEVICE.json)",
    )
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="say how much each case got slower since these results"
    )
    parser.add_argument(
        "--fail-if-slower",
        type=float,
        metavar="RATIO",
        help="exit with 3 if a time over its floor grew by more than this; without --compare since the tables of this"
        f" kind of processor in {STORED}, and one that is not there is made",
    )
    args = parser.parse_args(argv)
    unknown = [family for family in args.families if family not in FAMILIES]
    if unknown:
        parser.error(_names.unknown(f"there is no family {unknown[0]!r}", unknown[0], FAMILIES))
    if args.fail_if_slower is not None and not args.fail_if_slower > 0:
        parser.error(f"--fail-if-slower has to be a positive ratio, not {args.fail_if_slower}")
    guarded = args.fail_if_slower is not None and args.compare is None
    if guarded and args.device != "cpu":
        parser.error("--fail-if-slower needs --compare on cuda: tables are kept of processors only")
    if args.compare is not None and not args.compare.is_file():
        parser.error(f"--compare: there is no file {args.compare}")

    import torch

    from ssmkernels.bench import plots, report

    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "ssmkernels bench: --device cuda, but torch sees no CUDA device; `ssmkernels info` says why",
            file=sys.stderr,
        )
        return 1
    out = args.out or Path(f"runs/bench/{args.device}.json")
    try:
        check_folder(out.parent, "--out")
    except ValueError as error:
        print(f"ssmkernels bench: {error}", file=sys.stderr)
        return 1
    stored = {}
    if guarded:
        stored = {family: STORED / f"cpu-{info.cpu_kind()}-{family}.json" for family in args.families or FAMILIES}
    tables = [args.compare] if args.compare else [table for table in stored.values() if table.is_file()]
    before = [result for table in tables for result in _read(table)[1]]  # it may be the file that is written
    if len(args.families) == 1:
        rates, measured = _measure(args, argv, out)
    else:
        rates, measured = _measure_apart(args, argv, out)
    results = _all(measured)
    if not results:
        print(
            "ssmkernels bench: nothing was measured"
            + (f"; no case of these families is of {args.op!r}" if args.op else ""),
            file=sys.stderr,
        )
        return 1
    text = report.text(results)
    print("\n" + text)
    write_atomically(out.with_suffix(".md"), text + "\n")
    names = plots.plot(results, out, rates, plots.measured_on(_document(args, argv, rates, results)))
    print(f"\nwrote {', '.join([str(out), out.with_suffix('.md').name, *names])}")
    for family, table in stored.items():
        _add_missing(table, _document(args, argv, rates, measured.get(family, [])))
    if not before:
        return 0
    changes = report.compare(results, before)
    print("\n" + report.comparison_table(changes))
    slower = [
        label for label, change in changes.items() if args.fail_if_slower is not None and change > args.fail_if_slower
    ]
    if slower:
        print(
            f"ssmkernels bench: {len(slower)} of {len(changes)} cases got slower by more than {args.fail_if_slower}",
            file=sys.stderr,
        )
    return 3 if slower else 0


def _measure(args: argparse.Namespace, argv: list[str] | None, out: Path) -> Measured:
    """One family in this process."""
    import torch

    from ssmkernels.bench import case, measure

    (family,) = args.families
    module = importlib.import_module(f"ssmkernels.bench.{family}")  # that of training takes trainers with it
    dtype = getattr(torch, args.dtype)
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} CPU threads, {args.dtype}; times are"
        " medians",
        flush=True,
    )
    rates = measure.device_rates(args.device, {args.dtype: dtype})
    print(f"copy {rates.copy / 1e9:.0f} GB/s, matrix product {rates.matmul[args.dtype] / 1e9:.0f} GFLOP/s", flush=True)
    results: list[Result] = []
    try:
        for op_case in module.cases(device=args.device, dtype=dtype, quick=args.quick):
            if args.op not in (None, op_case.op):
                continue
            torch.compiler.reset()  # every size is compiled for itself, as its user would have it
            results.append(
                case.run(
                    op_case,
                    device=args.device,
                    rates=rates,
                    seconds=args.seconds,
                    say=functools.partial(print, flush=True),
                )
            )
            _write(out, _document(args, argv, rates, results))
    except KeyboardInterrupt:
        print("stopped; what was measured so far:", file=sys.stderr)
    return rates, {family: results}


def _measure_apart(args: argparse.Namespace, argv: list[str] | None, out: Path) -> Measured:
    """Each family in a process of its own, so that none inherits another's memory, threads or compiled code."""
    from ssmkernels.bench.measure import Rates

    rates, measured = Rates(0.0, {}), {}
    for family in args.families or FAMILIES:
        part = out.with_name(f"{out.stem}-{family}.part.json")
        command = [sys.executable, "-m", "ssmkernels", "bench", family, "--device", args.device, "--dtype", args.dtype]
        command += ["--seconds", str(args.seconds), "--out", str(part), *(["--quick"] if args.quick else [])]
        command += ["--op", args.op] if args.op else []
        process = subprocess.Popen(command)
        try:
            process.wait()
            stopped = False
        except KeyboardInterrupt:  # the process of the family gets it too, and writes what it has
            process.wait()
            stopped = True
        if part.exists():
            rates, measured[family] = _read(part)
            _write(out, _document(args, argv, rates, _all(measured)))
            for made in out.parent.glob(f"{part.stem}*"):
                made.unlink()
        if stopped:
            break
    return rates, measured


def _all(measured: Mapping[str, list[Result]]) -> list[Result]:
    return [result for of_family in measured.values() for result in of_family]


def _add_missing(table: Path, document: dict[str, Any]) -> None:
    """Writes to a stored table what was measured now of the cases that it lacks; what it has stays what is compared
    with.
    """
    from ssmkernels.bench.case import Result

    kept = json.loads(table.read_text())["results"] if table.is_file() else []
    known = {Result.from_json(result).label() for result in kept}
    added = [result for result in document["results"] if Result.from_json(result).label() not in known]
    if added:
        table.parent.mkdir(parents=True, exist_ok=True)
        _write(table, document | {"results": kept + added})
        print(f"{table}: added {len(added)} cases that it had not")


def _read(path: Path) -> tuple[Rates, list[Result]]:
    from ssmkernels.bench.case import Result
    from ssmkernels.bench.measure import Rates

    document = json.loads(path.read_text())
    return Rates(**document["rates"]), [Result.from_json(result) for result in document["results"]]


def _write(path: Path, document: dict[str, Any]) -> None:
    """An interrupted run leaves the cases it finished."""
    write_atomically(path, json.dumps(document, indent=1) + "\n")


@functools.cache
def _here() -> tuple[str | None, dict[str, Any]]:
    """The commit and the machine, which do not change during a run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return commit or None, info.collect()


def _document(args: argparse.Namespace, argv: list[str] | None, rates: Rates, results: list[Result]) -> dict[str, Any]:
    commit, machine = _here()
    return {
        "command": " ".join(["ssmkernels bench", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit,
        "device": args.device,
        "versions": {
            "ssmkernels": machine["ssmkernels"]["version"],
            "python": machine["python"]["version"],
            **machine["packages"],
        },
        "machine": {key: machine[key] for key in ("cpu", "cuda", "torch", "build")},
        "rates": dataclasses.asdict(rates),
        "results": [dataclasses.asdict(result) for result in results],
    }

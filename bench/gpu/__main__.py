# SPDX-License-Identifier: BSD-3-Clause
"""``python -m bench.gpu [--steps NAME,…]``: runs the steps, or goes on where an earlier call ended."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from bench.gpu import runner
from bench.gpu.steps import ROOT, STEPS


def main(argv: list[str] | None = None) -> int:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Build, check and measure on a GPU.")
    parser.add_argument("--steps", metavar="NAME,…", help=f"run these (again), of: {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu", metavar="FOLDER", help="results (build/gpu)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="the CPU stands in for the device: every step's code runs, at small sizes",
    )
    arguments = parser.parse_args(argv)
    chosen = names if arguments.steps is None else arguments.steps.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--steps: there is no step {unknown[0]!r}; it should be of {', '.join(names)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` sends it: ends the step too
    out = arguments.out.resolve()
    steps = [step for step in STEPS if step.name in chosen]
    try:
        runner.run(steps, out, dry_run=arguments.dry_run, again=arguments.steps is not None)
    finally:
        print("\n" + runner.table(runner.read(out)), flush=True)
    return 0 if all(outcome.result == runner.PASSED for outcome in runner.read(out)) else 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: BSD-3-Clause
"""Many examples of every target, from a seed that is printed.

PYTHONPATH=python_tests:python_tests/ops python -m fuzz [--examples 50000] [--seed N] [--start EXAMPLE] [--no-shrink]

Targets take turns. Ctrl-C stops the run and prints what continues it. Each finding is printed by its smallest input.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter

import hypothesis
from fuzz.targets import TARGETS, example
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

TURN = 100  # examples of a target at a time
PHASES = (Phase.generate, Phase.shrink)


def run(name: str, seed: int, examples: int, phases: tuple[Phase, ...]) -> tuple[int, str | None]:
    """One turn of a target: how many calls were made, at most ``examples``, and what was found, or None."""
    made = 0

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def turn(data: st.DataObject) -> None:
        nonlocal made
        made += 1
        example(data.draw, TARGETS[name])

    try:
        turn()
    except Exception:
        return min(made, examples), traceback.format_exc()
    return min(made, examples), None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=50_000, help="number of examples, of all targets together")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument(
        "--start", type=int, default=0, help=f"first example, a multiple of {TURN}: where a run stopped"
    )
    parser.add_argument("--no-shrink", action="store_true", help="print findings as they are, which is faster")
    args = parser.parse_args()
    if args.start % TURN:
        parser.error(f"--start must be a multiple of {TURN}, got {args.start}")
    print(f"seed {args.seed}", flush=True)
    done, start, names = args.start, time.monotonic(), sorted(TARGETS)
    counts: Counter[str] = Counter()
    findings: Counter[str] = Counter()
    try:
        while done < args.examples:
            turn = done // TURN
            name, examples = names[turn % len(names)], min(TURN, args.examples - done)
            made, finding = run(name, args.seed + turn, examples, PHASES[:1] if args.no_shrink else PHASES)
            if finding:
                findings[name] += 1
                print(f"\n== {name}, --seed {args.seed} --start {turn * TURN}\n{finding}", flush=True)
            counts[name] += made
            done += examples
            progress = f"\r{done:,} of {args.examples:,} examples, {findings.total()} findings"
            print(progress, end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"\nstopped; --seed {args.seed} --start {done} continues", file=sys.stderr)
    print(f"\n{'target':60} {'examples':>8} {'findings':>8}")
    for name in names:
        print(f"{name:60} {counts[name]:8,} {findings[name]:8}")
    minutes = (time.monotonic() - start) / 60
    total = f"{counts.total():,} examples of {len(names)} targets in {minutes:.0f} minutes"
    print(f"{total}: {findings.total()} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: BSD-3-Clause
"""Many examples of every target, from a seed that is printed.

PYTHONPATH=python_tests:python_tests/ops python -m fuzz [--examples 50000] [--seed N]

Targets take turns, so that it can be stopped at any time. Each finding is printed by its smallest input.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback

import hypothesis
from fuzz.targets import TARGETS, example
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TURN = 100  # examples of a target at a time


def run(name: str, seed: int) -> str | None:
    """One turn of a target: what was found, or None."""

    @hypothesis.seed(seed)
    @settings(max_examples=TURN, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def turn(data: st.DataObject) -> None:
        example(data.draw, TARGETS[name])

    try:
        turn()
    except Exception:
        return traceback.format_exc()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    done, findings, start, names = 0, 0, time.monotonic(), sorted(TARGETS)
    try:
        while done < args.examples:
            name = names[done // TURN % len(names)]
            if found := run(name, args.seed + done // TURN):
                findings += 1
                print(f"\n== {name}, seed {args.seed + done // TURN}\n{found}", flush=True)
            done += TURN
            print(f"\r{done:,} of {args.examples:,} examples, {findings} findings", end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    minutes = (time.monotonic() - start) / 60
    print(f"\n{done:,} examples of {len(names)} targets in {minutes:.0f} minutes: {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

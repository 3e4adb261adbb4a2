# SPDX-License-Identifier: BSD-3-Clause
"""The steps of ``make gpu``, the most valuable first: what each runs, for how long, and which file it leaves."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOTAL_SECONDS = 540  # of all time boxes


@dataclass(frozen=True)
class Step:
    """A command with its time box. ``{out}`` in it is the folder of the results."""

    name: str
    seconds: int
    command: tuple[str, ...]
    stand_in: tuple[str, ...]
    """What a dry run calls instead: the same code, with the CPU in the place of the device."""
    result: str
    """A ``.json`` file is written by the step, row by row (rows.py); a ``.log`` file is what the command printed."""

    @property
    def has_rows(self) -> bool:
        return self.result.endswith(".json")


def _script(name: str, seconds: int, *options: str) -> Step:
    """A module of this package that leaves rows."""
    command = (sys.executable, "-m", f"bench.gpu.{name}", "--out", f"{{out}}/{name}.json", *options)
    return Step(name, seconds, (*command, "--device", "cuda"), (*command, "--device", "cpu"), f"{name}.json")


def _pytest(name: str, seconds: int, *options: str) -> Step:
    command = (sys.executable, "-m", "bench.gpu.tests", "-m", "gpu", *options)
    return Step(name, seconds, command, (*command, "--collect-only"), f"{name}.log")


_info = (sys.executable, "-m", "ssmkernels", "info")
_PAST_2_31 = "python_tests/ops/test_past_2_31.py"

STEPS = (
    _script("build", 75),
    Step("info", 25, _info, (*_info, "--json"), "info.log"),
    _script("smoke", 75),
    _pytest("tests", 100, "python_tests/ops", "python_tests/nn", "python_tests/graph", f"--ignore={_PAST_2_31}"),
    _script("speed", 60),
    _script("peers", 60),
    _script("sanitizers", 55),
    _script("counters", 45),
    _pytest("large", 25, "--numprocesses=0", _PAST_2_31),
    _script("gradients", 20),
)

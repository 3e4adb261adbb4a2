# SPDX-License-Identifier: BSD-3-Clause
"""compute-sanitizer's four tools on the C++ tests of the CUDA kernels, which need no Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu.rows import Rows, arguments
from bench.gpu.steps import ROOT

ROW_SECONDS = 40
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOLDER = ROOT / "build" / "device-tests"  # of the CMake preset of that name


def programs() -> list[Path]:
    return sorted(path for path in FOLDER.glob("test_*") if path.is_file() and os.access(path, os.X_OK))


def check(program: Path, tool: str, device: str) -> dict[str, Any]:
    """Runs a program under a tool; without a device, as it is."""
    if device == "cuda" and shutil.which("compute-sanitizer") is None:
        raise FileNotFoundError("compute-sanitizer is not on PATH")
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    command = [*(sanitizer if device == "cuda" else ()), str(program)]
    begin = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ROW_SECONDS - 5)
    report = (result.stdout + result.stderr)[-4000:]
    if result.returncode:
        print(report)
    state = "failed" if result.returncode else "passed"
    return {"state": state, "exit": result.returncode, "seconds": round(time.monotonic() - begin, 1), "report": report}


def missing() -> dict[str, Any]:
    raise FileNotFoundError(f"the C++ tests for a device are missing: no test_* in {FOLDER.relative_to(ROOT)}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv, "The C++ tests under compute-sanitizer.")
    rows, executables = Rows(args.out, ROW_SECONDS), programs()
    for tool in TOOLS if executables else ():
        for program in executables:
            label = f"{tool} {program.name}"
            rows.run(
                label,
                partial(check, program, tool, args.device),
                lambda row: f"exit {row['exit']}, {row['seconds']:.0f} s",
            )
    if not executables:
        rows.run("programs", missing)
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: BSD-3-Clause
"""The compiled library, out of the bundle or built here, the packages that the bundle brought, and the C++ tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.gpu import bundle, sanitizers
from bench.gpu.rows import Rows, arguments
from bench.gpu.runner import SITE
from bench.gpu.steps import ROOT

ROW_SECONDS = 70
LOADS = (sys.executable, "-c", "import torch, ssmkernels._C")


def lacking(wheels: Path) -> list[Path]:
    """The wheels of packages that are not installed."""
    here = {
        (distribution.metadata["Name"] or "").lower().replace("-", "_") for distribution in metadata.distributions()
    }
    return [wheel for wheel in sorted(wheels.glob("*.whl")) if wheel.name.split("-")[0].lower() not in here]


def install(wheels: Path, site: Path) -> dict[str, Any]:
    chosen = lacking(wheels)
    if chosen:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--upgrade",
        ]
        subprocess.run([*command, "--target", str(site), *map(str, chosen)], check=True)
    return {"installed": [wheel.name for wheel in chosen]}


def take(brought: Path, package: Path) -> str | None:
    """Copies the bundle's library into the package. What is wrong with it, or None."""
    if reason := bundle.problem(brought):
        return reason
    for path in (brought / "ssmkernels").iterdir():
        shutil.copy2(path, package / path.name)
    loaded = subprocess.run(LOADS, cwd=package.parent, capture_output=True, text=True, check=False)
    if loaded.returncode:
        return f"the bundle's library does not load: {loaded.stderr.strip().splitlines()[-1]}"
    return None


def capability(between: str = "") -> str:
    """Of the device that is here, like 90."""
    return between.join(map(str, torch.cuda.get_device_capability()))


def compile_here() -> None:
    """For the device that is here."""
    environment = os.environ | {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability(".")}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    subprocess.run(LOADS, cwd=ROOT, check=True)


def library(brought: Path, package: Path, build: Callable[[], None]) -> dict[str, Any]:
    reason = take(brought, package)
    if reason is None:
        return {"from": "the bundle"}
    print(f"built here: {reason}", flush=True)
    build()
    return {"from": "a build", "because": reason}


def device_tests(architecture: str) -> dict[str, Any]:
    """Compiles the C++ tests for the sanitizers: too large for the bundle, with the kernels in each of them."""
    configure = ["cmake", "--preset", "device-tests", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real"]
    build = ["cmake", "--build", "--preset", "device-tests", "--parallel", str(os.cpu_count())]
    for command in (configure, build):
        subprocess.run(command, cwd=ROOT, check=True)
    return {"programs": [program.name for program in sanitizers.programs()]}


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv, "The compiled library and packages.")
    rows = Rows(args.out, ROW_SECONDS)
    if args.device == "cuda":
        rows.run(
            "packages",
            lambda: install(bundle.BUNDLE / "wheels", SITE),
            lambda row: ", ".join(row["installed"]) or "all there",
        )
        rows.run(
            "library",
            lambda: library(bundle.BUNDLE, ROOT / "ssmkernels", compile_here),
            lambda row: f"from {row['from']}",
        )
        rows.run("C++ tests", lambda: device_tests(capability()), lambda row: ", ".join(row["programs"]))
    else:  # the library that is there stays
        rows.run("packages", lambda: {"installed": [wheel.name for wheel in lacking(bundle.BUNDLE / "wheels")]})
        rows.run(
            "library",
            lambda: {"problem": bundle.problem(), "loads": subprocess.run(LOADS, cwd=ROOT, check=True).returncode == 0},
        )
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: BSD-3-Clause
"""What ``make gpu-bundle`` prepares for a GPU machine without a network, and whether it is still that of these sources.

``build/gpu-bundle`` holds ``ssmkernels/_C.*.so`` for one Python with its _build_info.json, ``wheels/``
and ``bundle.json`` with the hash of the sources.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from bench.gpu.files import write_atomically
from bench.gpu.steps import ROOT

BUNDLE = ROOT / "build" / "gpu-bundle"
LARGEST = 40 * 10**6  # bytes


def source_hash(root: Path = ROOT) -> str:
    """Of what the compiled library is made from."""
    files = [root / name for name in ("CMakeLists.txt", "setup.py", "ssmkernels/__init__.py")]
    tests = root / "csrc/kernels/tests"
    files += [path for path in (root / "csrc").rglob("*") if path.is_file() and tests not in path.parents]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def problem(bundle: Path = BUNDLE, root: Path = ROOT) -> str | None:
    """Why the bundle's library is not to be used here; None where it is."""
    if not (bundle / "bundle.json").is_file():
        return "there is no bundle"
    if json.loads((bundle / "bundle.json").read_text())["sources"] != source_hash(root):
        return "the bundle was made from other sources"
    if not (bundle / "ssmkernels" / f"_C{EXTENSION_SUFFIXES[0]}").is_file():
        return f"the bundle has no _C{EXTENSION_SUFFIXES[0]}"
    return None


def seal(bundle: Path = BUNDLE, root: Path = ROOT) -> int:
    """Writes bundle.json. Returns the bundle's size in bytes.

    Raises:
        SystemExit: it is too large to be carried.
    """
    write_atomically(bundle / "bundle.json", json.dumps({"sources": source_hash(root)}) + "\n")
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    if size > LARGEST:
        sys.exit(f"gpu-bundle: {bundle} has {size / 1e6:.0f} MB, and should have at most {LARGEST / 1e6:.0f}")
    return size


if __name__ == "__main__":
    print(f"{BUNDLE.relative_to(ROOT)}: {seal() / 1e6:.1f} MB")

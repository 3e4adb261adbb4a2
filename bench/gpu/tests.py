# SPDX-License-Identifier: BSD-3-Clause
"""pytest in six processes where pytest-xdist is installed; more of them would fill the GPU's memory."""

from __future__ import annotations

import importlib.util
import sys

import pytest

PROCESSES = 6

if __name__ == "__main__":
    spread = [f"--numprocesses={PROCESSES}", "--dist=worksteal"] if importlib.util.find_spec("xdist") else []
    chosen = [argument for argument in sys.argv[1:] if spread or not argument.startswith("--numprocesses")]
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *spread, *chosen]))

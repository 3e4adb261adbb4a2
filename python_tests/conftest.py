# SPDX-License-Identifier: BSD-3-Clause
"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def source_tree() -> Path:
    """The checkout that these tests lie in; skips where they were copied out of it."""
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("not in a source tree")
    return ROOT

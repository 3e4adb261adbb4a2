# SPDX-License-Identifier: BSD-3-Clause
"""What is split over ranks gives the results of one process. Four ranks are started once, for all checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_checks import SIZES, checks

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def outcomes(ranks, tmp_path_factory):
    """What each rank says of each check: None, or a traceback."""
    path = tmp_path_factory.mktemp("checks") / "results"
    statuses, output = ranks(4, HERE / "run_checks.py", path)
    assert statuses == [0] * 4, output[-4000:]
    return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(4)]


@pytest.mark.parametrize(("name", "size"), [(name, size) for size in SIZES for name in checks(size)])
def test_as_with_one_process(outcomes, name, size):
    for rank in range(size):
        errors = outcomes[rank]
        assert f"{name}-{size}" in errors, f"rank {rank} did not come to it: " + str([*errors.values()][-1])
        assert errors[f"{name}-{size}"] is None, f"rank {rank}: " + str(errors[f"{name}-{size}"])

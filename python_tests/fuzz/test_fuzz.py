# SPDX-License-Identifier: BSD-3-Clause
"""Some examples of every target; ``make fuzz`` runs many more."""

from __future__ import annotations

import pytest
from fuzz.targets import TARGETS, example
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_call_is_right_or_refused(name):
    @settings(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data):
        example(data.draw, TARGETS[name])

    run()

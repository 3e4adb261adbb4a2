# SPDX-License-Identifier: BSD-3-Clause
import math
from itertools import pairwise

import pytest

from ssmkernels.trainers.schedules import cosine_7_16, gaussian_ramp_up, linear_ramp_up, step_decay, warm_up_half_cosine


def test_cosine_7_16_runs_from_one_to_a_fifth():
    assert cosine_7_16(0, 100) == 1
    assert cosine_7_16(50, 100) == pytest.approx(math.cos(7 * math.pi / 32))
    assert cosine_7_16(100, 100) == pytest.approx(0.19509, abs=1e-5)


def test_warm_up_then_half_a_cosine_to_zero():
    factors = [warm_up_half_cosine(step, 104, 4) for step in range(105)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[54] == pytest.approx(0.5)
    assert factors[104] == pytest.approx(0.0)
    assert all(b <= a for a, b in pairwise(factors[4:]))


def test_steps_down_every_few_epochs():
    assert [step_decay(epoch, 2, 0.5) for epoch in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_ramps_go_up_and_stay():
    assert [linear_ramp_up(step, 40) for step in (0, 10, 40, 90)] == [0, 0.25, 1, 1]
    assert [gaussian_ramp_up(step, 40) for step in (0, 20, 40, 90)] == pytest.approx(
        [math.exp(-5), math.exp(-1.25), 1, 1]
    )
    assert linear_ramp_up(0, 0) == gaussian_ramp_up(0, 0) == 1

# SPDX-License-Identifier: BSD-3-Clause
import math
from itertools import pairwise

import pytest
import torch

from ssmkernels.trainers.schedules import (
    cosine_7_16,
    gaussian_ramp_up,
    linear_ramp_up,
    one_cycle,
    schedule_factor,
    step_decay,
    warm_up_half_cosine,
)


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


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 400])
def test_one_cycle_is_that_of_pytorch(steps):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.0, total_steps=steps) if steps > 3 else None
    factors = [one_cycle(step, steps) for step in range(steps)]
    assert max(factors) <= 1
    for factor in factors if theirs else ():
        # Both are a few operations on numbers up to 1, scaled by 2.
        assert 2 * factor == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-14)
        optimizer.step()
        if theirs.last_epoch + 1 < steps:
            theirs.step()


def test_schedules_by_name():
    assert schedule_factor("constant", 7, 10) == 1
    assert schedule_factor("cosine-7/16", 7, 10) == cosine_7_16(7, 10)
    assert schedule_factor("half-cosine", 7, 10, 3) == warm_up_half_cosine(7, 10, 3)
    assert schedule_factor("one-cycle", 7, 10) == one_cycle(7, 10)

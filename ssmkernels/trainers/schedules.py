# SPDX-License-Identifier: BSD-3-Clause
"""Learning rates and weights of losses as functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine-7/16", "half-cosine", "one-cycle"]


def schedule_factor(schedule: Schedule, step: int, steps: int, warm_up_steps: int = 0) -> float:
    """What the learning rate is multiplied by: 1; :func:`cosine_7_16`; :func:`warm_up_half_cosine`, the only one that
    ``warm_up_steps`` are for; or :func:`one_cycle`.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine-7/16":
        return cosine_7_16(step, steps)
    return one_cycle(step, steps) if schedule == "one-cycle" else warm_up_half_cosine(step, steps, warm_up_steps)


def cosine_7_16(step: int, steps: int) -> float:
    """cos(7πk / 16K), FixMatch's factor: from 1 to .195."""
    return math.cos(7 * math.pi * step / (16 * steps))


def warm_up_half_cosine(step: int, steps: int, warm_up_steps: int) -> float:
    """A linear warm-up to 1, then half a cosine to 0."""
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up_steps) / max(steps - warm_up_steps, 1)))


def one_cycle(step: int, steps: int) -> float:
    """Half a cosine from 1/25 to 1 in the first 30 % of the steps, and another one to 1/250000: PyTorch's OneCycleLR,
    without its cycle of the momentum (Smith and Topin, 2018).
    """
    top = max(0.3 * steps - 1, 0.0)
    if step <= top:
        start, end, share = 1 / 25, 1.0, step / top if top > 0 else 1.0
    else:
        start, end, share = 1.0, 1 / 25e4, (step - top) / (steps - 1 - top)
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def step_decay(epoch: int, every: int, factor: float) -> float:
    """factor^⌊epoch / every⌋, PyTorch's StepLR; epochs count from 0."""
    return factor ** (epoch // every)


def linear_ramp_up(step: int, ramp_steps: float) -> float:
    """From 0 at step 0 to 1 at ``ramp_steps``, where it stays (MixMatch; FixMatch's Mean Teacher)."""
    return min(step / ramp_steps, 1.0) if ramp_steps > 0 else 1.0


def gaussian_ramp_up(step: int, ramp_steps: float) -> float:
    """exp(−5 (1 − t/T)²), from .0067 to 1 at T = ``ramp_steps``, where it stays (Laine and Aila; Tarvainen and
    Valpola).
    """
    return math.exp(-5 * (1 - linear_ramp_up(step, ramp_steps)) ** 2)

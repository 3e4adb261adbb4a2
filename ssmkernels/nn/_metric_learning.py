# SPDX-License-Identifier: BSD-3-Clause
"""Objects of pytorch-metric-learning, which is not imported here: who gives such an object has imported it."""

from __future__ import annotations

import sys
from typing import Any


def get(path: str) -> Any:
    """The class ``pytorch_metric_learning.{path}``, such as "losses.ContrastiveLoss"; None before it is imported."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(f"pytorch_metric_learning.{module}"), name, None)


def is_exactly(value: Any, path: str) -> bool:
    """Whether ``value`` is of that class itself, whose subclasses may compute anything, and collects no statistics."""
    return type(value) is get(path) and not value.collect_stats


def check_instance(name: str, value: object, path: str) -> None:
    """Raises TypeError if ``value`` is neither None nor an instance of that class."""
    wanted = get(path)
    if value is not None and (wanted is None or not isinstance(value, wanted)):
        raise TypeError(f"{name} must be a pytorch_metric_learning.{path} or None, got {type(value).__name__}")


def is_power_one(distance: Any, *names: str) -> bool:
    """Whether a distance is None or one of those classes itself, with p = 2 and power = 1."""
    if distance is None:
        return True
    is_known = any(is_exactly(distance, f"distances.{name}") for name in names)
    return is_known and bool(distance.p == 2 and distance.power == 1)

# SPDX-License-Identifier: BSD-3-Clause
"""Where modules keep to float32 or better, whatever they are converted to and whatever autocast says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available

from ssmkernels.ops import _checks as check

LEAST_FACTOR, LARGEST_FACTOR = 1e-18, 1e18  # of logits and losses: float32 holds what two of them make


@check.read_while_traced  # torch 2.11 does not trace it
def _has_autocast(device: str) -> bool:
    return is_autocast_available(device)


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of ``like``; devices that have none, as meta, are left as they are."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


class RunningStatistics(nn.Module):
    """A module with buffers that accumulate over batches, which ``.half()`` and the like move without rounding them.

    A running mean with β = .99 stands still in a half type: what a batch adds is smaller than half the distance to the
    next number.
    """

    statistics: ClassVar[tuple[str, ...]]
    """Names of those buffers."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: getattr(self, name) for name in self.statistics}
        super()._apply(fn, recurse)
        for name, value in before.items():
            converted = getattr(self, name)
            if converted.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, value.to(converted.device))
        return self

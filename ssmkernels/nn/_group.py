# SPDX-License-Identifier: BSD-3-Clause
"""Modules whose rows are split over ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from ssmkernels.distributed import Group, check_group


class WithGroup(nn.Module):
    """A module with the attribute ``group``, which is copied and pickled by the name of the process group."""

    group: Group

    def set_group(self, group: Group) -> None:
        check_group(group)
        self.group = group

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.group is not None and not isinstance(self.group, str):
            state["group"] = _Named(self.group.group_name)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        group = state["group"]
        super().__setstate__({**state, "group": group.find() if isinstance(group, _Named) else group})


class _Named:
    """A process group by its name, which means the same on every rank."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find(self) -> dist.ProcessGroup:
        return dist.distributed_c10d._resolve_process_group(self.name)  # type: ignore[arg-type]

# SPDX-License-Identifier: BSD-3-Clause
"""The ranks that share rows out, and those that share classes out: a group, or a mesh of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, Union

import torch.distributed as dist

from ssmkernels.distributed import Group, check_group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Ranks: TypeAlias = Union[Group, "DeviceMesh"]
"""Whose rows they are: a :data:`ssmkernels.distributed.Group`, or a mesh with the dimensions "rows" and "classes"."""


def groups_of(ranks: Ranks) -> tuple[Group, Group]:
    """The group of this rank that shares rows out, and the one that shares classes out, "local" without one.

    Raises:
        TypeError, ValueError: ``ranks`` is no group and no mesh of rows and classes.
    """
    if dist.is_available():
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(ranks, DeviceMesh):
            names = ranks.mesh_dim_names or ()
            if sorted(names) != ["classes", "rows"]:
                raise ValueError(f"group must be a mesh with the dimensions 'rows' and 'classes', got {names}")
            return ranks.get_group("rows"), ranks.get_group("classes")
    check_group(ranks)
    return ranks, "local"  # type: ignore[return-value]

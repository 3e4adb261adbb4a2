# SPDX-License-Identifier: BSD-3-Clause
"""One argument of a call made wrong, or merely unusual."""

from __future__ import annotations

import math
from typing import Any

import torch
from fuzz.oracle import Target
from fuzz.values import DTYPES, Draw, odd_scalars
from hypothesis import strategies as st
from torch import Tensor

OTHERS = (None, 1, 0.5, "x", True, [1.0], (1, 2), object())


def spoiled(draw: Draw, target: Target, arguments: dict[str, Any]) -> str | None:
    """Changes one of the arguments; its name, or None where all are fixed."""
    if not arguments.keys() - set(target.fixed):
        return None
    name = draw(st.sampled_from(sorted(arguments.keys() - set(target.fixed))))
    value = arguments[name]
    if name in target.numbers:
        arguments[name] = draw(odd_scalars(target.numbers[name]))
    elif name in target.words:
        arguments[name] = draw(st.sampled_from(["", "Mean", "nothing", None, 1, b"mean", True]))
    elif isinstance(value, Tensor):
        arguments[name] = _spoiled_tensor(draw, value, huge=name not in target.shapes)
    else:
        arguments[name] = draw(st.sampled_from([other for other in OTHERS if other is not value]))
    return name


def _spoiled_tensor(draw: Draw, value: Tensor, *, huge: bool) -> Any:
    kind = draw(st.sampled_from(["type", "dtype", "shape", "size", "element", "element", "array"]))
    if kind == "type":
        return draw(st.sampled_from(OTHERS))
    if kind == "array":
        return value.tolist() if draw(st.booleans()) or value.dtype == torch.bfloat16 else value.resolve_neg().numpy()
    if kind == "dtype":
        clean = torch.nan_to_num(value.double(), 0.0).clamp(-100, 100)
        return clean.to(draw(st.sampled_from([dtype for dtype in DTYPES if dtype != value.dtype])))
    if kind == "shape":
        return value[None] if draw(st.booleans()) or value.ndim == 0 else value.sum(0).to(value.dtype)
    if kind == "size" and value.ndim:
        dim = draw(st.integers(0, value.ndim - 1))
        longer = torch.cat([value, value.narrow(dim, 0, min(1, value.shape[dim]))], dim=dim)
        return longer if draw(st.booleans()) or value.shape[dim] == 0 else value.narrow(dim, 0, value.shape[dim] - 1)
    changed = value.clone(memory_format=torch.contiguous_format)
    if changed.numel():
        place = draw(st.integers(0, changed.numel() - 1))
        special = [math.nan, math.inf, -math.inf, -1.0] if changed.is_floating_point() else [-1, -2, 300]
        special += [2**31 - 1] if huge and not changed.is_floating_point() else []
        if changed.dtype != torch.bool:
            changed.view(-1)[place] = draw(st.sampled_from(special))
    return changed

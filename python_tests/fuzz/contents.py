# SPDX-License-Identifier: BSD-3-Clause
"""The tensors that arguments and results hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ssmkernels.graph import Graph

Tensors = dict[str, Tensor]


def named_tensors(value: Any) -> Tensors:
    """A result as tensors by name."""
    if isinstance(value, Tensor):
        return {"value": value}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(name): tensor for name, part in value.items() for tensor in named_tensors(part).values()}
    if isinstance(value, (tuple, list)):
        parts = enumerate(value)
        return {f"value {place}": tensor for place, part in parts for tensor in named_tensors(part).values()}
    return {} if value is None else {"value": torch.as_tensor(value)}


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors that an argument is or holds."""
    if isinstance(value, np.ndarray):
        return [torch.from_numpy(value.copy())] if value.dtype.kind in "fiu" else []
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_of(part)]
    if isinstance(value, Graph):
        return [value.crow, value.col, value.weight, value.reverse]
    return [value] if isinstance(value, Tensor) else []


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The argument with its floating-point tensors changed; a graph stays symmetric."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, Graph):
        weight = function(value.weight)
        weight = torch.where(value.rows <= value.col, weight, weight[value.reverse])
        return Graph(value.crow, value.col, weight, value.reverse, mutual=value.mutual)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, part) for part in value))
    return value


def double(value: Any) -> Any:
    return mapped(lambda x: x.detach().double(), value)


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(copied(part) for part in value))
    return value.copy() if isinstance(value, np.ndarray) or sparse.issparse(value) else value


def memory_of(value: Any) -> list[bytes]:
    """The memory that a value lies in; of a tensor, with what lies between its elements."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            return [memory for part in (value.crow_indices(), value.values()) for memory in memory_of(part)]
        return [torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy().tobytes()]
    if isinstance(value, np.ndarray):
        return [value.tobytes()]
    if sparse.issparse(value):
        return [value.data.tobytes()]
    return [memory for part in parts_of(value) for memory in memory_of(part)]


def parts_of(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return list(value)
    return list(tensors_of(value)) if isinstance(value, Graph) else []


def same_bits(a: Tensors, b: Tensors) -> bool:
    """Whether two results are equal, NaN too, and −0 is not 0."""
    return a.keys() == b.keys() and all(_bits(a[name]) == _bits(b[name]) for name in a)


def _bits(value: Tensor) -> tuple[Any, ...]:
    value = value.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    return value.dtype, value.shape, value.view(-1).view(torch.uint8).numpy().tobytes()

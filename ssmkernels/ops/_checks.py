# SPDX-License-Identifier: BSD-3-Clause
"""Checks of arguments, shared by every family: one clear error that names the argument, what it was and what it should be."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ssmkernels import _library

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _by_dtype(check: str, *dtypes: torch.dtype) -> dict[torch.dtype, Callable[..., bool]]:
    """The compiled library's function for each dtype."""
    return {dtype: getattr(_library.library(), f"{check}_{str(dtype)[6:]}") for dtype in dtypes} if _library.load() else {}


_all_within_of = _by_dtype("all_within", torch.float32, torch.float64, torch.int32, torch.int64)
_ascends_from_zero_of = _by_dtype("ascends_from_zero", torch.int32, torch.int64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: half types are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)``, which takes a microsecond where there is nothing to do."""
    return value if value.dtype == dtype else value.to(dtype)


def fits(value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether an argument is what it should be, all in one look. What is wrong with it is found out by the checks below."""
    return isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype and value.device == device


def check_tensor(name: str, value: object, shape: str, ndim: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must be {shape}, got shape {list(value.shape)}")


def check_floating(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")


def check_int64(name: str, value: Tensor) -> None:
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}; convert it once with .long()")


def check_size(name: str, value: Tensor, dim: int, size: int, meaning: str) -> None:
    if value.shape[dim] != size:
        raise ValueError(f"{name} must have {meaning} = {size} in dimension {dim}, got shape {list(value.shape)}")


def check_same_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but {like_name} is on {like.device}; all tensors must be on one device")


def check_same_dtype(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.dtype != like.dtype:
        raise TypeError(f"{name} is {value.dtype} but {like_name} is {like.dtype}; convert one of them, or call under torch.autocast")


def check_number(name: str, value: object) -> float:
    if type(value) is float and -math.inf < value < math.inf:
        return value
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_positive(name: str, value: object) -> float:
    if type(value) is float and 0 < value < math.inf:
        return value
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value}")
    return float(value)


def check_fraction(name: str, value: object) -> float:
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def check_count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def values_are_checked(tensor: Tensor) -> bool:
    """Whether checks that read values run: on the CPU in eager mode; on CUDA, where they synchronise, only with SSMKERNELS_CHECK=1."""
    if torch.compiler.is_compiling() or type(tensor) not in _PLAIN:
        return False
    return tensor.is_cpu or os.environ.get("SSMKERNELS_CHECK") == "1"


def _is_plain(value: Tensor) -> bool:
    """Whether the values can be read where they lie: a reduction of torch takes 3 µs instead of 1, and leaves other code cold."""
    return type(value) in _PLAIN and value.is_cpu and value.is_contiguous() and not torch._C._are_functorch_transforms_active()


def _all_within(value: Tensor, low: float, high: float) -> bool:
    """Whether every element is finite and in [low, high]."""
    if (read := _all_within_of.get(value.dtype)) and _is_plain(value):
        return bool(read(value.data_ptr(), value.numel(), low, high))
    if value.numel() == 0:
        return True
    least, largest = (bound.item() for bound in torch.aminmax(value.detach()))
    return low <= least <= largest <= high and math.isfinite(least) and math.isfinite(largest)


def ascends_from_zero(value: Tensor, last: int) -> bool:
    """Whether a vector of ids starts at 0, never goes down and ends at ``last``."""
    if (read := _ascends_from_zero_of.get(value.dtype)) and _is_plain(value):
        return bool(read(value.data_ptr(), value.numel(), last))
    return value.numel() > 0 and value[0].item() == 0 and value[-1].item() == last and not bool((value.diff() < 0).any())


def check_range(name: str, value: Tensor, size: int, meaning: str) -> None:
    """Every element in [0, size)."""
    if _all_within(value, 0, size - 1):
        return
    low, high = (bound.item() for bound in torch.aminmax(value))
    raise ValueError(f"{name} must be in [0, {size}), {meaning}; got values from {low} to {high}")


def check_weights(name: str, value: Tensor) -> None:
    """Every element finite and >= 0."""
    if _all_within(value, 0.0, math.inf):
        return
    low, high = (bound.item() for bound in torch.aminmax(value.detach()))
    raise ValueError(f"{name} must be finite and >= 0, got values from {low} to {high}")


def check_finite(name: str, value: Tensor) -> None:
    """Every element finite."""
    if _all_within(value, -math.inf, math.inf):
        return
    low, high = (bound.item() for bound in torch.aminmax(value.detach()))
    raise ValueError(f"{name} must be finite, got values from {low} to {high}")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Matrix-like arguments in autocast's dtype, where autocast is on for their device; float64 is left alone, as torch does."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor.dtype == torch.float64 else cast(tensor, dtype) for tensor in tensors)


@torch.compiler.assume_constant_result
def _tf32_setting() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def allow_tf32(tensor: Tensor) -> bool:
    """Whether float32 products may use TF32 tensor cores: what torch's own setting says for its matrix products."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and _tf32_setting()

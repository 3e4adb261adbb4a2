# SPDX-License-Identifier: BSD-3-Clause
"""Checks of arguments, shared by every family: one clear error that names the argument, what it was and what it
should be.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ssmkernels import _library

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _by_dtype(check: str, *dtypes: torch.dtype) -> dict[torch.dtype, Callable[..., bool]]:
    """The compiled library's function for each dtype."""
    return (
        {dtype: getattr(_library.library(), f"{check}_{str(dtype)[6:]}") for dtype in dtypes} if _library.load() else {}
    )


_all_within_of = _by_dtype("all_within", torch.float32, torch.float64, torch.int32, torch.int64)
_ascends_from_zero_of = _by_dtype("ascends_from_zero", torch.int32, torch.int64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: half types are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)``, which takes a microsecond where there is nothing to do."""
    return value if value.dtype == dtype else value.to(dtype)


def fixed(value: Tensor) -> Tensor:
    """The value, without a gradient."""
    return value.detach() if value.requires_grad else value


def is_matrix(value: object) -> TypeGuard[Tensor]:
    """Whether it is a dense tensor of two dimensions."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested and value.ndim == 2


def fits(value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether an argument is what it should be, all in one look. What is wrong with it is found out by the checks
    below.
    """
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and value.shape == shape
        and value.dtype == dtype
        and value.device == device
    )


def check_tensor(name: str, value: object, shape: str, ndim: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if value.is_nested or value.layout is not torch.strided:
        layout = "a nested one" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense tensor {shape}, got {layout}")
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
        raise ValueError(
            f"{name} is on {value.device} but {like_name} is on {like.device}; all tensors must be on one device"
        )


def check_same_dtype(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.dtype != like.dtype:
        raise TypeError(
            f"{name} is {value.dtype} but {like_name} is {like.dtype}; convert one of them, or call under"
            " torch.autocast"
        )


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    grad = ", that requires grad" if value.requires_grad else ""
    return f"a tensor of {value.dtype}, shape {list(value.shape)}{grad}"


def _scalar(value: Any) -> Any:
    """What a 0-d tensor without a gradient holds, read once, at the time of the call; anything else as it is."""
    if type(value) not in _PLAIN or torch.compiler.is_compiling():
        return value
    if value.ndim > 0 or value.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return value
    return value.item()


def _number(name: str, value: object, kind: str = "a number") -> float:
    """A number of Python's or numpy's, or a 0-d tensor, as a float. A symbolic number of a compiler stays one."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]
    given = _scalar(value)
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise TypeError(f"{name} must be {kind}, got {_described(value)}")
    try:
        return float(given)
    except OverflowError:  # a Python integer beyond float64
        return math.inf if given > 0 else -math.inf  # type: ignore[operator]


def check_number(name: str, value: object) -> float:
    if type(value) is float and -math.inf < value < math.inf:
        return value
    number = _number(name, value)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def check_positive(name: str, value: object) -> float:
    if type(value) is float and 0 < value < math.inf:
        return value
    number = _number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {number}")
    return number


def check_positive_in(name: str, value: object, dtype: torch.dtype) -> float:
    """A number > 0 that the dtype that ``dtype`` is computed in can hold."""
    number, computed = check_positive(name, value), compute_dtype(dtype)
    if not number <= torch.finfo(computed).max:
        raise ValueError(f"{name} must be at most {torch.finfo(computed).max:.3g}, as {computed} has it, got {number}")
    return number


def check_within(name: str, value: object, low: float, high: float) -> float:
    number = _number(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {number}")
    return number


def check_nonnegative(name: str, value: object) -> float:
    if type(value) is float and 0 <= value < math.inf:
        return value
    number = _number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {number}")
    return number


def check_fraction(name: str, value: object) -> float:
    number = _number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {number}")
    return number


def check_threshold(name: str, value: object) -> float:
    """A number that may be infinite."""
    number = _number(name, value, "a number or a scalar tensor")
    if number != number:
        raise ValueError(f"{name} must not be NaN")
    return number


def check_integer(name: str, value: object) -> int:
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    given = _scalar(value)
    if isinstance(given, bool) or not isinstance(given, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {_described(value)}")
    number = operator.index(given)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {number}")
    return number


def check_count(name: str, value: object) -> int:
    count = check_integer(name, value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if isinstance(value, str) and value in choices:
        return
    *first, last = map(repr, choices)
    raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")


def values_are_checked(tensor: Tensor) -> bool:
    """Whether checks that read values run: on the CPU in eager mode; on CUDA, where they synchronise, only with
    SSMKERNELS_CHECK=1.
    """
    if torch.compiler.is_compiling() or type(tensor) not in _PLAIN:
        return False
    return tensor.is_cpu or (tensor.is_cuda and os.environ.get("SSMKERNELS_CHECK") == "1")


def is_batched(value: Tensor) -> bool:
    """Whether :func:`torch.func.vmap` runs over a dimension of the tensor: its values cannot decide anything then."""
    if not torch._C._are_functorch_transforms_active():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def _is_plain(value: Tensor) -> bool:
    """Whether the values can be read where they lie: a reduction of torch takes 3 µs instead of 1, and leaves other
    code cold.
    """
    return (
        type(value) in _PLAIN
        and value.is_cpu
        and value.is_contiguous()
        and not value.is_neg()  # −x as a flag over the memory of x
        and not value._is_zerotensor()  # zeros without memory
        and not torch._C._are_functorch_transforms_active()
    )


def _all_within(value: Tensor, low: float, high: float) -> bool:
    """Whether every element is finite and in [low, high]."""
    if (read := _all_within_of.get(value.dtype)) and _is_plain(value):
        return bool(read(value.data_ptr(), value.numel(), low, high))
    if value.numel() == 0 or is_batched(value):
        return True
    least, largest = (bound.item() for bound in torch.aminmax(value.detach()))
    return low <= least <= largest <= high and math.isfinite(least) and math.isfinite(largest)


def ascends_from_zero(value: Tensor, last: int) -> bool:
    """Whether a vector of ids starts at 0, never goes down and ends at ``last``."""
    if (read := _ascends_from_zero_of.get(value.dtype)) and _is_plain(value):
        return bool(read(value.data_ptr(), value.numel(), last))
    if is_batched(value):
        return True
    return (
        value.numel() > 0 and value[0].item() == 0 and value[-1].item() == last and not bool((value.diff() < 0).any())
    )


def check_range(name: str, value: Tensor, size: int, meaning: str) -> None:
    """Every element in [0, size)."""
    if _all_within(value, 0, size - 1):
        return
    low, high = (bound.item() for bound in torch.aminmax(value))
    raise ValueError(f"{name} must be in [0, {size}), {meaning}; got values from {low} to {high}")


def check_at_least_zero(name: str, value: Tensor) -> None:
    """Every id >= 0."""
    if _all_within(value, 0, 2**63 - 1):
        return
    raise ValueError(f"{name} must be >= 0, got {value.min().item()}")


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


def _overlaps_itself(value: Tensor) -> bool:
    """Whether two elements of a vector or matrix lie in one place of memory."""
    strides = [(size, stride) for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]
    if value.numel() == 0 or not strides:
        return False
    if any(stride == 0 for _, stride in strides):
        return True
    if len(strides) == 1:
        return False
    (rows, row_stride), (columns, column_stride) = strides
    common = math.gcd(row_stride, column_stride)  # equal places: so many rows down are so many columns to the right
    return column_stride // common < rows and row_stride // common < columns


def _extent(value: Tensor) -> tuple[int, int]:
    """The first byte of a tensor's elements, and the one after the last."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    start = value.storage_offset() * value.element_size()
    return int(start), int(start + (last + 1) * value.element_size())


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or a.numel() == 0 or b.numel() == 0:
        return False
    (a_start, a_end), (b_start, b_end) = _extent(a), _extent(b)
    return a_start < b_end and b_start < a_end


def check_written(name: str, value: Tensor, read: dict[str, Tensor]) -> None:
    """A tensor that is written has no gradient and no negative bit, and shares no memory with itself or with what is
    read.
    """
    if torch.compiler.is_compiling() or type(value) not in _PLAIN or value.is_meta:
        return
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad, since writing it records no gradient; give {name}.detach()")
    if is_batched(value) or any(map(is_batched, read.values())):
        raise ValueError(f"{name} is written in place, which torch.func.vmap cannot do for several at a time")
    if value.is_neg():  # torch's fallback for such views takes no operator of a library that writes
        raise ValueError(f"{name} must not be a view with the negative bit; give {name}.resolve_neg()")
    if _overlaps_itself(value):
        layout = f"shape {list(value.shape)} with strides {value.stride()}"
        raise ValueError(f"{name} must not overlap itself in memory, got {layout}")
    for other, tensor in read.items():
        if _share_memory(value, tensor):
            raise ValueError(f"{other} must not share memory with {name}, which is written; give {other}.clone()")


def autocast_is_enabled(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Matrix-like arguments in autocast's dtype, where autocast is on for their device; float64 is left alone, as
    torch does.
    """
    device = tensors[0].device
    if not autocast_is_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(tensor if tensor.dtype == torch.float64 else cast(tensor, dtype) for tensor in tensors)


def read_while_traced(function: Callable[..., bool]) -> Callable[..., bool]:
    """What torch.compiler.assume_constant_result does: ``function`` is called while a graph is traced, since dynamo
    cannot look into it. By hand, because that decorator imports dynamo, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@read_while_traced
def _tf32_setting() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def allow_tf32(tensor: Tensor) -> bool:
    """Whether float32 products may use TF32 tensor cores: what torch's own setting says for its matrix products."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and _tf32_setting()

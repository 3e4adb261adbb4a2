# SPDX-License-Identifier: BSD-3-Clause
"""Time and memory of functions side by side: one process, alternating, medians; never a time alone."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Function = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, and the quartiles of the rounds around it."""

    median: float
    low: float
    high: float

    def scaled(self, factor: float) -> Timing:
        return Timing(factor * self.median, factor * self.low, factor * self.high)


def _clock(function: Function, calls: int, device: str, clock: Callable[[], float]) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = clock()
    for _ in range(calls):
        function()
    return (clock() - begin) / calls


def time_alternating(
    functions: Mapping[str, Function],
    *,
    device: str = "cpu",
    seconds: float = 4.0,
    rounds: int = 15,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Medians over rounds in which every function runs in turn, so that a drift of the machine meets all of them.

    A short function is called several times per round (a millisecond's worth). Rounds stop at ``seconds``, but not
    before three, or two where they take more than ten seconds each. ``clock`` may be ``time.process_time``, the time
    of all threads of the process, which other processes disturb less.
    """
    calls = {}
    for name, function in functions.items():
        function()  # compilation, allocator
        took = _clock(function, 1, device, clock)
        if took < 1:  # caches
            took = _clock(function, 1, device, clock)
        calls[name] = max(1, int(1e-3 / max(took, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for done in range(rounds):
        elapsed = time.perf_counter() - begin
        if elapsed > seconds and (done >= 3 or (done >= 2 and elapsed > 20)):
            break
        for name, function in functions.items():
            samples[name].append(_clock(function, calls[name], device, clock))

    def summary(values: list[float]) -> Timing:
        values = sorted(values)
        return Timing(statistics.median(values), values[len(values) // 4], values[-1 - len(values) // 4])

    return {name: summary(values) for name, values in samples.items()}


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def peak_extra_bytes(function: Function, *, device: str = "cpu") -> int | None:
    """The most memory in use during a call beyond what was in use before it; None where the system does not tell.

    On the CPU this is resident memory (Linux), whatever allocated it; on CUDA what torch's allocator handed out. What a
    first call compiles or loads counts too, so call the function once before.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        libc = ctypes.CDLL(ctypes.util.find_library("c"))
        libc.malloc_trim(0)  # what earlier calls freed goes back, so that it counts when taken again
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = _resident("VmRSS:")
        function()
        return max(0, _resident("VmHWM:") - before)
    except (OSError, AttributeError):
        return None


@dataclass(frozen=True)
class Rates:
    """What the device reaches here and now: bytes copied (read + written) and float operations of a matrix product,
    per second.
    """

    copy: float
    matmul: Mapping[str, float]


def device_rates(device: str, dtypes: Mapping[str, torch.dtype]) -> Rates:
    """Copy and matrix-product rates, measured on random data large enough to leave the caches."""
    if device == "cuda":
        source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
        size = 8192
    else:
        source = torch.empty(2**27, dtype=torch.uint8).random_()
        size = 1024
    target = torch.empty_like(source)
    copy = time_alternating({"copy": lambda: target.copy_(source)}, device=device, seconds=1.0)["copy"].median
    matmul = {}
    for name, dtype in dtypes.items():
        product = functools.partial(torch.mm, *(torch.randn(size, size, device=device).to(dtype) for _ in range(2)))
        matmul[name] = 2 * size**3 / time_alternating({"mm": product}, device=device, seconds=1.0)["mm"].median
    return Rates(2 * source.numel() / copy, matmul)

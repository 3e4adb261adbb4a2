# SPDX-License-Identifier: BSD-3-Clause
"""Times of captured calls on a CUDA device, and what stands in for one where there is none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Function = Callable[[], object]
CAPTURED_SECONDS = 2e-3  # of calls in one graph, so that its own launch does not count
MOST_CALLS = 20


class Cuda:
    """The current CUDA device."""

    rounds = 11

    def __init__(self) -> None:
        elements = 2 * torch.cuda.get_device_properties().L2_cache_size // 4
        self._buffer = torch.zeros(elements, device="cuda")

    def capture(self, function: Function, calls: int = 1) -> Function:
        """A function that replays ``calls`` calls as one CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        return graph.replay

    def seconds(self, function: Function) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def empty_l2(self) -> object:
        """Reads twice the L2 cache. A write would leave lines whose way back to memory the next kernel pays for."""
        return self._buffer.sum()


class StandIn:
    """The CPU in the place of a device."""

    rounds = 1

    def capture(self, function: Function, calls: int = 1) -> Function:
        return lambda: [function() for _ in range(calls)]

    def seconds(self, function: Function) -> float:
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    def empty_l2(self) -> object:
        return None


def device_of(name: str) -> Cuda | StandIn:
    return Cuda() if name == "cuda" else StandIn()


@dataclass(frozen=True)
class CallTime:
    """Seconds of one call in a CUDA graph: medians, with its inputs in the L2 cache as far as they fit, and without."""

    warm: float
    cold: float


def time_call(device: Cuda | StandIn, function: Function) -> CallTime:
    """The cold time is that of calls which each follow a read of the whole L2 cache, less that of the reads alone."""
    once = device.capture(function)
    once()
    calls = max(1, min(MOST_CALLS, int(CAPTURED_SECONDS / device.seconds(once))))

    def cold_call() -> None:
        device.empty_l2()
        function()

    warm, cold, reads = (device.capture(call, calls) for call in (function, cold_call, device.empty_l2))
    warm_times, cold_times = [], []
    for _ in range(device.rounds):
        once()  # behind the reads, the first call is a cold one
        warm_times.append(device.seconds(warm) / calls)
        cold_times.append((device.seconds(cold) - device.seconds(reads)) / calls)
    return CallTime(statistics.median(warm_times), statistics.median(cold_times))

# SPDX-License-Identifier: BSD-3-Clause
"""A benchmark case, and what measuring it gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ssmkernels.bench.measure import Function, Rates, Timing, peak_extra_bytes, time_alternating


def _label(op: str, phase: str, size: Mapping[str, int], dtype: str) -> str:
    return " ".join([op, phase, *(f"{key}={value:,}" for key, value in size.items()), dtype])


@dataclass(frozen=True)
class Case:
    """One op at one size: ours, its peers, and the least work there is."""

    op: str
    phase: str
    size: Mapping[str, int]
    dtype: torch.dtype
    ours: Function
    peers: Mapping[str, Function]
    products: Mapping[str, Function]
    """The op's matrix products as torch.mm calls of the same shapes, and below how often each is needed."""
    product_counts: Mapping[str, int]
    flops: int
    bytes: int
    """Bytes that must move: each input read once per pass the algorithm needs, each output written once."""
    peer_scale: Mapping[str, float] = field(default_factory=dict)
    """By how much the time of a peer is multiplied that does a part of the work, such as some columns of many."""
    recall: Mapping[str, Callable[[], float]] = field(default_factory=dict)
    """For peers that search approximately: the share of the exact results in what their last call gave."""

    def label(self) -> str:
        return _label(self.op, self.phase, self.size, str(self.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Result:
    op: str
    phase: str
    size: Mapping[str, int]
    dtype: str
    ours: Timing
    peers: Mapping[str, Timing]
    products: Timing | None
    floor: float
    """Seconds: on the CPU the products' time where there are some; otherwise, and on CUDA, the larger of flops and
    bytes.
    """
    extra_bytes: Mapping[str, int | None] = field(default_factory=dict)
    flops: int = 0
    bytes: int = 0
    recall: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        """What ``dataclasses.asdict`` made of a result."""
        peers = {name: Timing(**timing) for name, timing in values["peers"].items()}
        products = None if values["products"] is None else Timing(**values["products"])
        return cls(**(dict(values) | {"ours": Timing(**values["ours"]), "peers": peers, "products": products}))

    def label(self) -> str:
        return _label(self.op, self.phase, self.size, self.dtype)

    def ratio(self, peer: str) -> float:
        """How many times longer the peer takes."""
        return self.peers[peer].median / self.ours.median

    def recall_of(self, peer: str) -> str:
        return f" (recall {self.recall[peer]:.4f})" if peer in self.recall else ""

    def share_of_floor(self) -> float:
        return self.floor / self.ours.median


def run(
    case: Case,
    *,
    device: str,
    rates: Rates,
    seconds: float,
    say: Callable[[str], Any],
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Measures a case: peers in turn with ours, products in turn with ours, then memory."""
    begin = time.perf_counter()
    functions = {
        "ours": case.ours,
        **case.peers,
        **{f"product {name}": product for name, product in case.products.items()},
    }
    timings = time_alternating(functions, device=device, seconds=seconds, clock=clock)
    products = None
    if case.products:
        parts = [(timings[f"product {name}"], count) for name, count in case.product_counts.items()]
        products = Timing(*(sum(count * getattr(t, k) for t, count in parts) for k in ("median", "low", "high")))
    dtype = str(case.dtype).removeprefix("torch.")
    if device == "cuda":
        floor = max(case.bytes / rates.copy, case.flops / rates.matmul.get(dtype, float("inf")))
    else:
        floor = (
            products.median
            if products
            else max(case.bytes / rates.copy, case.flops / rates.matmul.get(dtype, float("inf")))
        )
    extra = {name: peak_extra_bytes(functions[name], device=device) for name in ("ours", *case.peers)}
    result = Result(
        op=case.op,
        phase=case.phase,
        size=dict(case.size),
        dtype=dtype,
        ours=timings["ours"],
        peers={name: timings[name].scaled(case.peer_scale.get(name, 1.0)) for name in case.peers},
        products=products,
        floor=floor,
        extra_bytes=extra,
        flops=case.flops,
        bytes=case.bytes,
        recall={name: share() for name, share in case.recall.items()},
    )
    label = " ".join(f"{key}={value:,}" for key, value in case.size.items())
    ratios = ", ".join(f"{result.ratio(peer):.1f}x {peer}{result.recall_of(peer)}" for peer in case.peers)
    say(
        f"{case.op:18} {label:34} {1e3 * result.ours.median:9.3f} ms   {ratios}   [{time.perf_counter() - begin:.0f} s]"
    )
    return result

# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark results as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ssmkernels.bench.case import Result


def _memory(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:.1f}"


def _ratio(result: Result, peer: str) -> str:
    return f"{result.ratio(peer):.1f}x{result.recall_of(peer)}" if peer in result.peers else ""


def table(results: Sequence[Result]) -> str:
    """Time, how many times longer each peer takes, share of the floor, and peak extra memory."""
    peers = list(dict.fromkeys(peer for r in results for peer in r.peers))
    titles = ["op", "size", "dtype", "ms", *(f"vs {peer}" for peer in peers)]
    titles += ["time / matrix products", "share of floor", "extra MiB", "eager's extra MiB"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for r in results:
        size = " ".join(f"{key}={value:,}" for key, value in r.size.items())
        products = f"{r.ours.median / r.products.median:.2f}" if r.products else ""
        cells = [
            f"`{r.op}` {r.phase}",
            size,
            r.dtype,
            f"{1e3 * r.ours.median:.3g}",
            *(_ratio(r, peer) for peer in peers),
            products,
            f"{100 * r.share_of_floor():.0f} %" if r.floor else "",
            _memory(r.extra_bytes.get("ours")),
            _memory(r.extra_bytes.get("eager")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text(results: Sequence[Result]) -> str:
    """The table of all results, and where growth was measured that of what a unit of work takes."""
    tables = [table(results)]
    if growth_of(results):
        tables.append(growth_table(results))
    return "\n\n".join(tables)


def growth_table(results: Sequence[Result]) -> str:
    """What each op takes per unit of its work at growing sizes, and its peak extra memory."""
    lines = ["| op | unit | ns per unit, from the smallest size on | units | extra MiB |", "|---|---|---|---|---|"]
    for op, chosen in by_op(growth_of(results)).items():
        costs = " → ".join(f"{1e9 * r.ours.median / units(r)[1]:.3g}" for r in chosen)
        counts = " → ".join(f"{units(r)[1]:.2g}" for r in chosen)
        memory = " → ".join(_memory(r.extra_bytes.get("ours")) for r in chosen)
        lines.append(
            f"| `{op}` {chosen[0].phase.removesuffix(', growth')} | {units(chosen[0])[0]} | {costs} | {counts} |"
            f" {memory} |"
        )
    return "\n".join(lines)


def growth_of(results: Sequence[Result]) -> list[Result]:
    """The cases that were measured to see how an op grows."""
    return [r for r in results if r.phase.endswith("growth")]


def by_op(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each op, in the order in which the ops come."""
    return {op: [r for r in results if r.op == op] for op in dict.fromkeys(r.op for r in results)}


def units(result: Result) -> tuple[str, float]:
    """What the work of an op is counted in, and how many of them there are."""
    size = result.size
    if "K" in size:
        return "row × slot", size["B"] * size["K"]
    if result.op == "laplacian_solve":
        return "entry and iteration", result.flops / (2 * size["C"])
    if "E" in size:
        return "entry", size["E"]
    return ("row", size["n"]) if result.op == "similarity_moments" else ("pair", size["n"] * size.get("m", size["n"]))


def compare(results: Sequence[Result], before: Sequence[Result]) -> dict[str, float]:
    """By how much each case that both runs have got slower, by its label: the ratio of its times over the floors of
    their own runs.

    Absolute times of two runs tell more of the machine's other work than of ours; floors are measured beside the op.
    Where there is no floor, it is the last of the peers that stands for it: calls of small batches have torch's own
    there.
    """

    def relative(result: Result) -> float:
        return result.ours.median / (result.floor or list(result.peers.values())[-1].median)

    earlier = {result.label(): relative(result) for result in before}
    return {
        result.label(): relative(result) / earlier[result.label()] for result in results if result.label() in earlier
    }


def comparison_table(changes: Mapping[str, float]) -> str:
    lines = ["| case | time over floor, to what it was |", "|---|---|"]
    return "\n".join(
        lines + [f"| {label} | {change:.2f}x |" for label, change in sorted(changes.items(), key=lambda item: -item[1])]
    )

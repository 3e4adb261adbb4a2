# SPDX-License-Identifier: BSD-3-Clause
"""Writes the figures of README.md, and its plot, from the committed results in bench/results.

python docs/readme.py            write the table in README.md and docs/_static/overview.png
python docs/readme.py --check    fail where either is not what the results give
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ssmkernels import _plots
from ssmkernels.bench.case import Result

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "_static" / "overview.png"
BEGIN, END = "<!-- table: docs/readme.py -->\n", "<!-- end of the table -->\n"


class Row(NamedTuple):
    """A line of the table: what a user has, and the op that takes its place."""

    have: str
    use: str
    page: str
    family: str = ""
    op: str = ""
    peer: str = ""
    peer_name: str = ""
    chosen: Callable[[Result], bool] = lambda result: True


def whole_gradient(result: Result) -> bool:
    return result.phase.startswith("forward + backward")


ROWS = (
    Row(
        "SimMatch's loss block, [rows, slots] matrices",
        "`ops.instance_matching`",
        "docs/memory.md",
        "memory",
        "instance_matching",
        "official",
        "SimMatch's code",
    ),
    Row(
        "class sums of similarities",
        "`ops.aggregate`",
        "docs/memory.md",
        "memory",
        "aggregate",
        "torch.compile",
        "torch.compile",
    ),
    Row(
        "calibrated similarities",
        "`ops.unfold`",
        "docs/memory.md",
        "memory",
        "unfold",
        "torch.compile",
        "torch.compile",
    ),
    Row(
        "scipy's `cg`, a class at a time (LP-DeepSSL)",
        "`ops.laplacian_solve`",
        "docs/graph.md",
        "graph",
        "laplacian_solve",
        "scipy cg",
        "scipy",
    ),
    Row(
        "edge weights from labels without the edge",
        "`ops.leave_one_edge_out`",
        "docs/graph.md",
        "graph",
        "leave_one_edge_out",
        "torch.compile",
        "torch.compile",
    ),
    Row(
        "an MLP on all pairs of a batch",
        "`ops.pair_focal_loss`",
        "docs/pairs.md",
        "pairs",
        "pair_focal_loss",
        "split, torch.compile",
        "its layer split by hand, compiled",
        lambda result: result.phase.endswith("concat") and "p" not in result.size,
    ),
    Row(
        "pytorch-metric-learning's `ContrastiveLoss`",
        "`ops.pair_ranking_loss`",
        "docs/ranking.md",
        "ranking",
        "pair_ranking_loss",
        "pytorch-metric-learning",
        "pytorch-metric-learning",
    ),
    Row(
        "the same on pairs mined by other features",
        "`ops.mined_pair_ranking_loss`",
        "docs/ranking.md",
        "ranking",
        "mined_pair_ranking_loss",
        "torch.compile",
        "torch.compile",
    ),
    Row(
        "moments of all cosines",
        "`ops.similarity_moments`",
        "docs/ranking.md",
        "ranking",
        "similarity_moments",
        "torch.compile",
        "torch.compile",
    ),
)


class Bars(NamedTuple):
    """One op of the plot at one size, and which of its peers is the usual library, or the same by hand."""

    label: str
    family: str
    op: str
    size: dict[str, int]
    phase: str
    peers: dict[str, str]
    """Legend -> name of the peer in the results."""


EAGER, COMPILED, LIBRARY = "plain PyTorch, eager", "plain PyTorch, torch.compile", "the usual library, or by hand"
PLOTTED = (
    Bars(
        "instance_matching\n320 × 128,000 slots\nlibrary: SimMatch's code",
        "memory",
        "instance_matching",
        {"B": 320, "K": 128_000},
        "forward + backward",
        {EAGER: "eager", COMPILED: "torch.compile", LIBRARY: "official"},
    ),
    Bars(
        "laplacian_solve\n60,000 nodes, 100 classes\nlibrary: scipy's cg",
        "graph",
        "laplacian_solve",
        {"N": 60_000, "C": 100},
        "",
        {EAGER: "torch sparse CG", LIBRARY: "scipy cg"},
    ),
    Bars(
        "pair_focal_loss\n1,024 × 1,024 pairs\nby hand: split layer, compiled",
        "pairs",
        "pair_focal_loss",
        {"n": 1_024, "h": 128},
        "forward + backward, concat",
        {EAGER: "eager", COMPILED: "torch.compile", LIBRARY: "split, torch.compile"},
    ),
    Bars(
        "pair_ranking_loss\n4,096 rows, d = 128\nlibrary: pytorch-metric-learning",
        "ranking",
        "pair_ranking_loss",
        {"n": 4_096, "d": 128},
        "forward + backward",
        {EAGER: "eager", COMPILED: "torch.compile", LIBRARY: "pytorch-metric-learning"},
    ),
)


KIND = "amd-avx512"
"""The processor whose tables README.md quotes: it has one of every family."""


def read_results(family: str) -> list[Result]:
    values = json.loads((ROOT / "bench" / "results" / f"cpu-{KIND}-{family}.json").read_text())["results"]
    results = [Result.from_json(value) for value in values]
    return [result for result in results if not result.phase.endswith(("growth", "small"))]


def times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def gain(row: Row) -> str:
    """Over all sizes that were measured with that peer, the smallest and the largest ratio of times; and the largest
    ratio of memory with the two amounts."""
    results = [
        result
        for result in read_results(row.family)
        if result.op == row.op and row.peer in result.peers and row.chosen(result) and result.dtype == "float32"
    ]
    ratios = [result.ratio(row.peer) for result in results]
    text = f"{times(min(ratios))} to {times(max(ratios))} times as fast as {row.peer_name}"
    if row.op == "laplacian_solve":
        return text  # scipy's memory is that of one class
    largest = max(results, key=lambda result: result.extra_bytes[row.peer])
    ours, theirs = (largest.extra_bytes[name] / 2**20 for name in ("ours", row.peer))
    return f"{text}; {theirs:,.0f} → {ours:,.0f} MiB"


def table() -> str:
    lines = ["| you have | use | gain |", "|---|---|---|"]
    lines += [f"| {row.have} | [{row.use}]({row.page}) | {gain(row)} |" for row in ROWS]
    return "\n".join(lines) + "\n"


def matching(bars: Bars) -> Result:
    """The one float32 case that the bars are of."""
    (result,) = (
        result
        for result in read_results(bars.family)
        if result.op == bars.op
        and result.dtype == "float32"
        and (not bars.phase or result.phase == bars.phase)
        and "p" not in result.size
        and all(result.size.get(name) == value for name, value in bars.size.items())
    )
    return result


def draw(results: Sequence[Result], digest: str) -> None:
    """Horizontal bars on a logarithmic axis: time with the spread of its calls, and peak extra memory."""
    figure, (time_axes, memory_axes) = _plots.new_figure(2, width=5.4, height=4.6, sharey=True)
    names = ["ssmkernels", EAGER, COMPILED, LIBRARY]
    for position, (bars, result) in enumerate(zip(PLOTTED, results, strict=True)):
        for number, name in enumerate(names):
            peer = "ours" if number == 0 else bars.peers.get(name)
            if peer is None:
                continue
            timing = result.ours if peer == "ours" else result.peers[peer]
            y = position + (number - 1.5) * 0.2
            style = {"height": 0.18, "color": _plots.colour(number), "label": name if position == 0 else None}
            spread = [[1e3 * (timing.median - timing.low)], [1e3 * (timing.high - timing.median)]]
            time_axes.barh(y, 1e3 * timing.median, xerr=spread, ecolor="#444444", capsize=2, **style)
            if peer != "scipy cg":  # measured on one class of a hundred
                memory_axes.barh(y, max(result.extra_bytes[peer] or 0, 2**12) / 2**20, **style)
    _plots.label_axes(
        time_axes,
        title="time of a call (bars: low to high)",
        xlabel="time (ms)",
        ylabel="",
        xscale="log",
        xlim=(1, None),
    )
    _plots.label_axes(
        memory_axes, title="peak extra memory", xlabel="peak (MiB)", ylabel="", xscale="log", xlim=(1, None)
    )
    time_axes.set_yticks(range(len(PLOTTED)), [bars.label for bars in PLOTTED], fontsize="small")
    time_axes.invert_yaxis()
    _plots.shared_legend(figure)
    _plots.save(figure, PLOT, description=digest)


def digest_of(results: Sequence[Result]) -> str:
    """Of the data and of this file and the palette, which the plot is made from."""
    sources = [Path(__file__).read_text(), Path(_plots.__file__).read_text(), *map(repr, results)]
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()


def drawn_digest() -> str:
    from PIL import Image

    return str(Image.open(PLOT).info.get("Description")) if PLOT.exists() else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where something is out of date")
    options = parser.parse_args()
    text = README.read_text()
    before, rest = text.split(BEGIN)
    wanted = before + BEGIN + table() + END + rest.split(END)[1]
    results = [matching(bars) for bars in PLOTTED]
    digest = digest_of(results)
    if not options.check:
        README.write_text(wanted)
        draw(results, digest)
        return 0
    stale = [path.name for path, same in ((README, text == wanted), (PLOT, drawn_digest() == digest)) if not same]
    if stale:
        print(f"out of date: {', '.join(stale)}; run python docs/readme.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

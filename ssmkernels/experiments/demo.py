# SPDX-License-Identifier: BSD-3-Clause
"""``ssmkernels demo``: a few minutes' comparison on real images that come inside scikit-learn, without network or GPU.

Supervised-only, FixMatch and SimMatch learn handwritten digits from a few labels, with the same network, batches,
augmentation and steps; then mixed label propagation labels digits from five of each class, and trains embeddings of
digits that are tried on classes it has not seen; then Mean Teacher learns the digits with and without MLSN's similarity
network, and SLADE's student learns from a teacher's clusters. Last, fused ops are timed beside plain PyTorch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ssmkernels._files import check_folder, write_atomically
from ssmkernels.bench import memory
from ssmkernels.bench.case import run
from ssmkernels.bench.measure import Rates
from ssmkernels.bench.report import table
from ssmkernels.experiments.report import write_report
from ssmkernels.experiments.run import Request, run_table
from ssmkernels.experiments.sources import Source
from ssmkernels.experiments.spec import load_tables, read_tables

# At --share 1. How long they take depends on the processor, which is why the option is not in minutes: the same share
# gives the same numbers everywhere.
STEPS = {"demo-simmatch": 500, "demo-mlsn": 400}
SEEDS = {"demo-simmatch": 3, "demo-mixed-lp": 3, "mixed-lp-table3": 10, "demo-mlsn": 3, "demo-slade": 3}
OP_SECONDS = 6.0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="ssmkernels demo", description=__doc__.splitlines()[0].replace("``", ""))
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of the report (default: %(default)s)"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="of the steps and seeds, more than 0: 1 (the default) takes about ten minutes on two cores, 0.1 about one",
    )
    options = parser.parse_args(argv)
    if not 0 < options.share < float("inf"):
        parser.error(f"--share is {options.share}; it should be positive and finite")
    try:
        check_folder(options.out, "--out")
    except ValueError as error:
        print(f"ssmkernels demo: {error}", file=sys.stderr)
        return 1
    begin = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small for more; a second process loads and augments
    tables = read_tables("Demo", "demo") | {"mixed-lp-table3": load_tables()["mixed-lp-table3"]}
    try:
        for name, seeds in SEEDS.items():
            steps = max(40, int(STEPS.get(name, 0) * options.share))
            settings = [f"steps={steps}", f"run.eval_every={-(-steps // 10)}"] if name in STEPS else []
            settings += [f"first_epoch_steps={steps // 20}"] if name == "demo-simmatch" else []
            chosen = tuple(range(1, max(1, round(seeds * min(1.0, options.share))) + 1))
            run_table(tables[name], Request("short", Source(None), options.out, seeds=chosen, settings=tuple(settings)))
    except KeyboardInterrupt:
        print(f"Stopped. The same command goes on from what is in {options.out}.")
        return 130
    finally:
        torch.set_num_threads(threads)
    write_report(options.out, options.out / "report.html", tables)
    page = options.out / "report.md"
    write_atomically(page, f"{page.read_text(encoding='utf-8')}\n{op_section()}")
    print(
        f"\n{page.read_text(encoding='utf-8')}\nDone after {time.perf_counter() - begin:.0f} s. The report, with plots,"
        f" is in {page}."
    )
    return 0


def op_section() -> str:
    """The op beside plain PyTorch, as ``ssmkernels bench`` measures it."""
    case = next(memory.cases_of_size(rows=128, slots=12800, classes=100, device="cpu", dtype=torch.float32))
    case = replace(case, peers={"eager": case.peers["eager"]})
    result = run(case, device="cpu", rates=Rates(0.0, {}), seconds=OP_SECONDS, say=print)
    return (
        "## The op\n\nThe loss of instance matching on the CPU, and what plain PyTorch (eager) takes for it; medians of"
        f" alternating calls.\n\n{table([result])}\n"
    )

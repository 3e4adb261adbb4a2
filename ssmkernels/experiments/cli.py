# SPDX-License-Identifier: BSD-3-Clause
"""``ssmkernels reproduce NAME``: a table or figure of a paper, with the paper's numbers beside ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssmkernels.experiments import mixed_lp, mlsn, simmatch, slade
from ssmkernels.experiments.experiment import BUDGETS, Experiment, Study, run_experiment

EXPERIMENTS: dict[str, Experiment | Study] = {**simmatch.EXPERIMENTS, **mixed_lp.EXPERIMENTS, **mlsn.EXPERIMENTS, **slade.EXPERIMENTS}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="ssmkernels reproduce", description=__doc__)
    parser.add_argument("name", nargs="?", choices=EXPERIMENTS, metavar="NAME", help="the experiment; --list shows them")
    parser.add_argument("--list", action="store_true", help="list the experiments")
    parser.add_argument("--data", metavar="DIR", help="folder of the paper's images, as the data set's reader wants it")
    parser.add_argument("--budget", choices=BUDGETS, default="smoke", help="how much of the paper's training (default: smoke)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/reproduce"), help="folder for checkpoints and reports (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if options.list or options.name is None:
        width = max(map(len, EXPERIMENTS))
        print("\n".join(f"{name:<{width}}  {experiment.title}" for name, experiment in EXPERIMENTS.items()))
        return 0 if options.list else 2
    out = options.out / f"{options.name}-{options.budget}"
    try:
        experiment = EXPERIMENTS[options.name]
        if isinstance(experiment, Study):
            report = experiment.run(budget=options.budget, data=options.data, out=out)
        else:
            report = run_experiment(experiment, budget=options.budget, data=options.data, out=out)
    except (ValueError, FileNotFoundError, ImportError, FloatingPointError) as error:
        print(f"ssmkernels reproduce: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped. The same command goes on from what is in {out}.")
        return 0
    print(f"\n{report}\nThe report is in {out}.")
    return 0

# SPDX-License-Identifier: BSD-3-Clause
"""``ssmkernels reproduce NAME``: a table or figure of a paper, with the paper's numbers beside ours."""

from __future__ import annotations

import argparse
import difflib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ssmkernels.experiments import mixed_lp, mlsn, simmatch, slade
from ssmkernels.experiments.experiment import BUDGETS, EMBEDDED, Experiment, Study, reproduce
from ssmkernels.experiments.jobs import EXPECTED, this_rank

PAPERS: dict[str, dict[str, Experiment | Study]] = {
    "SimMatch": simmatch.EXPERIMENTS,
    "Mixed label propagation": mixed_lp.EXPERIMENTS,
    "MLSN": mlsn.EXPERIMENTS,
    "SLADE": slade.EXPERIMENTS,
}
EXPERIMENTS = {name: experiment for experiments in PAPERS.values() for name, experiment in experiments.items()}
ALL = "all"

_EPILOG = (
    "A call goes on from what earlier ones with the same --out left: finished cells are kept, failed ones tried again. Under torchrun the "
    "cells are dealt out to the ranks, each with a device of its own."
)


def main(argv: Sequence[str]) -> int:
    """Returns 0 where everything asked for came to an end or was stopped, 1 where something failed, 2 where the arguments are wrong."""
    parser = argparse.ArgumentParser(prog="ssmkernels reproduce", description=__doc__, epilog=_EPILOG)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"the experiment, or {ALL}; --list shows them")
    parser.add_argument("--list", action="store_true", help="list the experiments")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help=f"folder of the paper's images; or a .npz file of images in their place; or {EMBEDDED} for images inside packages, as smoke "
        "has them by default",
    )
    parser.add_argument("--budget", choices=BUDGETS, default="smoke", help="how much of the paper's training (default: smoke)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/reproduce"), help="folder for checkpoints and reports (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if options.list or options.name is None:
        width = max(map(len, EXPERIMENTS))
        print("\n".join(f"{name:<{width}}  {experiment.title}" for name, experiment in EXPERIMENTS.items()))
        return 0 if options.list else 2
    if options.name != ALL and options.name not in EXPERIMENTS:
        parser.error(_unknown(options.name))
    folder = None if options.data == EMBEDDED else options.data
    names = list(EXPERIMENTS) if options.name == ALL else [options.name]
    complete = {}
    for name in names:
        try:
            complete[name] = _reproduce(name, options.budget, folder, options.out)
        except KeyboardInterrupt:
            if this_rank()[0] == 0:
                print(f"Stopped. The same command goes on from what is in {options.out}.")
            return 0
    if len(names) > 1 and this_rank()[0] == 0:
        failed = [name for name, each in complete.items() if not each]
        print(f"{len(names) - len(failed)} of {len(names)} experiments are done. " + (f"Failed: {', '.join(failed)}." if failed else ""))
    # torchrun ends all ranks when one fails: the first one, which writes the reports, speaks for all.
    return 0 if all(complete.values()) or this_rank()[0] > 0 else 1


def _reproduce(name: str, budget: str, folder: str | None, out: Path) -> bool:
    """Runs an experiment, prints its report, and returns whether all of it came to an end."""
    paper = next(paper for paper, experiments in PAPERS.items() if name in experiments)
    place = out / f"{name}-{budget}"
    try:
        report, complete = reproduce(name, EXPERIMENTS[name], paper=paper, budget=budget, folder=folder, out=place)
    except Exception as error:
        if not isinstance(error, EXPECTED):
            traceback.print_exc()
        if this_rank()[0] == 0:
            print(f"ssmkernels reproduce {name}: {error}", file=sys.stderr)
        return False
    if this_rank()[0] == 0:
        print(f"\n{report}\nThe report is in {place}.")
        if not complete:
            print(
                f"ssmkernels reproduce {name}: some cells failed; the report says which, and the same command tries them again",
                file=sys.stderr,
            )
    return complete


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, EXPERIMENTS, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"there is no experiment {name!r}{hint} --list shows all of them, and {ALL} runs them one after another"

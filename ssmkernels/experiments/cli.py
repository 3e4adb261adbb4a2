# SPDX-License-Identifier: BSD-3-Clause
"""``ssmkernels reproduce NAME``: a table or figure of a paper, with the paper's numbers beside ours."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ssmkernels._files import DamagedFile, check_folder
from ssmkernels._names import unknown
from ssmkernels._text import markdown_table
from ssmkernels.experiments.costs import estimate
from ssmkernels.experiments.jobs import EXPECTED, discard_damaged
from ssmkernels.experiments.run import Request, plan, run_table
from ssmkernels.experiments.sources import EMBEDDED, Source
from ssmkernels.experiments.spec import BUDGETS, load_tables
from ssmkernels.trainers.ranks import this_rank

ALL = "all"

OUT = Path("runs/reproduce")
_DATA = (
    "folder of the paper's images; or a .npz file of images, named after the set that it holds, such as cifar10.npz; or"
    f" {EMBEDDED} for images inside packages (default). Cells whose images are not there are left out"
)
_SETTING = "a setting of ssmkernels train, such as precision=bf16-mixed; may be given several times"
_EPILOG = (
    "A call goes on from what earlier ones with the same --out left: finished cells are kept, failed ones tried again."
    " What is not asked for is not run, but stands in the report if it is there. Under torchrun all ranks train a cell"
    " together."
)


def main(argv: Sequence[str]) -> int:
    """Returns 0 where everything asked for came to an end, 1 where something failed, 2 where the arguments are wrong,
    130 where it was stopped.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    tables = load_tables()
    if options.list or options.name is None:
        width = max(map(len, tables))
        print("\n".join(f"{name:<{width}}  {table.title}" for name, table in tables.items()))
        return 0 if options.list else 2
    if options.name != ALL and options.name not in tables:
        parser.error(unknown(f"there is no experiment {options.name!r}", options.name, [*tables, ALL]))
    runs_something = not (options.list_cells or options.dry_run)
    if runs_something:
        try:
            check_folder(options.out, "--out")
        except ValueError as error:
            print(f"ssmkernels reproduce: {error}", file=sys.stderr)
            return 1
    request = Request(
        budget=options.budget,
        source=Source(None if options.data == EMBEDDED else options.data),
        out=options.out,
        rows=tuple(options.rows or ()),
        columns=tuple(options.columns or ()),
        seeds=options.seeds,
        settings=tuple(options.set or ()),
        shard=options.shard,
        check=runs_something,
    )
    act = _list_cells if options.list_cells else _estimate if options.dry_run else _reproduce
    names = list(tables) if options.name == ALL else [options.name]
    complete = {}
    for name in names:
        try:
            complete[name] = act(name, request)
        except KeyboardInterrupt:
            if this_rank()[0] == 0:
                print(f"Stopped. The same command goes on from what is in {options.out}.")
            return 130
        except Exception as error:
            complete[name] = False
            message = str(error)
            if isinstance(error, DamagedFile) and discard_damaged(error, request.jobs):
                message = f"{error.path} is damaged ({error.problem}); the same command makes it again"
            if not isinstance(error, EXPECTED):
                traceback.print_exc()
            if this_rank()[0] == 0:
                print(f"ssmkernels reproduce {name}: {message}", file=sys.stderr)
    if len(names) > 1 and this_rank()[0] == 0:
        failed = [name for name in names if not complete[name]]
        failures = f" Failed: {', '.join(failed)}." if failed else ""
        print(f"{len(names) - len(failed)} of {len(names)} experiments are done.{failures}")
    # torchrun ends all ranks when one fails: the first one, which writes the reports, speaks for all.
    return 0 if all(complete.values()) or this_rank()[0] > 0 else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssmkernels reproduce", description=__doc__.replace("``", ""), epilog=_EPILOG)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"the experiment, or {ALL}; --list shows them")
    parser.add_argument("--list", action="store_true", help="list the experiments")
    parser.add_argument("--data", metavar="DIR", default=EMBEDDED, help=_DATA)
    parser.add_argument("--budget", choices=BUDGETS, default="smoke", help="share of the paper's training (smoke)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for checkpoints and reports (%(default)s)")
    parser.add_argument("--rows", action="append", metavar="ROW", help="run this row; may be given several times")
    parser.add_argument("--columns", action="append", metavar="COLUMN", help="run this column; likewise")
    parser.add_argument("--seeds", type=_seeds, default=(), metavar="1,2", help="run these (those of the budget)")
    parser.add_argument("--set", action="append", type=_setting, metavar="KEY=VALUE", help=_SETTING)
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="run part I of N, I from 1")
    parser.add_argument("--list-cells", action="store_true", help="list the cells and their jobs, and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="show what would run and what it costs, and run nothing")
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is {text!r}; it should be numbers with commas between them") from error


def _setting(text: str) -> str:
    if text.find("=") < 1:
        raise argparse.ArgumentTypeError(f"is {text!r}; it should be KEY=VALUE, such as precision=bf16-mixed")
    return text


def _shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"is {text!r}; it should be I/N with 1 <= I <= N")
    return int(first) - 1, int(count)


def _reproduce(name: str, request: Request) -> bool:
    """Runs an experiment, prints its report, and returns whether all of it came to an end."""
    complete = run_table(load_tables()[name], request)
    if this_rank()[0] == 0:
        report = (request.place(name) / "report.md").read_text(encoding="utf-8")
        print(f"\n{report}\nThe report is in {request.place(name)}.")
        if not complete:
            print(
                f"ssmkernels reproduce {name}: some cells failed; the report says which, and the same command tries"
                " them again",
                file=sys.stderr,
            )
    return complete


def _list_cells(name: str, request: Request) -> bool:
    planned = plan(load_tables()[name], request)
    jobs = {place: job for place, job in planned.jobs.items() if job.name in planned.chosen}
    rows = [[cell.row, cell.column, str(seed), job.name] for (cell, seed), job in jobs.items()]
    for missing in planned.left_out:
        print(f"Left out: {missing}")
    print(markdown_table(["row", "column", "seed", "job"], rows))
    return True


def _estimate(name: str, request: Request) -> bool:
    print(estimate(load_tables()[name], request))
    return True

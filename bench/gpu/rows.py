# SPDX-License-Identifier: BSD-3-Clause
"""The result file of a step: one row at a time, each written before the next begins.

A row that takes the process down stays in the file as such: the step is started again (runner.py) and goes on behind
it. So one illegal access, which leaves a process no CUDA context, costs one row.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bench.gpu.files import write_atomically

T = TypeVar("T")

FAILED = 3  # exit status of a step that came to its end with rows that failed
AGAIN = 75  # exit status of a process that another one has to go on for
DIED = {"state": "failed", "error": "the process died"}


class Rows:
    """Rows by their labels.

    Args:
        path: JSON file; rows that are in it already are not run again.
        seconds: after which a row is given up, with the process.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def run(
        self,
        label: str,
        work: Callable[[], Mapping[str, Any]],
        show: Callable[[Mapping[str, Any]], str] = lambda row: "done",
    ) -> None:
        """``work`` returns what is to be kept. With ``"state": "failed"`` among it, or an error, the row failed."""
        if label in self.rows:
            return
        self._write(label, DIED)
        faulthandler.dump_traceback_later(self.seconds, exit=True)  # also of a kernel that does not end
        try:
            row = {"state": "passed", **work()}
        except Exception as error:
            traceback.print_exc()
            row = {"state": "failed", "error": f"{type(error).__name__}: {error}"[:600]}
        finally:
            faulthandler.cancel_dump_traceback_later()
        self._write(label, row)
        text = row["error"] if "error" in row else show(row)
        print(f"{label}: {text}" + ("" if row["state"] == "passed" else " (FAILED)"), flush=True)
        if "error" in row:
            _free_memory()

    def prepare(self, label: str, work: Callable[[], T]) -> T | None:
        """What other rows need: made again by every process, and None where it failed before."""
        if self.rows.pop(label, {}).get("state") == "failed":
            self._write(label, DIED)
            return None
        made: list[T] = []
        self.run(label, lambda: made.append(work()) or {})  # type: ignore[func-returns-value]
        return made[0] if made else None

    def _write(self, label: str, row: Mapping[str, Any]) -> None:
        self.rows[label] = dict(row)
        write_atomically(self.path, json.dumps(self.rows, indent=1) + "\n")

    def finish(self) -> int:
        """The exit status of the step."""
        failed = [label for label, row in self.rows.items() if row["state"] != "passed"]
        names = f"; failed: {', '.join(failed)}" if failed else ""
        print(f"{len(self.rows) - len(failed)} of {len(self.rows)} rows passed{names}")
        return FAILED if failed or not self.rows else 0


def _free_memory() -> None:
    """What the failed row held on the device; ends the process where its CUDA context is lost."""
    import torch

    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        sys.exit(AGAIN)


def arguments(argv: list[str] | None, description: str) -> argparse.Namespace:
    """What every step of rows takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small, to see that it runs")
    return parser.parse_args(argv)

# SPDX-License-Identifier: BSD-3-Clause
"""Gloo ranks as forks of one process that has loaded everything: torchrun would start each of them anew, and loading
torch, torchvision and Lightning takes longer than most scripts of ranks.

A request is a line of JSON, ``{"size": of ranks, "script": path, "arguments": [str], "output": path}``, and the answer
the exit statuses of the ranks. They see the variables of torchrun, and what they print goes to one file. As with
torchrun, one that fails takes the others down.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

LOADED = (
    *("pytest", "torch._dynamo.backends.common", "torch._inductor.pattern_matcher", "torch.utils.tensorboard"),
    *("torch.distributed.tensor.experimental", "sklearn.cluster", "sklearn.datasets", "faiss"),
    *("pytorch_metric_learning.losses", "matplotlib.backends.backend_agg"),
    *("ssmkernels.nn", "ssmkernels.trainers.cli", "ssmkernels.experiments.cli"),
)
LONGEST = 300  # seconds


class Outcome(NamedTuple):
    statuses: list[int]
    output: str


class Ranks:
    """ranks(2, script, *arguments) runs the script in so many ranks."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, size: int, script: Path, *arguments: object) -> Outcome:
        if self.process is None:
            self.process = self.start()
        assert self.process.stdin is not None and self.process.stdout is not None
        named = {"script": str(script), "arguments": [*map(str, arguments)], "output": str(self.output)}
        print(json.dumps({"size": size, **named}), file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], LONGEST)[0]:
            self.stop()
            raise TimeoutError(f"no result in {LONGEST} s; the ranks printed:\n{self.output.read_text()}")
        return Outcome(json.loads(self.process.stdout.readline()), self.output.read_text())

    def stop(self) -> None:
        """Ends the process and its ranks."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
            self.process = None


def run_rank(rank: int, port: int, request: dict) -> int:
    """The exit status of a script, in a process that has just been forked."""
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    size = str(request["size"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), ROLE_RANK=str(rank), GROUP_RANK="0", GROUP_WORLD_SIZE="1")
    os.environ.update(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, ROLE_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ.update(TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_MAX_RESTARTS="0", TORCHELASTIC_RUN_ID=str(port))
    sys.argv = [request["script"], *request["arguments"]]
    sys.path.insert(0, str(Path(request["script"]).parent))
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(request: dict) -> list[int]:
    Path(request["output"]).write_text("")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun keeps one
    running = {}
    for rank in range(request["size"]):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                status = run_rank(rank, store.port, request)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        running[process] = rank
    statuses = [0] * request["size"]
    while running:
        process, status = os.wait()
        statuses[running.pop(process)] = os.waitstatus_to_exitcode(status)
        if status != 0:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return statuses


def main() -> None:
    for name in LOADED:
        with contextlib.suppress(ImportError):  # some need more than torch
            importlib.import_module(name)
    gc.freeze()  # what is loaded is not looked through again, in no rank
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

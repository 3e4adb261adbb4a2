# SPDX-License-Identifier: BSD-3-Clause
import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssmkernels import data
from ssmkernels.trainers import DataConfig, RunConfig, SimMatchConfig


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Networks this small are slower on more, and far slower where others use the machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of processes that a test starts
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits():
    return data.load_dataset("digits")


@pytest.fixture
def make_run():
    """The settings of a run that takes seconds: make_run(out=...)."""

    def make(**settings):
        small = {"log_every": 2, "eval_every": 4, "checkpoint_every": 100, "accelerator": "cpu", "bar": False}
        return RunConfig(**{**small, **settings})

    return make


@pytest.fixture
def make_config(make_run):
    """A configuration that takes seconds: make_config(steps=4, run={"out": ...}, data={...})."""

    def make(**settings):
        run = make_run(**settings.pop("run", {}))
        images = {"name": "digits", "labels": 20, **settings.pop("data", {})}
        small = {
            "model": "wrn-10-1",
            "batch_size": 8,
            "mu": 2,
            "steps": 8,
            "first_epoch_steps": 2,
            "projection_dim": 16,
        }
        return SimMatchConfig(data=DataConfig(**images), run=run, **{**small, **settings})

    return make


RANK = """
import json, runpy, sys, traceback
import torch.distributed as dist

dist.init_process_group("gloo")
folder, rank = sys.argv[1], dist.get_rank()
with open(f"{folder}/scripts{rank}") as scripts, open(f"{folder}/results{rank}", "w") as results:
    for line in scripts:
        sys.argv = json.loads(line)
        error = None
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except BaseException:
            error = traceback.format_exc()
        print(json.dumps(error), file=results, flush=True)
"""


class TwoRanks:
    """Two Gloo ranks under one torchrun, which run one script after another: starting them takes longer than most
    scripts do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "rank.py").write_text(RANK)
        for name in ("scripts", "results"):
            for rank in range(2):
                os.mkfifo(folder / f"{name}{rank}")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*torchrun, str(folder / "rank.py"), str(folder)], env=environment)
        # Opened for both directions, because opening a pipe in one waits for the other end.
        self.scripts = [os.open(folder / f"scripts{rank}", os.O_RDWR) for rank in range(2)]
        self.results = [os.open(folder / f"results{rank}", os.O_RDWR) for rank in range(2)]

    def __call__(self, script: str, folder: Path, *arguments: str) -> list:
        """What each rank left in ``folder``/rank{r}.pt, after it ran the script with the folder and the arguments as
        sys.argv[1:].
        """
        assert self.process.poll() is None, "the ranks ended in an earlier test"
        path = folder / "script.py"
        path.write_text(script)
        for pipe in self.scripts:
            os.write(pipe, json.dumps([str(path), str(folder), *arguments]).encode() + b"\n")
        waiting = list(self.results)
        while waiting:
            ready, _, _ = select.select(waiting, [], [], 300)
            errors = [self.read(pipe) for pipe in ready]
            if not ready or any(errors):
                self.stop()  # the other rank may wait for this one for ever
                pytest.fail("\n".join(filter(None, errors)) or "no result in 300 s")
            waiting = [pipe for pipe in waiting if pipe not in ready]
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    @staticmethod
    def read(pipe: int) -> str | None:
        with os.fdopen(os.dup(pipe)) as results:
            return json.loads(results.readline())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """A function: two_ranks(script, folder, *arguments) runs a script in both ranks; see :class:`TwoRanks`."""
    ranks = TwoRanks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()

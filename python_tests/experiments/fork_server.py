# SPDX-License-Identifier: BSD-3-Clause
"""Runs commands of ssmkernels in forks of a process that has loaded everything, each with a fault or none.

A request is a line of JSON, ``{"command": ["train", …], "fault": null | ["signal before file event", folder, number,
signal] | ["end after processor time", seconds] | ["largest file", bytes]}``. So is the answer, once the command has
ended or stopped: ``{"process": …, "status": …, "stopped": …, "seconds": of processor time, "stderr": …}``.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

import lightning_fabric
import matplotlib.pyplot
import torch.utils.tensorboard

from ssmkernels import cli, data
from ssmkernels.experiments import cli as experiments_cli
from ssmkernels.experiments import run
from ssmkernels.trainers import cli as trainers_cli

LOADED = (lightning_fabric, matplotlib.pyplot, torch.utils.tensorboard, experiments_cli, trainers_cli)
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}


def signal_before_file_event(folder: str, number: int, signal_number: int) -> None:
    """The process gets a signal before something below ``folder`` is opened, renamed, removed or made for the
    ``number``-th time.
    """
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILE_EVENTS and str(arguments[0]).startswith(folder):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal_number)

    sys.addaudithook(watch)


def end_after_processor_time(seconds: float) -> None:
    """The kernel ends the process at whatever it then is, as SIGKILL does."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def limit_files(size: int) -> None:
    """A write beyond ``size`` bytes fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


FAULTS = {
    "signal before file event": signal_before_file_event,
    "end after processor time": end_after_processor_time,
    "largest file": limit_files,
}


def answer(command: list[str], fault: list[Any] | None) -> dict[str, Any]:
    errors, errors_of_child = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors_of_child, 2)
        if fault is not None:
            FAULTS[fault[0]](*fault[1:])
        status = 1
        try:
            status = cli.main(command)
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(errors_of_child)
    _, status, usage = os.wait4(process, os.WUNTRACED)
    os.set_blocking(errors, False)
    stopped = os.WIFSTOPPED(status)
    try:
        text = os.read(errors, 1 << 16).decode()
    except BlockingIOError:  # it has stopped and has written nothing
        text = ""
    os.close(errors)
    return {
        "process": process,
        "status": None if stopped else os.waitstatus_to_exitcode(status),
        "stopped": stopped,
        "seconds": usage.ru_utime + usage.ru_stime,
        "stderr": text,
    }


def main() -> None:
    data.load_dataset("digits")  # loads scikit-learn
    run.machine_in_words = lambda: "2 x processor, no GPU"
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(request["command"], request["fault"])), flush=True)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""Commands that are killed at moments drawn from a seed, or find the disk full, or files damaged: given again, the same
command ends with the bits of one that nothing happened to.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ssmkernels.trainers.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.long  # they share a process and whole runs

TRAIN = [
    *("train", "simmatch", "--model", "convnet-small", "--data.labels", "20", "--batch_size", "8", "--mu", "1"),
    *("--steps", "6", "--first_epoch_steps", "1", "--projection_dim", "8", "--run.eval_every", "3"),
    *("--run.checkpoint_every", "2", "--run.log_every", "1", "--run.accelerator", "cpu", "--run.bar", "false"),
    *("--resume", "--run.out"),
]
REPRODUCE = [
    *("reproduce", "simmatch-table5", "--rows", "standard", "--seeds", "1"),
    *("--set", "model=convnet-small", "--set", "batch_size=8", "--set", "mu=1", "--set", "steps=6"),
    *("--set", "run.eval_every=3", "--set", "run.checkpoint_every=2", "--set", "run.log_every=1"),
    *("--set", "run.accelerator=cpu", "--set", "run.bar=false", "--set", "run.workers=0", "--out"),
]
COMMANDS = {"train": TRAIN, "reproduce": REPRODUCE}
KILLS = 8
FILE_EVENTS = 40  # about as many as a whole run has


@pytest.fixture(scope="module")
def server():
    """server(command, fault) runs a command; see fork_server.py."""
    script = str(Path(__file__).with_name("fork_server.py"))
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"

    def request(command, fault=None):
        print(json.dumps({"command": command, "fault": fault}), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    yield request
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """whole(name): what a command leaves that nothing happens to, and its processor time. It is run once."""
    done = {}

    def get(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            answer = server([*COMMANDS[name], str(folder)])
            assert (answer["status"], answer["stderr"]) == (0, "")
            done[name] = contents(folder), answer["seconds"]
        return done[name]

    return get


def contents(folder):
    """What a command left, by file, without the times in it; the names of TensorBoard's files have times too. A
    killed process leaves the file of its lock, which nobody holds any more.
    """
    left = {}
    for path in sorted(folder.rglob("*")):
        is_compared = "tfevents" not in path.name and path.suffix != ".md" and path.name != "lock"
        if path.is_file() and is_compared:  # report.md shows record.json
            left[path.relative_to(folder).as_posix()] = content(path)
    return left


def content(path):
    if path.suffix == ".pt":
        state = load_checkpoint(path)
        return plain({**state, "config": {**state["config"], "run": None}})
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {key: plain(torch.from_numpy(arrays[key])) for key in arrays}
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    return without_times(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def plain(value):
    """Tensors as bytes, which == compares."""
    if isinstance(value, dict):
        return {key: plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(member) for member in value]
    return (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def without_times(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "images_per_second", "command")}


def draw_kill(kind, name, folder, draw, seconds):
    if kind == "end after processor time":
        return [kind, draw.uniform(0, seconds)]
    return [kind, str(folder), draw.randint(1, FILE_EVENTS), signal.SIGKILL]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", ["end after processor time", "signal before file event"])
def test_killed_at_any_moment(server, whole, tmp_path, name, kind):
    expected, seconds = whole(name)
    draw = random.Random(f"{name}, {kind}")
    folder, killed = tmp_path / "0", 0
    for number in range(1, KILLS + 1):
        answer = server([*COMMANDS[name], str(folder)], draw_kill(kind, name, folder, draw, seconds))
        if answer["status"] == 0:  # it ended before that
            assert contents(folder) == expected
            folder = tmp_path / str(number)
        else:
            assert answer["status"] < 0, answer
            killed += 1
    answer = server([*COMMANDS[name], str(folder)])
    assert (answer["status"], answer["stderr"]) == (0, "")
    assert contents(folder) == expected
    assert killed > KILLS // 3


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_named_and_nothing_is_lost(server, whole, tmp_path, name):
    expected, _ = whole(name)
    for size in (0, 100, 400, 1000, 40_000):
        answer = server([*COMMANDS[name], str(tmp_path)], ["largest file", size])
        lines = answer["stderr"].splitlines()
        assert answer["status"] == 1 and len(lines) == {"train": 1, "reproduce": 2}[name], answer
        assert re.search(rf"{tmp_path}/\S+ cannot be written: File too large; what was there before is kept$", lines[0])
    answer = server([*COMMANDS[name], str(tmp_path)])
    assert (answer["status"], answer["stderr"]) == (0, "")
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_in_one_folder(server, whole, tmp_path, name):
    command = [*COMMANDS[name], str(tmp_path)]
    first = server(command, ["signal before file event", str(tmp_path), FILE_EVENTS // 3, signal.SIGSTOP])
    assert first["stopped"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (folder,) = tmp_path.rglob("lock")
    second = server(command)
    words = (
        f"{folder.parent} is in use by process {first['process']} on {os.uname().nodename}; wait until that has ended"
    )
    line, *others = second["stderr"].splitlines()
    assert second["status"] == 1 and words in line and len(others) == {"train": 0, "reproduce": 1}[name]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    os.kill(first["process"], signal.SIGKILL)
    assert server(command)["status"] == 0
    assert contents(tmp_path) == whole(name)[0]


@pytest.mark.parametrize("damage", ["torn", "flipped", "of another shape", "of something else"])
def test_a_damaged_checkpoint_is_named_in_one_line(server, tmp_path, damage):
    command = [*TRAIN, str(tmp_path)]
    assert server([*command, "--steps", "2"])["status"] == 0
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    if damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif damage == "of another shape":
        state = load_checkpoint(path)
        state["trainer"]["model"]["classifier.weight"] = torch.zeros(3, 64)
        save_checkpoint(path, state)
    else:
        save_checkpoint(path, {"weights": torch.zeros(3)})
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    answer = server([*command, "--steps", "2"])
    assert answer["status"] == 1 and answer["stderr"].startswith(f"ssmkernels train: {path} ")
    assert answer["stderr"].count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before

# SPDX-License-Identifier: BSD-3-Clause
"""What is kept, skipped, tried again, and dealt out to ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssmkernels._locks import FolderInUse
from ssmkernels.experiments import jobs
from ssmkernels.experiments.jobs import Job, run_jobs, training_name
from ssmkernels.trainers.checkpoint import load_checkpoint, save_checkpoint
from ssmkernels.trainers.cli import parse_config
from ssmkernels.trainers.ranks import alone

ROOT = Path(__file__).parents[2]


def job(name, run):
    return Job(name, f"title of {name}", run)


def state(folder, name):
    return json.loads((folder / name / "job.json").read_text())


def test_finished_jobs_are_kept_and_failed_ones_tried_again(tmp_path, capsys):
    calls = []

    def works(folder):
        calls.append("works")
        return {"folder": folder.name}

    def fails_once(folder):
        calls.append("fails once")
        if calls.count("fails once") == 1:
            raise ValueError("no such image")
        return 2

    def last(folder):
        calls.append("last")
        return 3

    work = [job("a", works), job("b", fails_once), job("c", last)]
    first = run_jobs(tmp_path, work)
    assert (first["a"].value, first["b"].error, first["c"].value) == ({"folder": "a"}, "ValueError: no such image", 3)
    assert "title of b failed: no such image" in capsys.readouterr().err
    second = run_jobs(tmp_path, work)
    assert (second["b"].value, second["b"].error) == (2, None)
    assert calls == ["works", "fails once", "last", "fails once"]
    assert second["a"] == first["a"]


def test_a_stopped_job_is_gone_on_with_and_its_time_counts(tmp_path, monkeypatch):
    clock = iter([0.0, 7.0, 100.0, 102.0])
    monkeypatch.setattr(jobs.time, "perf_counter", lambda: next(clock))
    attempts = []

    def run(folder):
        attempts.append(folder)
        if len(attempts) == 1:
            raise KeyboardInterrupt
        return "done"

    with pytest.raises(KeyboardInterrupt):
        run_jobs(tmp_path, [job("a", run)])
    assert state(tmp_path, "a")["status"] == "stopped"
    outcome = run_jobs(tmp_path, [job("a", run)])["a"]
    assert (outcome.value, outcome.seconds) == ("done", 9.0)
    assert run_jobs(tmp_path, [job("a", run)])["a"] == outcome and len(attempts) == 2


def test_a_job_that_two_cells_share_is_run_once(tmp_path):
    calls = []
    shared = job("same", lambda folder: calls.append(folder) or 1)
    assert list(run_jobs(tmp_path, [shared, shared])) == ["same"] and len(calls) == 1


def test_what_a_job_needs_is_run_before_it(tmp_path, capsys):
    calls = []

    def fails(folder):
        raise ValueError("no weights")

    first = job("first", lambda folder: calls.append("first") or 1)
    second = Job("second", "title of second", lambda folder: calls.append("second") or 2, (first,))
    third = Job("third", "title of third", lambda folder: calls.append("third") or 3, (job("broken", fails),))
    done = run_jobs(tmp_path, [second, third, job("not chosen", fails)], chosen=lambda job: job.name != "not chosen")
    assert calls == ["first", "second"] and done["second"].value == 2
    assert done["third"].error == "ValueError: no weights" and not done["third"].finished
    assert "title of third is left out: title of broken is not finished" in capsys.readouterr().err
    assert (done["not chosen"].value, done["not chosen"].error) == (None, None)


@pytest.mark.parametrize("torn", ["", "{", "[1]", '{"title": "a"}'])
def test_a_damaged_marker_is_named_and_the_job_run_again(tmp_path, capsys, torn):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "job.json").write_text(torn)
    assert run_jobs(tmp_path, [job("a", lambda folder: 1)])["a"].value == 1
    assert "a/job.json is damaged" in capsys.readouterr().err
    assert state(tmp_path, "a")["status"] == "finished"


def reads(file):
    """A job that makes ``file`` in its folder if it is not there, and reads it."""

    def run(folder):
        if not (folder / file).exists():
            save_checkpoint(folder / file, {"made": 1})
        return load_checkpoint(folder / file)["made"]

    return run


def test_a_damaged_file_of_a_job_is_set_aside_and_made_again(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "checkpoint.pt").write_bytes(b"torn")
    assert run_jobs(tmp_path, [job("a", reads("checkpoint.pt"))])["a"].value == 1
    assert "a/checkpoint.pt is damaged" in capsys.readouterr().err
    assert (tmp_path / "a" / "checkpoint.pt.damaged").read_bytes() == b"torn"


def test_a_damaged_file_of_a_job_that_is_needed_is_made_again_by_the_next_call(tmp_path):
    first = job("first", reads("best.pt"))
    second = Job("second", "second", lambda folder: load_checkpoint(tmp_path / "first" / "best.pt")["made"], (first,))
    run_jobs(tmp_path, [first])
    (tmp_path / "first" / "best.pt").write_bytes(b"torn")
    assert "best.pt is damaged" in run_jobs(tmp_path, [second])["second"].error
    assert run_jobs(tmp_path, [second])["second"].value == 1


def test_a_job_that_another_process_runs_is_left_out(tmp_path, capsys, monkeypatch):
    def in_use(folder):
        raise FolderInUse(f"{folder} is in use by process 7 on here")

    monkeypatch.setattr(jobs, "folder_lock", in_use)
    outcome = run_jobs(tmp_path, [job("a", lambda folder: 1)])["a"]
    assert (outcome.value, outcome.error) == (None, None) and not os.listdir(tmp_path)
    assert "title of a is left out" in (shown := capsys.readouterr().err) and "process 7 on here" in shown


def test_names_follow_what_determines_a_run():
    def name(*arguments):
        return training_name("simmatch", parse_config("simmatch", ["--config", "digits", *arguments])[0])

    usual = name()
    assert usual.startswith("simmatch-digits-20-seed1-")
    assert name("--run.out", "elsewhere", "--run.workers", "3", "--data.root", "here") == usual
    assert len({usual, name("--alpha", "0.5"), name("--seed", "2"), name("--run.eval_every", "7")}) == 4


@pytest.mark.parametrize(
    "name",
    [
        "simmatch-digits-20-seed1-d72f95231112",
        "mlsn-digits-20-seed1-1504560d9e0c",
        "mixed-lp-digits-seed1-6ade8bc002f2",
        "slade-digits-seed1-4d5a30cdb592",
        "swav-digits-seed1-09b4d3df4d22",
    ],
)
def test_names_of_jobs_stay(name):
    """Finished runs are found by them: a setting that is new belongs into ``jobs.LATER``."""
    method = name.split("-digits")[0]
    as_all_were = ["--config", "digits", "--data.augment", "pil"]
    assert training_name(method, parse_config(method, as_all_were)[0]) == name


def test_a_rank_alone_does_not_see_the_others(monkeypatch):
    for variable, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "here",
    }.items():
        monkeypatch.setenv(variable, value)
    with alone():
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"} & os.environ.keys()
    assert os.environ["RANK"] == "3"


SCRIPT = """
import sys, time
from pathlib import Path
from ssmkernels.experiments.jobs import Job, run_jobs
from ssmkernels.trainers.ranks import this_rank

rank = this_rank()[0]

def run(number, stops):
    def work(folder):
        if stops and number == 1:
            raise KeyboardInterrupt
        if number == 3:
            raise ValueError("three")
        return [number, rank]
    return work

def jobs(stops):
    return [Job(f"job{n}", f"job {n}", run(n, stops)) for n in range(5)]

folder = Path(sys.argv[1])
outcomes = run_jobs(folder / "all", jobs(False))
print(f"rank {rank}: {[outcome.value or outcome.error for outcome in outcomes.values()]}")
try:
    run_jobs(folder / "stopped", jobs(True))
except KeyboardInterrupt:
    print(f"rank {rank} stopped")
"""


def test_the_first_rank_does_what_is_no_training(ranks, tmp_path):
    """And Ctrl-C there stops the others."""
    (tmp_path / "script.py").write_text(SCRIPT)
    statuses, output = ranks(2, tmp_path / "script.py", tmp_path / "jobs")
    assert statuses == [0, 0], output
    everything = "[[0, 0], [1, 0], [2, 0], 'ValueError: three', [4, 0]]"
    for rank in range(2):
        assert f"rank {rank}: {everything}" in output
        assert f"rank {rank} stopped" in output


SMALL = ["--set", "model=convnet-small", "--set", "batch_size=8", "--set", "mu=1", "--set", "steps=4"]


@pytest.mark.long
def test_all_ranks_train_a_cell_together(tmp_path):
    """The one test in which torchrun itself starts the ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "ssmkernels.cli", "reproduce", "simmatch-table5", *SMALL, "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *command], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    states = [json.loads(path.read_text()) for path in tmp_path.glob("jobs/*/job.json")]
    assert len(states) == 3 and all(state["status"] == "finished" for state in states)
    assert len({state["launch"] for state in states}) == 1 and states[0]["launch"]
    assert done.stdout.count("The report is in") == 1
    assert all(state["value"]["finished"] for state in states)
    assert list(tmp_path.glob("simmatch-table5-smoke*/record.json"))

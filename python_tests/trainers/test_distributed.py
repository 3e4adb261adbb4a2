# SPDX-License-Identifier: BSD-3-Clause
"""Two Gloo ranks; test_jobs.py has torchrun start them."""

import runpy
import signal
import sys

import pytest
import torch

from ssmkernels import cli, data
from ssmkernels.distributed.collectives import is_of_lost_rank
from ssmkernels.nn import sinkhorn_codes
from ssmkernels.trainers.checkpoint import load_checkpoint

COLLECTIVES = """
import sys
import torch
import torch.distributed as dist
from ssmkernels.distributed import all_gather_rows, all_reduce_mean, all_reduce_sum

dist.init_process_group("gloo")
rank = dist.get_rank()
rows = torch.arange(3 * rank, dtype=torch.float32).reshape(-1, 3) + 1  # none on rank 0
torch.save({
    "gathered": all_gather_rows(rows),
    "integers": all_gather_rows(torch.full((2 - rank,), rank)),
    "mean": all_reduce_mean(torch.tensor([1.0, 3.0]) * (rank + 1)),
    "sum": all_reduce_sum(torch.tensor([1.0, 3.0]) * (rank + 1)),
}, f"{sys.argv[1]}/rank{rank}.pt")
"""

TRAINING = """
import sys
import torch
from ssmkernels import data
from ssmkernels.trainers import DataConfig, RunConfig, SimMatch, SimMatchConfig
from ssmkernels.trainers.loop import fit, make_fabric
from dataclasses import asdict

out, memory, split_above = sys.argv[1:]
config = SimMatchConfig(
    data=DataConfig(name="digits", labels=20), model="wrn-10-1", batch_size=8, mu=2, steps=3,
    first_epoch_steps=1, memory=memory, split_memory_above=int(split_above),
    run=RunConfig(out=f"{out}/run", eval_every=2, log_every=1, accelerator="cpu", bar=False),
)
fabric = make_fabric(RunConfig(accelerator="cpu"))
trainer = SimMatch(config, data.load_dataset("digits"), fabric)
result = fit(trainer, fabric=fabric, steps=config.steps, run=config.run, config=asdict(config))
torch.save({"state": trainer.state_dict(), "history": result.history}, f"{out}/rank{fabric.global_rank}.pt")
"""


MIXED_LP = """
import sys
import torch
from ssmkernels import data
from ssmkernels.trainers import CollectionConfig, MixedLP, MixedLPConfig, RunConfig
from ssmkernels.trainers.loop import fit, make_fabric
from dataclasses import asdict

config = MixedLPConfig(
    data=CollectionConfig(name="digits"), model="convnet-small", freeze_bn=True, embedding_dim=8,
    labeled_epochs=2, epochs=1, decay=1.0,
    run=RunConfig(out=f"{sys.argv[1]}/run", eval_every=12, log_every=1, accelerator="cpu", bar=False),
)
fabric = make_fabric(RunConfig(accelerator="cpu"), find_unused_parameters=True)
trainer = MixedLP(config, data.load_collection("digits"), fabric)
result = fit(trainer, fabric=fabric, steps=14, run=config.run, config=asdict(config), best="validation_P@8")
torch.save({"state": trainer.state_dict(), "history": result.history}, f"{sys.argv[1]}/rank{fabric.global_rank}.pt")
"""

SWAV = """
import sys
import torch
from ssmkernels import data
from ssmkernels.nn import sinkhorn_codes
from ssmkernels.trainers import RunConfig, SwAV, SwAVConfig
from ssmkernels.trainers.loop import fit, make_fabric
from dataclasses import asdict

config = SwAVConfig(
    model="convnet-small", hidden_dim=16, embedding_dim=8, num_prototypes=12, queue_length=64,
    queue_from_epoch=0, epochs=1,
    batch_size=32, small_crops=1, small_size=8, learning_rate=3.0, freeze_prototypes_epochs=0,
    run=RunConfig(out=f"{sys.argv[1]}/run", eval_every=3, log_every=1, accelerator="cpu", bar=False),
)
fabric = make_fabric(RunConfig(accelerator="cpu"))
digits = data.load_collection("digits")
trainer = SwAV(config, digits, digits, fabric)
result = fit(trainer, fabric=fabric, steps=4, run=config.run, config=asdict(config))
queue = trainer.queue.clone()
trainer.queue.zero_()
fabric.barrier()
trainer.load_state_dict(torch.load(f"{sys.argv[1]}/run/checkpoint.pt", weights_only=True)["trainer"])
scores = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
mine = scores[:30] if fabric.global_rank == 0 else scores[30:]
torch.save({
    "state": trainer.state_dict(), "history": result.history, "queue": queue, "restored": trainer.queue,
    "codes": sinkhorn_codes(mine, epsilon=0.5),
}, f"{sys.argv[1]}/rank{fabric.global_rank}.pt")
"""


SLOW = """
import sys, time
import torch
from ssmkernels.trainers import RunConfig
from ssmkernels.trainers.first_rank import on_first_rank
from ssmkernels.trainers.loop import make_fabric

fabric = make_fabric(RunConfig(accelerator="cpu", timeout=4.0))

def works():
    time.sleep(10)  # more than the ranks wait for each other
    return torch.ones(2, requires_grad=True) * 3

def fails():
    raise ValueError("k is 9; it should be at most 8")

outcome = [on_first_rank(works, fabric, 4.0)]
try:
    on_first_rank(fails, fabric, 4.0)
except ValueError as error:
    outcome.append(str(error))
torch.save(outcome, f"{sys.argv[1]}/rank{fabric.global_rank}.pt")
"""

STOPS_IN_A_SOLVE = """
import os, signal, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from ssmkernels import graph
from ssmkernels.distributed import is_of_lost_rank, split_rows
from ssmkernels.graph.split.solve import Iteration

dist.init_process_group("gloo", timeout=timedelta(seconds=5))
rank = dist.get_rank()
step, steps = Iteration._step, []

def stops(self, *vectors):
    steps.append(None)
    if rank == 1 and len(steps) == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    step(self, *vectors)

Iteration._step = stops
features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
own = split_rows(60, rank, 2)
split = graph.knn_graph(features[own], 5, group=None)
try:
    graph.label_propagation(split, torch.where(torch.arange(60) < 9, torch.arange(60) % 3, -1)[own], num_classes=3)
except RuntimeError as error:
    assert len(steps) == 3 and is_of_lost_rank(error), (len(steps), error)
    sys.exit(7)
"""

STEPS_OF_LOST = [
    *["simmatch", "--data.name", "digits", "--data.labels", "20", "--model", "convnet-small", "--batch_size", "8"],
    *["--mu", "2", "--steps", "9", "--run.eval_every", "9", "--run.checkpoint_every", "3", "--run.accelerator", "cpu"],
    *["--run.bar", "false"],
]

COMMAND = """
import os, sys
import torch
from ssmkernels.trainers.cli import main

folder, *arguments = sys.argv[1:]
torch.save(main(arguments), f"{folder}/rank{os.environ['RANK']}.pt")
"""

STOPS_ITSELF = """
import os, signal, sys
from ssmkernels.trainers import SimMatch
from ssmkernels.trainers.cli import main

step = SimMatch.step

def stops(self, batch, number):
    if number == 5 and self.fabric.global_rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return step(self, batch, number)

SimMatch.step = stops
sys.exit(main(sys.argv[1:]))
"""


FINISHED = """
import contextlib, io, os, sys
import torch
from ssmkernels import cli

folder, *arguments = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()) as output:
    code = cli.main(arguments)
torch.save([code, output.getvalue()], f"{folder}/rank{os.environ['RANK']}.pt")
"""


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    steps = ["--model", "wrn-10-1", "--data.labels", "20", "--batch_size", "8", "--mu", "1", "--steps", "2"]
    assert cli.main(["train", "simmatch", *steps, "--run.accelerator", "cpu", "--run.out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize("count", [3, 600])  # one batch of 256 for both ranks, three
def test_ranks_share_predictions_out(two_ranks, finished_run, tmp_path, count, monkeypatch):
    (tmp_path / "images").mkdir()
    test = data.load_dataset("digits").train
    for number in range(count):
        test.image(number).save(tmp_path / "images" / f"{number:03}.png")
    command = ["predict", str(finished_run), "--data", str(tmp_path / "images"), "--accelerator", "cpu"]
    assert cli.main([*command, "--out", str(tmp_path / "alone")]) == 0
    files = f"{count} images: wrote {tmp_path / 'ranks' / 'predictions.csv'}\n"
    assert two_ranks(FINISHED, tmp_path, *command, "--out", str(tmp_path / "ranks")) == [[0, files], [0, ""]]
    alone, ranks = ((tmp_path / name / "predictions.csv").read_text() for name in ("alone", "ranks"))
    assert ranks == alone and ranks.count("\n") == count + 1
    before = (tmp_path / "ranks" / "predictions.csv").stat()
    assert two_ranks(FINISHED, tmp_path, *command, "--out", str(tmp_path / "ranks")) == [[1, ""], [1, ""]]
    assert (tmp_path / "ranks" / "predictions.csv").stat().st_mtime_ns == before.st_mtime_ns


def test_ranks_evaluate_and_export_together(two_ranks, finished_run, tmp_path, capsys):
    capsys.readouterr()
    command = ["evaluate", str(finished_run), "--accelerator", "cpu"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) > 2
    assert two_ranks(FINISHED, tmp_path, *command) == [[0, shown], [0, ""]]  # shares of hits of the same images
    export = ["export", str(finished_run), "--out", str(tmp_path / "ranks")]
    files = f"wrote weights.pt, program.pt2, README.md in {tmp_path / 'ranks'}\n"
    assert two_ranks(FINISHED, tmp_path, *export) == [[0, files], [0, ""]]
    assert cli.main(["export", str(finished_run), "--out", str(tmp_path / "alone")]) == 0
    first, second = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("alone", "ranks"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_rank_that_is_lost_ends_the_others_and_the_run_resumes(ranks, two_ranks, tmp_path):
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    assert two_ranks(COMMAND, tmp_path, *STEPS_OF_LOST, "--run.out", str(whole)) == [0, 0]

    (tmp_path / "stops.py").write_text(STOPS_ITSELF)
    statuses, output = ranks(2, tmp_path / "stops.py", *STEPS_OF_LOST, "--run.out", lost, "--run.timeout", "3")
    assert statuses == [1, -signal.SIGKILL], output  # the second only when the first had ended
    assert "another rank ended, or did not answer for 3 s (--run.timeout); --resume goes on" in output, output

    assert load_checkpoint(lost / "checkpoint.pt")["step"] == 3
    resumed = two_ranks(COMMAND, tmp_path, *STEPS_OF_LOST, "--run.out", str(lost), "--resume")
    assert resumed == [0, 0]
    first, second = (load_checkpoint(folder / "checkpoint.pt")["trainer"] for folder in (whole, lost))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_rank_that_is_lost_in_a_split_solve_ends_the_others(ranks, tmp_path):
    (tmp_path / "stops.py").write_text(STOPS_IN_A_SOLVE)
    statuses, output = ranks(2, tmp_path / "stops.py")
    assert statuses == [7, -signal.SIGKILL], output  # the second only when the first had ended


def test_the_first_rank_may_work_for_longer_than_the_others_wait(two_ranks, tmp_path):
    for outcome in two_ranks(SLOW, tmp_path):
        assert outcome[0].tolist() == [3, 3]
        assert not outcome[0].requires_grad
        assert outcome[1] == "k is 9; it should be at most 8"


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242", True),
        ("Application timeout caused pair closure", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_errors_of_a_lost_rank(message, lost):
    assert is_of_lost_rank(RuntimeError(message)) is lost


def test_collectives(two_ranks, tmp_path):
    ranks = two_ranks(COLLECTIVES, tmp_path)
    for result in ranks:
        assert result["gathered"].tolist() == [[1, 2, 3]]
        assert result["integers"].tolist() == [0, 0, 1]
        assert result["mean"].tolist() == [1.5, 4.5]
        assert result["sum"].tolist() == [3, 9]


@pytest.mark.parametrize("memory", ["temporal", "teacher"])
def test_ranks_agree_on_everything(two_ranks, tmp_path, memory):
    first, second = two_ranks(TRAINING, tmp_path, memory, str(2**30))
    assert set(first["state"]) == {"model", "teacher", "alignment", "optimizer", "memory"}
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert first["state"]["memory"]["bank"].abs().sum() > 0
    assert first["state"]["alignment"]["position"].item() == 3
    assert first["history"] == second["history"]
    assert (tmp_path / "run" / "checkpoint.pt").exists()

    (tmp_path / "split").mkdir()
    for split in two_ranks(TRAINING, tmp_path / "split", memory, "0"):
        # Gradients through the memory differ by 1e-5 of their size, what instance_matching(group=) promises. Three
        # steps of rate .03 and Nesterov momentum .9 move a weight by at most .03·(1.9 + 2.71 + 3.44) = .24 of a
        # gradient, so by 2.4e-6 for gradients up to 1; the factor 4 is for what later steps make of the difference.
        torch.testing.assert_close(split["state"], first["state"], rtol=0, atol=1e-5)


def test_ranks_of_mixed_label_propagation_agree_with_each_other_and_with_one_process(two_ranks, tmp_path, monkeypatch):
    first, second = two_ranks(MIXED_LP, tmp_path)
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert first["history"] == second["history"]
    assert (tmp_path / "run" / "best.pt").exists()

    (tmp_path / "alone").mkdir()
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path / "alone")])
    runpy.run_path(str(tmp_path / "script.py"))
    alone = torch.load(tmp_path / "alone" / "rank0.pt", weights_only=True)
    # Frozen batch norm makes rows independent, so two halves of a batch are the batch but for rounding.
    for name, value in alone["state"]["model"].items():
        torch.testing.assert_close(first["state"]["model"][name], value, rtol=1e-2, atol=1e-4, msg=name)
    assert (first["state"]["labels"] == alone["state"]["labels"]).float().mean() > 0.98
    assert first["history"][0]["loss"] == pytest.approx(alone["history"][0]["loss"], rel=1e-3)


def test_ranks_of_swav_agree_and_balance_codes_together(two_ranks, tmp_path):
    first, second = two_ranks(SWAV, tmp_path)
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert first["history"] == second["history"]

    # Each rank keeps a share of the queue, and a checkpoint all of it.
    assert first["queue"].shape == second["queue"].shape == (2, 32, 8)
    assert not torch.equal(first["queue"], second["queue"])
    torch.testing.assert_close(
        torch.cat([first["queue"], second["queue"]], dim=1).transpose(0, 1), first["state"]["queue"], rtol=0, atol=0
    )
    for rank in (first, second):
        torch.testing.assert_close(rank["restored"], rank["queue"], rtol=0, atol=0)

    scores = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        torch.cat([first["codes"], second["codes"]]), sinkhorn_codes(scores, epsilon=0.5), rtol=1e-12, atol=0
    )

# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints of which every rank writes a share."""

import hashlib
import os
import pickle
import signal

import pytest
import torch

from ssmkernels._files import DamagedFile, WriteError
from ssmkernels.trainers import sharded
from ssmkernels.trainers.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

RUN = """
import sys
import torch
from dataclasses import asdict
from ssmkernels import data
from ssmkernels.trainers import CollectionConfig, MixedLP, MixedLPConfig, RunConfig
from ssmkernels.trainers.loop import fit, make_fabric

out, run, steps, form = sys.argv[1:]
config = MixedLPConfig(
    data=CollectionConfig(name="digits"), model="convnet-small", freeze_bn=True, embedding_dim=8,
    labeled_epochs=2, epochs=1, decay=1.0,
    run=RunConfig(
        out=run, eval_every=100, log_every=1, checkpoint_every=2, checkpoint=form, accelerator="cpu", bar=False
    ),
)
fabric = make_fabric(RunConfig(accelerator="cpu"), find_unused_parameters=True)
trainer = MixedLP(config, data.load_collection("digits"), fabric)
begun = {}
batches = trainer.batches
def remembered(step):
    begun.update(step=step, model={name: value.clone() for name, value in trainer.network.state_dict().items()})
    return batches(step)
trainer.batches = remembered
result = fit(trainer, fabric=fabric, steps=int(steps), run=config.run, config=asdict(config), resume=True)
torch.save({"begun": begun, "state": trainer.state_dict()}, f"{out}/rank{fabric.global_rank}.pt")
"""

KILLED = """
import os, signal, sys
import torch
import torch.distributed as dist
from pathlib import Path
from ssmkernels.trainers import sharded

dist.init_process_group("gloo")
folder, rank = Path(sys.argv[1]), dist.get_rank()
state = {"weights": torch.full((1000,), 1.0), "others": torch.full((1000,), 2.0), "step": 1}
saver = sharded.Saver(folder, 20.0)
saver.save(state, 1)
saver.wait()
write = sharded._Writer.write_data

def killed(self, plan, planner):
    result = write(self, plan, planner)
    if rank == 1:
        dist.barrier(saver.group)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier(saver.group)
    return result

sharded._Writer.write_data = killed
state["weights"].fill_(7.0)
saver.save({**state, "step": 2}, 2)
saver.wait()
"""

SPLIT = """
import sys
import torch
import torch.distributed as dist
from pathlib import Path
from unittest import mock
from ssmkernels import nn
from ssmkernels.distributed import RowShard, sharded_states, split_rows
from ssmkernels.trainers import sharded

K, D, L = 61, 8, 7
folder, size, before, step = Path(sys.argv[1]), *map(int, sys.argv[2:])
if size > 1:
    dist.init_process_group("gloo")
rank = dist.get_rank() if size > 1 else 0
rows = split_rows(K, rank, size)
labels = torch.arange(K) * 3 % L

def drawn(seed):
    return torch.randn(K, D, generator=torch.Generator().manual_seed(seed))

def made(**group):
    return nn.LabeledMemory(K, D, L, labels=labels, mode="teacher", **group)

memory, alone = made(split=True), made(group="local")
if before:
    state = sharded.load(sharded.latest(folder))["memory"]
    of_ranks = [split_rows(K, other, before) for other in range(before)]
    needed = sum(max(run.start, rows.start) < min(run.stop, rows.stop) for run in of_ranks)
    with mock.patch.object(sharded, "_read", side_effect=sharded._read) as reads:
        memory.load_state_dict(state)
    assert reads.call_count == (2 * needed if before > 1 else 0)  # embeddings and labels; no part of other rows
    alone.load_state_dict(state)
    torch.testing.assert_close(alone.features(), torch.nn.functional.normalize(drawn(step - 1), dim=1))
    assert memory.features().equal(alone.features())
    assert state["bank"].shape == (K, D) and state["bank"][20:41].equal(alone.bank[20:41])
memory.update(torch.arange(K)[rows], drawn(step)[rows], labels[rows])
with mock.patch.object(dist, "all_gather_into_tensor", side_effect=AssertionError("nothing is gathered")):
    with sharded_states():
        state = {"step": step, "memory": memory.state_dict(), "other": torch.ones(3)}
if size > 1:
    assert isinstance(state["memory"]["bank"], RowShard) and len(state["memory"]["bank"].rows) == rows.stop - rows.start
saver = sharded.Saver(folder, 20.0)
saver.save(state, step)
saver.wait()
"""


def state():
    return {
        "model": {"weight": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), "none": torch.empty(0, 3)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "history": [{"step": 2, "loss": 0.5}],
        "labels": torch.arange(5),
    }


def save(folder, step, what):
    saver = sharded.Saver(folder, 30.0)
    saver.save(what, step)
    saver.wait()
    return folder / f"step-{step}"


def test_what_is_loaded_is_what_was_saved(tmp_path):
    original = state()
    saver = sharded.Saver(tmp_path, 30.0)
    saver.save(original, 3)
    expected = original["labels"].clone()
    original["labels"].zero_()  # as training goes on while it is written
    saver.save({"step": 4}, 4)
    assert latest_checkpoint(tmp_path) is None  # not a folder of a run
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert sharded.load(sharded.latest(tmp_path)) == {"step": 4}
    path = save(tmp_path, 5, {**original, "labels": expected})
    loaded = load_checkpoint(path)
    assert loaded["history"] == original["history"]
    assert loaded["optimizer"]["param_groups"] == original["optimizer"]["param_groups"]
    torch.testing.assert_close(
        [loaded["model"], loaded["labels"], loaded["optimizer"]["state"]],
        [original["model"], expected, original["optimizer"]["state"]],
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("damage", ["torn", "changed", "missing"])
def test_a_damaged_part_is_named(tmp_path, name, damage):
    path = save(tmp_path, 1, state()) / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "torn" else content[:-9] + b"x" + content[-8:])
    with pytest.raises(DamagedFile, match=f"{name} is (damaged|missing)"):
        load_checkpoint(path.parent)


class _Harmful:
    def __reduce__(self):
        return os.mkdir, ("made",)


def test_a_description_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1, state()) / ".metadata"
    path.write_bytes(pickle.dumps(_Harmful()))
    path.with_name(".metadata.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=r"does not describe a checkpoint: posix\.mkdir is not part of one"):
        load_checkpoint(path.parent)
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_that_is_not_whole_is_none(tmp_path):
    save(tmp_path, 1, state())
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "__0_0.distcp").write_bytes(b"half")
    assert sharded.latest(tmp_path).name == "step-1"
    sharded.Saver(tmp_path, 30.0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_the_later_of_two_forms_counts(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1})
    path = save(tmp_path / sharded.FOLDER, 2, {"step": 2})
    assert latest_checkpoint(tmp_path) == path
    os.utime(tmp_path / "checkpoint.pt", ns=(path.stat().st_mtime_ns + 1,) * 2)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint.pt"


def test_a_split_memory_is_written_in_parts_and_read_by_other_numbers_of_ranks(ranks, tmp_path):
    """2 → 4 → 1 → 3 ranks; each rank writes its own rows, and reads no others of a rank whose rows it does not have."""
    script = tmp_path / "split.py"
    script.write_text(SPLIT)
    for step, (before, size) in enumerate(((0, 2), (2, 4), (4, 1), (1, 3)), start=1):
        statuses, output = ranks(size, script, tmp_path / "checkpoint", size, before, step)
        assert statuses == [0] * size, output
        assert len(list(tmp_path.glob("checkpoint/*/*.distcp"))) == size


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    path = save(tmp_path, 1, state())
    monkeypatch.setattr(sharded._Writer, "write_data", full)
    with pytest.raises(WriteError, match="step-2 cannot be written: No space left on device"):
        save(tmp_path, 2, state())
    assert sharded.latest(tmp_path) == path


def test_a_rank_that_is_killed_while_it_saves_leaves_the_checkpoint_before(ranks, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    statuses, output = ranks(2, script, tmp_path / "checkpoint")
    assert -signal.SIGKILL in statuses, output
    assert (tmp_path / "checkpoint" / "step-2").is_dir()
    loaded = sharded.load(sharded.latest(tmp_path / "checkpoint"))
    assert loaded["step"] == 1
    assert torch.equal(loaded["weights"], torch.full((1000,), 1.0))


def test_a_run_goes_on_with_other_numbers_of_ranks(ranks, tmp_path):
    """2 → 1 → 4 ranks, against one process. Frozen batch norm makes rows independent, so that parts of a batch are the
    batch but for rounding.
    """
    script = tmp_path / "run.py"
    script.write_text(RUN)
    run = tmp_path / "run"
    before = {}
    for size, steps in ((2, 4), (1, 6), (4, 8)):
        statuses, output = ranks(size, script, tmp_path, run, steps, "sharded")
        assert statuses == [0] * size, output
        for rank in range(size):
            results = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
            assert results["begun"]["step"] == before.get("step", 0)
            if before:
                torch.testing.assert_close(results["begun"]["model"], before["model"], rtol=0, atol=0)
        shares = list((run / "checkpoint" / f"step-{steps}").glob("*.distcp"))
        assert len(shares) == size  # of every rank
        before = {"step": steps, "model": results["state"]["model"]}
    assert not (run / "checkpoint.pt").exists()

    statuses, output = ranks(1, script, tmp_path, tmp_path / "alone", 8, "file")
    assert statuses == [0], output
    alone = torch.load(tmp_path / "rank0.pt", weights_only=True)
    torch.testing.assert_close(before["model"], alone["state"]["model"], rtol=1e-2, atol=1e-4)

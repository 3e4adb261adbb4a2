# SPDX-License-Identifier: BSD-3-Clause
"""Loggers of Fabric: what metrics.jsonl has is in each of them, also after a run was resumed."""

import csv
import json
import sys
import types

import pytest
import torch

from ssmkernels.trainers.cli import main
from ssmkernels.trainers.progress import RunLog

RUN = ["--data.labels", "20", "--batch_size", "4", "--mu", "1", "--steps", "4", "--model", "convnet-small"]
EVERY = ["--run.log_every", "1", "--run.eval_every", "2", "--run.accelerator", "cpu", "--run.bar", "false"]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table(folder):
    """Rows of the CSV as records of metrics.jsonl."""
    with open(folder / "csv" / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    lines = []
    for row in rows:
        (group,) = {name.partition("/")[0] for name in row if name != "step"}
        values = {name.partition("/")[2]: value for name, value in row.items() if name != "step"}
        lines.append({"step": row["step"], "group": group, **values})
    return lines


def log_losses(folder, losses, start=0, logger="csv"):
    folder.mkdir(exist_ok=True)
    scalars = {"images_per_step": 1, "scalars": dict, "shown": (), "bar": False}
    with RunLog(folder, steps=9, start=start, window={}, logger=logger, **scalars) as log:
        for loss in losses:
            log.add({"loss": torch.tensor(loss)})
            log.flush()


def test_csv(tmp_path):
    assert main(["simmatch", *RUN, *EVERY, "--run.logger", "csv", "--run.out", str(tmp_path)]) == 0
    assert table(tmp_path) == records(tmp_path)
    assert {record["group"] for record in table(tmp_path)} == {"train", "test"}
    assert not (tmp_path / "tensorboard").exists()


def test_csv_of_a_resumed_run(tmp_path):
    """Steps after the checkpoint are done again, and are in the table once."""
    log_losses(tmp_path, [1.0, 2.0, 3.0, 4.0])
    log_losses(tmp_path, [5.0], start=2)
    assert [(row["step"], row["loss"]) for row in table(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 5.0)]


def test_tensorboard_is_the_default(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_losses(tmp_path, [1.0, 2.0, 3.0], logger="tensorboard")
    log_losses(tmp_path, [7.0], start=2, logger="tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 7.0)]
    assert main(["simmatch", *RUN, *EVERY, "--run.out", str(tmp_path / "run")]) == 0
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_no_logger(tmp_path):
    log_losses(tmp_path, [1.0], logger="none")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_weights_and_biases(tmp_path, monkeypatch):
    """One run for a folder, whenever it is resumed, through wandb's own logger for Fabric."""
    made = []

    class WandbLogger:
        def __init__(self, **settings):
            self.settings, self.logged = settings, []
            made.append(self)

        def log_metrics(self, metrics, step):
            self.logged.append((step, metrics["train/loss"]))

        def finalize(self, status):
            self.status = status

    module = types.ModuleType("wandb.integration.lightning.fabric")
    module.WandbLogger = WandbLogger
    monkeypatch.setitem(sys.modules, "wandb.integration.lightning.fabric", module)
    log_losses(tmp_path / "run", [1.0, 2.0], logger="wandb")
    log_losses(tmp_path / "run", [3.0], start=2, logger="wandb")
    log_losses(tmp_path / "other", [4.0], logger="wandb")
    assert [logger.logged for logger in made] == [[(1, 1.0), (2, 2.0)], [(3, 3.0)], [(1, 4.0)]]
    first, again, other = (logger.settings for logger in made)
    assert first == again
    assert (first["name"], first["project"], first["resume"]) == ("run", "ssmkernels", "allow")
    assert first["id"] != other["id"]


def test_a_logger_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb.integration.lightning.fabric", None)
    assert main(["simmatch", *RUN, *EVERY, "--run.logger", "wandb", "--run.out", str(tmp_path / "run")]) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("ssmkernels train: --run.logger wandb needs wandb")
    assert message.endswith("pip install wandb")

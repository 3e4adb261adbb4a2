# SPDX-License-Identifier: BSD-3-Clause
"""Runs go on, and are evaluated, when the weights and lists that they began with are gone or changed."""

import os
import signal

import pytest
import torch

from ssmkernels import cli, finished, models
from ssmkernels.trainers import MLSN, MixedLP, SimMatch, Slade, SwAV
from ssmkernels.trainers.checkpoint import load_checkpoint

CPU = ["--run.accelerator", "cpu", "--run.bar", "false"]
NETWORK = ["--model", "convnet-small"]
CLASSIFIER = [*NETWORK, "--batch_size", "4", "--steps", "6", "--run.eval_every", "3"]
STUDENT = ["--teacher_steps", "3", "--warm_up_steps", "1", "--student_steps", "3", "--k", "4", "--batch_size", "8"]
FEW = ["--data.images_per_class", "8", "--data.labels_per_class", "2", "--k", "4", "--batch_size", "8"]
SHORT = {
    "mixed-lp": [*NETWORK, *FEW, "--freeze_bn", "false", "--labeled_epochs", "1", "--epochs", "2"],
    "mlsn": [*CLASSIFIER, "--pairs", "8", "--hidden_features", "8"],
    "simmatch": [*CLASSIFIER, "--mu", "1", "--projection_dim", "8"],
    "slade": [*NETWORK, *STUDENT, "--freeze_bn", "false", "--learning_rate", "1e-3"],
    "swav": [
        *NETWORK,
        *["--hidden_dim", "8", "--num_prototypes", "8", "--queue_length", "0", "--small_crops", "0"],
        *["--epochs", "3", "--batch_size", "256"],
    ],
}
TRAINERS = {"mixed-lp": MixedLP, "mlsn": MLSN, "simmatch": SimMatch, "slade": Slade, "swav": SwAV}
LABELED = ("mlsn", "simmatch")
CLASSES = [f"{number} {part}" for number, part in enumerate(["test", "train", "train", "train", "val"] * 2)]


@pytest.fixture
def inputs(tmp_path):
    """Weights, a list of labelled images and one of classes."""
    network = models.build_embedding_model("convnet-small", in_channels=1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.25)  # others than a run begins with by itself
    torch.save(models.backbone_state(network.backbone), tmp_path / "weights.pth")
    (tmp_path / "images.txt").write_text("".join(f"{3 * number}\n" for number in range(40)))
    (tmp_path / "classes.list").write_text("\n".join(CLASSES))
    return tmp_path


def command(method, folder, *options):
    inputs = folder.parent
    given = ["--weights", str(inputs / "weights.pth")]
    if method in LABELED:
        given += ["--data.labels_file", str(inputs / "images.txt")]
    else:
        given += ["--data.classes_file", str(inputs / "classes.list")]
    return ["train", method, *SHORT[method], *CPU, *given, "--run.out", str(folder), *options]


def stop_before(monkeypatch, method, count):
    """The next run is asked to end when its step ``count`` begins, which it ends after."""
    trainer, calls = TRAINERS[method], []
    step = trainer.step

    def stopping(self, batch, number):
        calls.append(number)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number)

    monkeypatch.setattr(trainer, "step", stopping)


def remove(folder):
    for name in ("weights.pth", "images.txt", "classes.list"):
        (folder / name).unlink()


def change(folder):
    (folder / "weights.pth").write_bytes(b"others")
    (folder / "images.txt").write_text("".join(f"{3 * number + 1}\n" for number in range(40)))
    (folder / "classes.list").write_text("\n".join(reversed(CLASSES)).replace("9 val", "9 train"))


@pytest.mark.parametrize(
    ("method", "lose"), [*((method, remove) for method in SHORT), ("simmatch", change), ("slade", change)]
)
def test_a_run_goes_on_without_what_it_began_with(inputs, monkeypatch, capsys, method, lose):
    whole, stopped = inputs / "whole", inputs / "stopped"
    assert cli.main(command(method, whole)) == 0
    with monkeypatch.context() as patch:
        stop_before(patch, method, 2)
        assert cli.main(command(method, stopped)) == 143
    assert load_checkpoint(stopped / "checkpoint.pt")["step"] == 2
    lose(inputs)
    capsys.readouterr()
    assert cli.main(command(method, stopped, "--resume")) == 0
    messages = [line for line in capsys.readouterr().err.splitlines() if "has changed since the run began" in line]
    assert len(messages) == (lose is change)
    states = [load_checkpoint(folder / "checkpoint.pt") for folder in (whole, stopped)]
    assert states[0]["step"] == states[1]["step"] > 2
    torch.testing.assert_close(states[0]["trainer"], states[1]["trainer"], rtol=0, atol=0)
    assert cli.main(["evaluate", str(stopped), "--accelerator", "cpu"]) == 0
    shown = capsys.readouterr()
    last = {name: value for name, value in states[0]["history"][-1].items() if f"\n{name}: " in shown.out}
    assert last
    assert all(f"\n{name}: {value}\n" in shown.out for name, value in last.items())
    assert ("has changed since the run began" in shown.err) == (lose is change)
    assert " was " not in shown.err


def test_another_list_of_labels_is_refused(inputs, capsys):
    assert cli.main(command("simmatch", inputs / "run")) == 0
    (inputs / "images.txt").rename(inputs / "moved.txt")
    again = command("simmatch", inputs / "run", "--resume", "--data.labels_file", str(inputs / "moved.txt"))
    assert cli.main(again) == 0
    (inputs / "moved.txt").write_text("1\n2\n3\n4\n")
    capsys.readouterr()
    assert cli.main(again) == 1
    assert f"has other labelled images than {inputs / 'moved.txt'}; give it as" in capsys.readouterr().err


@pytest.mark.parametrize("count", [2, 9])  # in the first fold, in the second one
def test_folds_go_on_without_what_they_began_with(inputs, monkeypatch, capsys, count):
    (inputs / "classes.list").write_text("\n".join(CLASSES).replace("val", "train"))
    folds = ["--data.fold", "null", "--data.folds", "2"]
    assert cli.main(command("slade", inputs / "whole", *folds)) == 0
    with monkeypatch.context() as patch:
        stop_before(patch, "slade", count)
        assert cli.main(command("slade", inputs / "stopped", *folds)) == 143
    remove(inputs)
    assert cli.main(command("slade", inputs / "stopped", *folds, "--resume")) == 0
    first, second = ((inputs / name / "metrics.jsonl").read_text() for name in ("whole", "stopped"))
    assert first == second
    capsys.readouterr()
    figures = finished.evaluate_folds(inputs / "stopped", accelerator="cpu")
    assert all(f'"{name}": {value}' in first for name, value in figures.items())
    assert cli.main(["evaluate", str(inputs / "stopped"), "--accelerator", "cpu"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["after step 14:", *(f"{name}: {value}" for name, value in figures.items())]
    assert not shown.err
    (inputs / "stopped" / "metrics.jsonl").unlink()
    assert cli.main(["evaluate", str(inputs / "stopped")]) == 1
    assert "go on with --resume until all have ended" in capsys.readouterr().err

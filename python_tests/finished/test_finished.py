# SPDX-License-Identifier: BSD-3-Clause
"""``ssmkernels evaluate``, ``predict`` and ``export`` of tiny runs of every trainer, through the command line."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ssmkernels import cli, data, metrics
from ssmkernels.trainers.checkpoint import load_checkpoint, save_checkpoint

COLLECTION = ["--model", "convnet-small", "--freeze_bn", "false", "--embedding_dim", "8"]
MIXED_LP = ["--data.images_per_class", "12", "--k", "5", "--batch_size", "16", "--labeled_epochs", "1", "--epochs", "2"]
SLADE = ["--teacher_steps", "3", "--warm_up_steps", "1", "--student_steps", "3", "--k", "4", "--batch_size", "8"]
SWAV = ["--model", "convnet-small", "--hidden_dim", "16", "--embedding_dim", "8", "--num_prototypes", "8"]
CLASSIFIER = [
    "--model",
    "wrn-10-1",
    "--data.labels",
    "20",
    "--batch_size",
    "8",
    "--steps",
    "4",
    "--run.eval_every",
    "2",
]
TRAIN = {
    "mixed-lp": [*COLLECTION, *MIXED_LP],
    "mlsn": [*CLASSIFIER, "--pairs", "8", "--hidden_features", "8"],
    "simmatch": [*CLASSIFIER, "--mu", "1", "--projection_dim", "8"],
    "slade": [*COLLECTION, *SLADE],
    "swav": [*SWAV, "--queue_length", "0", "--epochs", "1", "--batch_size", "128", "--small_crops", "1"],
}
CLASSIFIERS = ("mlsn", "simmatch")
CPU = ["--run.accelerator", "cpu", "--run.bar", "false"]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """run_of(method): the folder of a finished run of digits, which is not where it was trained."""
    folders = {}

    def get(method):
        if method not in folders:
            folder = tmp_path_factory.mktemp(method)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            assert cli.main(["train", method, *TRAIN[method], *CPU, "--run.out", str(folder / "trained")]) == 0
            torch.set_num_threads(threads)
            folders[method] = shutil.move(folder / "trained", folder / "moved")
        return folders[method]

    return get


@pytest.fixture(autouse=True)
def one_thread():
    """As the runs were trained: the bits of some convolutions depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The test images of digits as files, class/number.png."""
    folder = tmp_path_factory.mktemp("pictures")
    test = data.load_dataset("digits").test
    for number, label in enumerate(test.labels):
        path = folder / str(label) / f"{number:04}.png"
        path.parent.mkdir(exist_ok=True)
        test.image(number).save(path)
    return folder


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", TRAIN)
def test_evaluate_gives_the_figures_of_the_runs_own_last_evaluation(run_of, method, capsys):
    folder = run_of(method)
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder), "--accelerator", "cpu"]) == 0
    shown = capsys.readouterr()
    title, *lines = shown.out.splitlines()
    figures = {name: float(value) for name, value in (line.split(": ") for line in lines)}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["group"] == "test"][-1]
    assert title == f"after step {last.pop('step')}:"
    assert {**figures, "group": "test"} == last
    assert not shown.err


@pytest.mark.parametrize("method", CLASSIFIERS)
def test_predict_gives_classes_whose_accuracy_is_the_runs(run_of, pictures, method, tmp_path, capsys):
    folder = run_of(method)
    command = ["predict", str(folder), "--data", str(pictures), "--out", str(tmp_path), "--accelerator", "cpu"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"599 images: wrote {tmp_path}/predictions.csv\n"
    rows = rows_of(tmp_path / "predictions.csv")
    assert [row["path"] for row in rows] == sorted(
        path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png")
    )
    right = sum(row["label"] == row["path"].partition("/")[0] for row in rows)
    last = load_checkpoint(folder / "checkpoint.pt")["history"][-1]
    assert right == round(599 * (last["ema_accuracy"] if method == "simmatch" else 1 - last["ema_error"]))
    assert all(0.1 <= float(row["confidence"]) <= 1 for row in rows)
    before = (tmp_path / "predictions.csv").read_bytes()
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error == f"ssmkernels predict: {tmp_path}/predictions.csv exists; give another folder with --out\n"
    assert (tmp_path / "predictions.csv").read_bytes() == before


@pytest.mark.parametrize("method", ["mixed-lp", "slade", "swav"])
def test_predict_embeds_where_embeddings_are_learnt(run_of, pictures, method, tmp_path):
    folder = run_of(method)
    command = ["predict", str(folder), "--data", str(pictures), "--out", str(tmp_path), "--accelerator", "cpu"]
    assert cli.main(command) == 0
    embeddings = torch.from_numpy(np.load(tmp_path / "embeddings.npy"))
    paths = [row["path"] for row in rows_of(tmp_path / "predictions.csv")]
    assert embeddings.dtype == torch.float32 and embeddings.shape == (599, 64 if method == "swav" else 8)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(599), rtol=0, atol=1e-6)
    labels = torch.tensor([int(path.partition("/")[0]) for path in paths])
    assert metrics.retrieval(embeddings, labels)["P@1"] > 0.3  # of ten classes


def test_predict_takes_images_of_any_size_and_mode(run_of, tmp_path):
    for name, mode, size in (("a.png", "RGB", (30, 20)), ("b.jpg", "L", (8, 8)), ("c.gif", "P", (9, 40))):
        Image.new(mode, size, 100).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    assert cli.main(["predict", str(run_of("simmatch")), "--data", str(tmp_path), "--out", str(out)]) == 0
    assert [row["path"] for row in rows_of(out / "predictions.csv")] == ["a.png", "b.jpg", "c.gif"]


@pytest.mark.parametrize("method", TRAIN)
def test_export_is_used_without_ssmkernels(run_of, pictures, method, tmp_path, capsys):
    folder = run_of(method)
    out = tmp_path / "exported"
    assert cli.main(["export", str(folder), "--out", str(out)]) == 0
    assert cli.main(["predict", str(folder), "--data", str(pictures), "--out", str(tmp_path)]) == 0
    program = torch.export.load(out / "program.pt2").module()
    mean, std = (load_checkpoint(folder / "checkpoint.pt")["images"][name] for name in ("mean", "std"))
    paths = sorted(pictures.rglob("*.png"))[:5]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths])[:, None]
    images = (pixels / 255 - torch.tensor(mean)) / torch.tensor(std)
    card = (out / "README.md").read_text()
    assert str(list(mean)) in card and "central 8x8, channels L" in card
    for count in (1, 2, 5):
        outputs = program(images[:count])
        if method in CLASSIFIERS:
            assert "logits and" in card and "0, 1, 2, 3" in card
            names = [str(label) for label in outputs[0].argmax(dim=1).tolist()]
            assert names == [row["label"] for row in rows_of(tmp_path / "predictions.csv")[:count]]
        else:
            expected = torch.from_numpy(np.load(tmp_path / "embeddings.npy"))[:count]
            # Another algorithm for a convolution rounds otherwise; images are normalised in another order.
            torch.testing.assert_close(outputs[1], expected, rtol=0, atol=1e-5)
    weights = torch.load(out / "weights.pt", weights_only=True)
    assert all(value.is_contiguous() for value in weights.values())
    assert any(name.startswith("backbone.") for name in weights)
    capsys.readouterr()
    assert cli.main(["export", str(folder), "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"ssmkernels export: {out}/weights.pt exists; give another folder with --out\n"


def test_exported_weights_are_where_another_run_starts(run_of, tmp_path, capsys):
    assert cli.main(["export", str(run_of("mixed-lp"))]) == 0
    weights = run_of("mixed-lp") / "export" / "weights.pt"
    command = ["train", "slade", *TRAIN["slade"], *CPU, "--student", "none", "--weights", str(weights)]
    assert cli.main([*command, "--run.out", str(tmp_path / "run")]) == 0
    assert f"tensors of {weights} from backbone" in capsys.readouterr().err


def test_the_best_network_is_the_one_of_its_evaluation(run_of, pictures, tmp_path):
    folder = run_of("mixed-lp")
    assert cli.main(["export", str(folder), "--best", "--out", str(tmp_path)]) == 0
    exported = torch.load(tmp_path / "weights.pt", weights_only=True)
    best = load_checkpoint(folder / "best.pt")["model"]
    assert exported.keys() == best.keys()
    assert all(torch.equal(exported[name], value) for name, value in best.items())


def test_images_that_are_gone_or_others_are_one_line(run_of, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run_of("simmatch"), folder)
    state = load_checkpoint(folder / "checkpoint.pt")
    state["config"]["data"]["name"] = "npz"
    save_checkpoint(folder / "checkpoint.pt", state)
    assert cli.main(["evaluate", str(folder)]) == 1
    assert capsys.readouterr().err.startswith("ssmkernels evaluate: npz: data is no file")
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    labels = np.arange(60) % 10
    np.savez(tmp_path / "digits.npz", train_x=images, train_y=labels, test_x=images, test_y=labels)
    assert cli.main(["evaluate", str(folder), "--data", str(tmp_path / "digits.npz")]) == 1
    error = capsys.readouterr().err
    assert "are others than those of the run" in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
def test_what_is_no_finished_run_is_one_line(run_of, pictures, command, tmp_path, capsys):
    def error_of(folder, *options):
        needed = ["--data", str(pictures)] if command == "predict" else []
        assert cli.main([command, str(folder), *needed, *options]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"ssmkernels {command}: ") and error.count("\n") == 1
        return error

    assert f"{tmp_path} has no checkpoint.pt; it should be the folder of a run" in error_of(tmp_path)
    (tmp_path / "fold0").mkdir()
    (tmp_path / "fold0" / "checkpoint.pt").touch()
    assert "a network for each of its folds; give one of fold0 in it" in error_of(tmp_path)
    assert "checkpoint.pt is damaged" in error_of(tmp_path / "fold0")
    state = load_checkpoint(run_of("simmatch") / "checkpoint.pt")
    changes = {
        "lacks images": {name: value for name, value in state.items() if name != "images"},
        "settings of no method of this version: depth": {**state, "config": {"depth": 3}},
        "does not fit the network of its settings": {**state, "config": {**state["config"], "model": "wrn-16-1"}},
    }
    for words, changed in changes.items():
        save_checkpoint(tmp_path / "checkpoint.pt", changed)
        assert words in error_of(tmp_path)
    if command != "evaluate":
        assert "has no best.pt; only mixed-lp and slade keep one" in error_of(run_of("simmatch"), "--best")


@pytest.mark.parametrize("command", ["predict", "export"])
def test_an_unusable_folder_is_named_before_the_work(run_of, pictures, command, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Image, "open", None)  # no image is read
    needed = ["--data", str(pictures)] if command == "predict" else []
    out = tmp_path / "file" / "out"
    assert cli.main([command, str(run_of("simmatch")), *needed, "--out", str(out)]) == 1
    assert capsys.readouterr().err == (
        f"ssmkernels {command}: {out} cannot be written (Not a directory); give another folder with --out\n"
    )


def test_files_that_are_no_images_are_named(run_of, tmp_path, capsys):
    command = ["predict", str(run_of("simmatch")), "--data", str(tmp_path / "pictures"), "--out", str(tmp_path)]
    assert cli.main(command) == 1
    assert "pictures, which is no folder" in capsys.readouterr().err
    (tmp_path / "pictures").mkdir()
    assert cli.main(command) == 1
    assert "pictures, which has no images" in capsys.readouterr().err
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG torn")
    assert cli.main(command) == 1
    assert f"{tmp_path}/pictures/a.png is not readable as an image" in capsys.readouterr().err
    assert not (tmp_path / "predictions.csv").exists()

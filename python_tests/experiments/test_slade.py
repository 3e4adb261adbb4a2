# SPDX-License-Identifier: BSD-3-Clause
"""The tables of SLADE in a few steps."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from ssmkernels.experiments import run
from ssmkernels.experiments.analyses import similarities
from ssmkernels.experiments.cli import main
from ssmkernels.experiments.record import read_record
from ssmkernels.experiments.run import Request, configure, find_cells
from ssmkernels.experiments.sources import SWAV_FILE, Source
from ssmkernels.experiments.spec import BUDGETS, load_tables
from ssmkernels.trainers import RunConfig, Slade
from ssmkernels.trainers.cli import parse_config
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.slade_data import load_images

TABLES = load_tables()
KEYS = (
    *("teacher_steps=4", "warm_up_steps=2", "student_steps=4", "k=8", "batch_size=8", "per_class=4"),
    *("run.log_every=2", "run.workers=0", "run.bar=false", "run.accelerator=cpu"),
)
FEW = [argument for key in KEYS for argument in ("--set", key)]
QUICK = [f"--{key}" for key in KEYS]
DIGITS = "scikit-learn's digits, 8x8 pixels"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(run, "machine_in_words", lambda: "2 x processor, no GPU")


def written(folder):
    return [(path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("checkpoint.pt"))]


@pytest.mark.parametrize("name", ["slade-cub200-nabirds", "slade-cars196-compcars"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_cells_are_what_their_names_say(name, budget, tmp_path):
    (tmp_path / SWAV_FILE).touch()
    request = Request(budget, Source(str(tmp_path)), tmp_path / "out", check=False)
    cells = find_cells(TABLES[name], request).cells
    assert len(cells) == 8
    for cell in cells:
        parsed = cell.config
        assert parsed.student == ("mining" if "SLADE" in cell.row else "none")
        assert parsed.weights == (
            str(request.jobs / cell.job(1).needs[0].name / "backbone.pt") if "SwAV" in cell.row else "imagenet"
        )
        assert parsed.ranking_loss == ("multi-similarity" if re.search("[TS][34]", cell.row) else "contrastive")
        assert parsed.data.unlabeled_name == name.split("-")[2] and parsed.data.unlabeled_root == str(tmp_path)
        assert parsed.data.fold == (None if budget == "paper" else 0)
    (tmp_path / SWAV_FILE).unlink()
    result = find_cells(TABLES[name], request)
    assert (
        len(result.cells) == 4
        and all(SWAV_FILE in message for message in result.left_out)
        and len(result.left_out) == 4
    )


def test_rows_differ_in_what_the_student_learns_from(tmp_path):
    table = TABLES["slade-ablation2"].variant("embedded")
    request = Request("smoke", Source(None), tmp_path)
    rows = {row: configure(table, request, DIGITS, arguments)[0] for row, arguments in table.rows.items()}
    for name in (
        "data",
        "model",
        "weights",
        "k",
        "lambda_1",
        "lambda_2",
        "batch_size",
        "optimizer",
        "student_steps",
        "embedding_dim",
    ):
        assert len({repr(getattr(config, name)) for config in rows.values()}) == 1
    assert [config.student for config in rows.values()] == ["none", "none", "none", "pseudo-labels", "basis", "mining"]
    assert rows["Teacher, as many steps as all"].steps == rows["+ Basis + Mining"].steps == 20 + 10 + 20
    assert rows["Initial weights"].learning_rate == 0


def test_ablation_2_is_kept_and_rated_on_unlabelled_classes(tmp_path):
    command = [
        "slade-ablation2",
        "--out",
        str(tmp_path),
        "--columns",
        DIGITS,
        "--rows",
        "+ Basis + Mining",
        "--rows",
        "+ Basis",
        *FEW,
    ]
    assert main(command) == 0
    (folder,) = tmp_path.glob("slade-ablation2-smoke*")
    record = read_record(folder)
    ran = {(entry.row, entry.figure): entry.values for entry in record.entries if entry.values}
    assert len(ran) == 2 * 4 and all(len(values) == 1 and 0 < values[0] <= 100 for values in ran.values())
    assert ("+ Basis", "MAP@R, unlabelled classes") in ran
    before = written(tmp_path)
    assert len(before) == 2
    assert main(command) == 0
    assert written(tmp_path) == before and read_record(folder) == record


def test_ablation_1_fine_tunes_first(tmp_path):
    assert (
        main(["slade-ablation1", "--out", str(tmp_path), "--columns", DIGITS, "--rows", "random, then SwAV", *FEW]) == 0
    )
    (backbone,) = tmp_path.glob("jobs/swav-digits-seed1-*/backbone.pt")
    (folder,) = tmp_path.glob("slade-ablation1-smoke*")
    ran = {entry.row for entry in read_record(folder).entries if entry.values}
    assert ran == {"random, then SwAV"} and backbone.stat().st_size > 0


@pytest.mark.long
def test_similarities_are_looked_at_before_and_after(tmp_path, monkeypatch, capsys):
    fitted = []
    fit = similarities.fit

    def stops_at_the_second(trainer, *, steps, **rest):
        fitted.append(steps)
        if len(fitted) == 2:
            raise KeyboardInterrupt
        return fit(trainer, steps=steps, **rest)

    monkeypatch.setattr(similarities, "fit", stops_at_the_second)
    command = ["slade-similarities", "--out", str(tmp_path), "--columns", DIGITS, *FEW]
    assert main(command) == 130
    assert main(command) == 0
    assert fitted == [6, 10, 10]  # the warm-up's end once, the end until it was reached
    (folder,) = tmp_path.glob("slade-similarities-smoke*")
    record = read_record(folder)
    (plot,) = record.plots
    assert (folder / plot.file).read_bytes().startswith(b"\x89PNG")
    figures = {(entry.row, entry.figure): entry.values for entry in record.entries if entry.column == DIGITS}
    for stage in ("before", "after"):
        with np.load(next(tmp_path.glob(f"jobs/pairs-*/{stage}.npz"))) as arrays:
            positives, negatives, shares = (
                arrays["positives"],
                arrays["negatives"],
                [*arrays["mined"], *arrays["clustered"]],
            )
        count = 355  # unlabelled images of two classes, each pair once
        assert len(positives) + len(negatives) == count * (count - 1) // 2
        assert min(positives.min(), negatives.min()) > -1.001 and max(positives.max(), negatives.max()) < 1.001
        assert all(0 <= share <= 1 for share in shares)
        assert figures[stage, "mean of positives"] == (float(positives.mean()),)
        assert figures[stage, "right negatives by clusters"] == (float(shares[3]),)
    capsys.readouterr()
    for path in tmp_path.glob("jobs/pairs-*/*.npz"):  # torn, a stage is named and made again
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert main(command) == 1
        assert f"{path} is damaged" in (errors := capsys.readouterr().err) and "the same command makes it" in errors
        assert main(command) == 0
        assert path.read_bytes() == whole


def test_ranking_counts_pairs():
    draw = np.random.default_rng(0)
    shares = np.zeros(2)
    pairs = similarities.Similarities(
        *(draw.integers(0, 5, count).astype(np.float32) for count in (30, 70)), shares, shares
    )
    above, equal = ((op(pairs.positives[:, None], pairs.negatives)).mean() for op in (np.greater, np.equal))
    assert pairs.ranking == pytest.approx(above + equal / 2)


def test_variants_follow_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="cub200: looked for"):
        find_cells(TABLES["slade-ablation3"], Request("smoke", Source(str(tmp_path)), tmp_path))
    photographs(tmp_path / "flowers", classes=4, count=2)
    result = find_cells(TABLES["slade-ablation3"], Request("short", Source(str(tmp_path / "flowers")), tmp_path))
    assert {cell.column for cell in result.cells} == {"class folders"} and result.cells[
        0
    ].config.model == "efficientnet-lite0"
    birds(tmp_path, count=1)
    result = find_cells(TABLES["slade-ablation3"], Request("paper", Source(str(tmp_path)), tmp_path))
    assert {cell.column for cell in result.cells} == {"CUB-200"} and any(
        "Cars-196: cars196: looked for" in message for message in result.left_out
    )
    config = result.cells[0].config
    assert config.data.fold is None and config.data.root == config.data.unlabeled_root == str(tmp_path)


def photographs(root, classes, count):
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (16, 16), (20 * label, 9 * number, 0)).save(root / f"class{label}" / f"{number}.jpg")


def birds(root, classes=10, count=4):
    """CUB-200's and NABirds' forms, with pictures of 16 x 16 pixels."""
    draw = np.random.default_rng(0)
    for name in ("CUB_200_2011", "nabirds"):
        paths = [(label, f"{label:03d}.Bird/{i}.jpg") for label in range(1, classes + 1) for i in range(count)]
        for label, path in paths:
            picture = root / name / "images" / path
            picture.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(draw.normal(20 * label, 30, (16, 16, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(picture)
        lines = {
            "images.txt": [path for _, path in paths],
            "image_class_labels.txt": [str(label) for label, _ in paths],
        }
        for file, values in lines.items():
            text = "".join(f"{number} {value}\n" for number, value in enumerate(values, 1))
            (root / name / file).write_text(text)
        (root / name / "classes.txt").write_text("".join(f"{label} Bird {label}\n" for label in range(1, classes + 1)))


def test_the_main_table_on_folders_of_birds(tmp_path, capsys):
    """All folds and their concatenation, with a small network; no weights of SwAV, so that its rows are left out."""
    birds(tmp_path)
    small = ("model=convnet-small", "weights=null", "freeze_bn=false", "data.image_size=16", "data.folds=2")
    settings = [*FEW, *(argument for key in small for argument in ("--set", key))]
    arguments = [
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--budget",
        "paper",
        "--rows",
        "SLADE, S3 (ImageNet)",
    ]
    assert main(["slade-cub200-nabirds", *arguments, *settings]) == 0
    printed = capsys.readouterr().out
    assert "30.90" in printed and "33.90" not in printed  # the paper's number beside the paper's images
    assert "SLADE, S4 (SwAV), cub200-nabirds: no swav_800ep_pretrain.pth.tar in --data" in printed
    assert len(written(tmp_path / "out")) == 2


def test_right_pairs_are_counted():
    """Clusters that are the classes are all right; with T1 = −1 and T2 = 1 every pair is mined, as often right as
    there are such pairs.
    """
    config, _ = parse_config("slade", ["--config", "digits", *QUICK, "--student", "mining"])
    labeled, _ = load_images(config.data)
    trainer = Slade(config, labeled, make_fabric(RunConfig(accelerator="cpu")))
    trainer.pseudo_labels = torch.as_tensor(trainer.unlabeled.labels)
    trainer.similarity.positive_mean.fill_(-1.01)
    trainer.similarity.negative_mean.fill_(1.01)
    pairs = similarities.pair_similarities(trainer)
    assert pairs.clustered.tolist() == [1, 1]
    share = len(pairs.positives) / (len(pairs.positives) + len(pairs.negatives))
    assert pairs.mined.tolist() == pytest.approx([share, 1 - share], abs=1e-5)

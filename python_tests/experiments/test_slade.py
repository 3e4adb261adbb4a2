# SPDX-License-Identifier: BSD-3-Clause
"""The tables of SLADE in a few steps."""

import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from ssmkernels.experiments import demo, self_training, slade
from ssmkernels.experiments.cli import main
from ssmkernels.experiments.experiment import BUDGETS, Budget
from ssmkernels.experiments.jobs import Outcome
from ssmkernels.trainers import Slade
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.cli import parse_config
from ssmkernels.trainers.loop import RunResult, make_fabric

FEW = ("--teacher_steps", "4", "--warm_up_steps", "2", "--student_steps", "4", "--k", "8", "--batch_size", "8", "--per_class", "4")
QUICK = (*FEW, "--run.log_every", "2", "--run.workers", "0", "--run.bar", "false", "--run.accelerator", "cpu")


@pytest.fixture
def few(monkeypatch):
    setting = self_training.Setting("digits", "digits", Budget(1, QUICK), ("--config", "digits"), smoke=True)
    monkeypatch.setattr(self_training, "choose", lambda budget, data: [setting])
    return setting


def runs(*figures):
    results = [RunResult(True, 1, [{"step": 1, "final_MAP@R": 0.5, "test_MAP@R": m, "test_RP": m, "test_P@1": m}]) for m in figures]
    return [Outcome(f"seed {seed}", asdict(result)) for seed, result in enumerate(results)]


def written(folder):
    return [(path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("checkpoint.pt"))]


def test_every_experiment_is_listed(capsys):
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    ablations = [f"slade-ablation{number}" for number in (1, 2, 3, 4)]
    for name in ("slade-cub200-nabirds", "slade-cars196-compcars", *ablations, "slade-shared-classes", "slade-similarities"):
        assert f"{name} " in listed


def test_the_papers_numbers():
    cub, cars = (
        {cell.row: cell.paper for cell in slade.main_cells(column, config, (), ("--weights", "file"), offline=False)}
        for column, config in (("CUB-200", "cub200-nabirds"), ("Cars-196", "cars196-compcars"))
    )
    assert len(cub) == len(cars) == 8
    assert cub["SLADE, S2 (SwAV)"] == ("33.59", "44.01", "73.19")
    assert cub["Contrastive, T1 (ImageNet)"] == ("25.02", "35.83", "65.28")
    assert cars["SLADE, S4 (SwAV)"] == ("37.98", "46.92", "91.53")
    assert self_training.PAPER_2["CUB-200"]["+ Basis + Mining"] == self_training.PAPER_1["CUB-200"]["SwAV, fine-tuned"] == "33.59"
    assert self_training.PAPER_3["SD"] == self_training.PAPER_4["k = 400"] == cub["SLADE, S2 (SwAV)"]


@pytest.mark.parametrize(("column", "config"), [("CUB-200", "cub200-nabirds"), ("Cars-196", "cars196-compcars")])
def test_cells_are_what_their_names_say(column, config):
    for cell in slade.main_cells(column, config, ("--data.unlabeled_root", "images"), ("--weights", "swav.pt"), offline=False):
        for budget in BUDGETS:
            arguments = [*cell.arguments, *self_training.PAPER_BUDGETS[budget].arguments, "--data.root", "images"]
            parsed, _ = parse_config("slade", arguments)
            assert parsed.student == ("mining" if "SLADE" in cell.row else "none")
            assert parsed.weights == ("swav.pt" if "SwAV" in cell.row else "imagenet")
            assert parsed.ranking_loss == ("multi-similarity" if re.search("[TS][34]", cell.row) else "contrastive")
            assert parsed.data.unlabeled_name == config.split("-")[1] and parsed.data.unlabeled_root == "images"
            assert parsed.data.fold == (None if budget == "paper" else 0)
    assert len(slade.main_cells(column, config, (), None, offline=False)) == 4


def test_rows_differ_in_what_the_student_learns_from(few):
    rows = {row: few.parse(arguments) for row, arguments in self_training.ablation2_rows(few).items()}
    for name in ("data", "backbone", "weights", "k", "lambda_1", "lambda_2", "batch_size", "optimizer", "student_steps", "embedding_dim"):
        assert len({repr(getattr(config, name)) for config in rows.values()}) == 1
    assert [config.student for config in rows.values()] == ["none", "none", "none", "pseudo-labels", "basis", "mining"]
    assert rows[self_training.LONG_TEACHER].steps == rows["+ Basis + Mining"].steps == 4 + 2 + 4
    assert rows[self_training.INITIAL].learning_rate == 0


def test_ablation_2_is_kept(few, tmp_path, capsys):
    assert main(["slade-ablation2", "--out", str(tmp_path)]) == 0
    report = (tmp_path / "slade-ablation2-smoke" / "report.md").read_text()
    assert report in capsys.readouterr().out
    for words in ("3 classes (545 images) with labels", "3 classes (533 images) to test", "with one seed", "No folder of images was given"):
        assert words in report
    for row, paper in self_training.PAPER_2["CUB-200"].items():
        assert re.search(rf"^\| {re.escape(row)} +\| [\d.]+ .* {paper} ", report, flags=re.MULTILINE)
    assert len(re.findall(r"^\| \+ Basis \+ Mining +\| [\d.]+ ", report, flags=re.MULTILINE)) == 2  # and among the unlabelled classes
    before = written(tmp_path)
    assert len(before) == 6
    assert main(["slade-ablation2", "--out", str(tmp_path)]) == 0
    assert written(tmp_path) == before
    assert (tmp_path / "slade-ablation2-smoke" / "report.md").read_text() == report


def test_ablations_1_3_and_4(few, tmp_path, capsys):
    for number in (1, 3, 4):
        assert main([f"slade-ablation{number}", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for words in ("| random, then SwAV ", "random, then SwAV − random", "| Local-CE ", "SD − Global-CE", "32.69", "| k = 2 ", "| k = 32 "):
        assert words in printed
    assert len(list(tmp_path.glob("jobs/swav-digits-seed1-*/backbone.pt"))) == 1


def test_similarities_are_looked_at_before_and_after(few, tmp_path, capsys, monkeypatch):
    fitted = []
    fit = self_training.fit

    def stops_at_the_second(trainer, *, steps, **rest):
        fitted.append(steps)
        if len(fitted) == 2:
            raise KeyboardInterrupt
        return fit(trainer, steps=steps, **rest)

    monkeypatch.setattr(self_training, "fit", stops_at_the_second)
    assert main(["slade-similarities", "--out", str(tmp_path)]) == 0
    assert "Stopped." in capsys.readouterr().out
    assert main(["slade-similarities", "--out", str(tmp_path)]) == 0
    assert fitted == [6, 10, 10]  # the warm-up's end once, the end until it was reached
    printed = capsys.readouterr().out
    out = tmp_path / "slade-similarities-smoke"
    assert (out / "similarities_digits.png").read_bytes().startswith(b"\x89PNG")
    for stage in ("before", "after"):
        with np.load(next(tmp_path.glob(f"jobs/similarities-*/{stage}.npz"))) as found:
            positives, negatives, shares = found["positives"], found["negatives"], [*found["mined"], *found["clustered"]]
        count = 355  # unlabelled images of two classes, each pair once
        assert len(positives) + len(negatives) == count * (count - 1) // 2
        assert min(positives.min(), negatives.min()) > -1.001 and max(positives.max(), negatives.max()) < 1.001
        assert all(0 <= each <= 1 for each in shares)
        assert f"| {100 * shares[1]:.0f} % ({100 * shares[3]:.0f} %) " in printed
        assert f"| {positives.mean():.3f} " in printed and f"| {negatives.mean():.3f} " in printed


def test_ranking_counts_pairs():
    draw = np.random.default_rng(0)
    shares = np.zeros(2)
    found = self_training.Similarities(*(draw.integers(0, 5, count).astype(np.float32) for count in (30, 70)), shares, shares)
    above, equal = ((op(found.positives[:, None], found.negatives)).mean() for op in (np.greater, np.equal))
    assert found.ranking == pytest.approx(above + equal / 2)


def test_claims_count_seeds():
    """1 ± 2.48 points over three seeds, by hand: Student's t with 2 degrees of freedom is 4.303, the deviation 1."""
    results = {"a": runs(0.11, 0.20, 0.32), "b": runs(0.10, 0.20, 0.30), "c": runs(0.00, 0.10, 0.19)}
    assert self_training.claim(results, "a", "b") == "- a − b: higher in 2 of 3 seeds, +1.0 ± 2.5 points: not told apart."
    assert self_training.claim(results, "a", "c").endswith("3 of 3 seeds, +11.3 ± 3.8 points: holds.")
    assert self_training.claim(results, "c", "a").endswith(": the opposite holds.")
    assert "with one seed" in self_training.claim({"a": runs(0.1), "b": runs(0.2)}, "a", "b")
    assert "| a | 21.0 ± 10.5 |" in self_training.table(results, {}, ())


def test_settings_follow_the_folder(tmp_path):
    assert [each.config for each in self_training.choose("smoke", None)] == ["digits", "mnist5k"]
    with pytest.raises(FileNotFoundError, match="which is no folder"):
        self_training.choose("smoke", str(tmp_path / "no"))
    with pytest.raises(ValueError, match="a folder of images for each class"):
        self_training.choose("smoke", str(tmp_path))
    (tmp_path / "rose").mkdir()
    (flowers,) = self_training.choose("short", str(tmp_path))
    assert flowers.parse().data.root == str(tmp_path) and flowers.parse().backbone == "efficientnet-lite0"
    assert flowers.budget.seeds == 3
    (tmp_path / "CUB_200_2011").mkdir()
    (birds,) = self_training.choose("paper", str(tmp_path))
    assert (birds.config, birds.paper) == ("cub200-nabirds", "CUB-200")
    config = birds.parse()
    assert config.data.fold is None and config.data.root == config.data.unlabeled_root == str(tmp_path)


def test_the_main_table_smokes_offline(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(self_training.PAPER_BUDGETS, "smoke", Budget(1, ("--data.fold", "0")))
    monkeypatch.setattr(slade, "OFFLINE", (*slade.OFFLINE, *QUICK))
    monkeypatch.setattr(self_training, "SMALL_BUDGETS", {"smoke": Budget(1, QUICK), "short": Budget(1)})
    assert main(["slade-cub200-nabirds", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for words in ("No folder of images was given", "25.02", "74.09", "SLADE, S4 (SwAV)", "Its filter of CompCars"):
        assert words in printed
    assert len(written(tmp_path)) == 8 + 1  # and SwAV's
    assert main(["slade-cub200-nabirds", "--budget", "short", "--out", str(tmp_path)]) == 1
    assert "--data is missing" in capsys.readouterr().err


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
        lines = {"images.txt": [path for _, path in paths], "image_class_labels.txt": [str(label) for label, _ in paths]}
        for file, values in lines.items():
            text = "".join(f"{number} {value}\n" for number, value in enumerate(values, 1))
            (root / name / file).write_text(text)
        (root / name / "classes.txt").write_text("".join(f"{label} Bird {label}\n" for label in range(1, classes + 1)))


def test_the_main_table_and_an_ablation_on_folders_of_birds(tmp_path, capsys, monkeypatch):
    """All folds and their concatenation, with a small network; no weights of SwAV, so that its rows are left out."""
    birds(tmp_path)
    small = ("--backbone", "convnet-small", "--weights", "null", "--freeze_bn", "false", "--data.image_size", "16")
    monkeypatch.setitem(self_training.PAPER_BUDGETS, "paper", Budget(1, (*QUICK, *small, "--data.folds", "2", "--data.fold", "null")))
    monkeypatch.setitem(self_training.PAPER_BUDGETS, "smoke", Budget(1, (*QUICK, *small, "--data.folds", "2", "--data.fold", "0")))
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["slade-cub200-nabirds", "--budget", "paper", *arguments]) == 0
    printed = capsys.readouterr().out
    for words in ("No swav_800ep_pretrain.pth.tar in --data: the rows of SwAV were left out", "SLADE, S3 (ImageNet)", "30.90"):
        assert words in printed
    assert "33.90" not in printed
    assert len(written(tmp_path / "out")) == 4 * 2

    assert main(["slade-ablation3", *arguments]) == 0
    assert "CUB-200 and its unlabelled images: convnet-small" in capsys.readouterr().out


def test_a_stopped_run_stops_the_rows(few, monkeypatch):
    monkeypatch.setattr(self_training, "train_slade", lambda config, **_: RunResult(False, 3))
    with pytest.raises(KeyboardInterrupt):
        self_training.train_rows(few, {"Teacher": self_training.TEACHER}, out=None, seeds=(1,))
    assert demo.slade_section((1,)) == ("", True)


def test_demo_section(monkeypatch):
    monkeypatch.setattr(demo, "SLADE", QUICK)
    section, stopped = demo.slade_section((1,))
    assert not stopped
    for words in (*self_training.PAPER_2["CUB-200"], self_training.LONG_TEACHER, "4 steps of the teacher", "with one seed"):
        assert words in section


def test_right_pairs_are_counted():
    """Clusters that are the classes are all right; with T1 = −1 and T2 = 1 every pair is mined, as often right as there are such pairs."""
    setting = self_training.Setting("digits", "digits", Budget(1, QUICK))
    labeled, _ = self_training.load_images(setting.parse().data)
    trainer = Slade(setting.parse(self_training.MINING), labeled, make_fabric(accelerator="cpu"))
    trainer.pseudo_labels = torch.as_tensor(trainer.unlabeled.labels)
    trainer.similarity.positive_mean.fill_(-1.01)
    trainer.similarity.negative_mean.fill_(1.01)
    found = self_training.pair_similarities(trainer)
    assert found.clustered.tolist() == [1, 1]
    share = len(found.positives) / (len(found.positives) + len(found.negatives))
    assert found.mined.tolist() == pytest.approx([share, 1 - share], abs=1e-5)


def test_shared_classes(few, tmp_path):
    report = self_training.shared_classes(budget="smoke", data=None, out=tmp_path / "shared").text
    assert "3 classes (266 images) without" in report and "3 classes (267 images) to test" in report
    for row in ("Teacher, as many steps as all", "+ Basis + Mining", "+ Basis + Mining, Local-CE"):
        assert f"| {row} " in report


def test_the_unlabelled_classes_are_those_of_the_seed(few, tmp_path):
    rows = {"Initial": (*self_training.TEACHER, "--teacher_steps", "1", "--learning_rate", "0")}
    for seed in (1, 2):
        self_training.train_rows(few, rows, out=tmp_path / "rows", seeds=(seed,))
        found = self_training.unlabeled_map(few, rows["Initial"], seed, tmp_path / "rows")
        trainer = Slade(few.parse(rows["Initial"], seed), self_training.load_images(few.parse().data)[0], make_fabric(accelerator="cpu"))
        trainer.load_state_dict(load_checkpoint(next(tmp_path.glob(f"jobs/slade-digits-seed{seed}-*/checkpoint.pt")))["trainer"])
        trainer.images = trainer.images._replace(test=trainer.unlabeled)
        assert found == pytest.approx(100 * trainer.evaluate()["test_MAP@R"])

# SPDX-License-Identifier: BSD-3-Clause
"""Table 3 and Figures 4 and 5 of mixed label propagation, on few draws."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssmkernels.experiments import feature_sets, propagation
from ssmkernels.experiments.cli import EXPERIMENTS, main
from ssmkernels.experiments.record import read_record
from ssmkernels.experiments.report import half_width, mean_and_interval
from ssmkernels.trainers.loop import RunResult


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(propagation.run_draws, "__kwdefaults__", {**propagation.run_draws.__kwdefaults__, "draws": 2})
    monkeypatch.setattr(propagation, "DRAWS", 2)
    monkeypatch.setattr(feature_sets, "SOURCES", {"digits": feature_sets.SOURCES["digits"]})


def test_table_3(few, tmp_path, capsys):
    assert main(["mixed-lp-table3", "--out", str(tmp_path)]) == 0
    out = tmp_path / "mixed-lp-table3-smoke"
    report = (out / "report.md").read_text()
    assert report in capsys.readouterr().out
    for words in (*propagation.METHODS, "5 per class", "2 to 8 per class", "What holds", "What does not"):
        assert words in report
    kept = [json.loads(path.read_text())["value"] for path in (out / "jobs").glob("digits-*/job.json")]
    assert len(kept) == 4 and all(set(draw) == set(propagation.METHODS) for draw in kept)
    assert all(0.05 < value < 1 for draw in kept for value in draw.values())
    record = read_record(out)
    assert len(record.entries) == 2 * len(propagation.METHODS) and all(len(entry.values) == 2 for entry in record.entries)
    assert record.seeds == (1, 2) and record.seconds > 0 and "shuffled W_dis" in record.notes


def test_a_second_run_goes_on_where_the_first_stopped(few, tmp_path, monkeypatch):
    calls = []

    def predict(affinity, labels):
        calls.append(int((labels >= 0).sum()))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"all zeros": torch.zeros_like(labels)}

    for _ in range(2):
        try:
            drawn = propagation.run_draws("digits", out=tmp_path, folder=None, predict=predict)
        except KeyboardInterrupt:
            continue
    assert calls == [50, 50, 50] and len(drawn.of("all zeros")) == 2


def test_figures_4_and_5(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(propagation, "FRACTIONS", (0.1, 1.0))
    assert main(["mixed-lp-figure4", "--out", str(tmp_path)]) == 0
    assert main(["mixed-lp-figure5", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for words in ("LPDR's system indefinite", "ours, random edges", "100 %", "sensitivity to β and λ", "| λ "):
        assert words in printed
    for name in ("mixed-lp-figure4-smoke/figure4.png", "mixed-lp-figure5-smoke/figure5a.png", "mixed-lp-figure5-smoke/figure5b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_draws_are_seeded_and_counted():
    classes = torch.arange(7).repeat(20)
    for counts in propagation.LABELINGS.values():
        first, again, other = (propagation.draw_labels(classes, seed, counts) for seed in (1, 1, 2))
        assert first.equal(again) and not first.equal(other)
        assert ((first == classes) | (first == -1)).all()
        assert sorted(torch.bincount(first[first >= 0]).tolist()) == sorted((counts * 7)[:7])


def test_intervals():
    """Student's t with 9 degrees of freedom, by hand."""
    values = [float(i) for i in range(10)]
    assert half_width(values) == pytest.approx(2.262157 * np.std(values, ddof=1) / 10**0.5, rel=1e-6)
    assert mean_and_interval([0.5]) == "0.500" and mean_and_interval([0.5, 0.5]) == "0.500 ± 0.000"


def packed(folder, count=6):
    pictures = [Image.fromarray(np.full((8, 8, 3), 20 * i, dtype=np.uint8)) for i in range(count)]
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(folder / "flowers17.npz", data=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=np.arange(count) % 2)


def test_features_of_a_folder_are_made_once(tmp_path, monkeypatch):
    packed(tmp_path)
    assert set(feature_sets.available(str(tmp_path))) == {"digits", "mnist5k", "flowers17"}
    made = []

    def extract(model, batches):
        made.append(model)
        return torch.cat([batch.flatten(1)[:, :3] for batch in batches])

    monkeypatch.setattr(feature_sets.models, "extract_features", extract)
    for _ in range(2):
        points = feature_sets.load("flowers17", str(tmp_path), tmp_path / "cache")
    assert made == ["efficientnet-lite0"] and points.labels.tolist() == [0, 1, 0, 1, 0, 1]
    torch.testing.assert_close(points.features[:, 0], (20 * torch.arange(6.0) - 127) / 128)


def test_a_folder_without_the_files_is_an_error(tmp_path, capsys):
    assert main(["mixed-lp-table3", "--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "it should have at least one of cifar10.npz, flowers17.npz" in capsys.readouterr().err
    assert main(["mixed-lp-table3", "--data", str(tmp_path / "no"), "--out", str(tmp_path)]) == 1
    assert "which is no folder" in capsys.readouterr().err


def test_the_papers_sets_are_taken_where_they_are(tmp_path, monkeypatch):
    """CUB-200-2011 in its published form, six images of each of ten classes, beside the paper's numbers."""
    paths = [(label, f"{label:03d}.Bird/{i}.jpg") for label in range(1, 11) for i in range(6)]
    for label, path in paths:
        picture = tmp_path / "CUB_200_2011" / "images" / path
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (25 * label, 0, 0)).save(picture)
    for file, values in {"images.txt": [path for _, path in paths], "image_class_labels.txt": [label for label, _ in paths]}.items():
        (tmp_path / "CUB_200_2011" / file).write_text("".join(f"{number} {value}\n" for number, value in enumerate(values, 1)))
    monkeypatch.setattr(feature_sets, "SOURCES", {name: feature_sets.SOURCES[name] for name in ("cub200", "pets")})
    monkeypatch.setattr(propagation.run_draws, "__kwdefaults__", {**propagation.run_draws.__kwdefaults__, "draws": 2})

    def extract(model, batches, device):
        assert [images.shape[2:] for images, _ in batches] == [(224, 224)]
        draw = torch.Generator().manual_seed(0)
        labels = torch.tensor([label - 1 for label, _ in paths])
        return torch.nn.functional.one_hot(labels, 12).float() + 0.3 * torch.rand(60, 12, generator=draw)

    monkeypatch.setattr(feature_sets.models, "extract_features", extract)
    out = tmp_path / "out" / "table3"
    found = propagation.table3(budget="smoke", data=str(tmp_path), out=out)
    papers = {entry.row: entry.paper for entry in found.entries if entry.column == "cub, 5 per class"}
    assert papers["ours"] == "0.468 ± 0.003" and papers["LGC"] == "0.441 ± 0.005" and papers["(12)"] == "-"
    assert all(len(entry.values) == 2 and entry.values[0] > 0.2 for entry in found.entries if "5 per class" in entry.column)
    assert (tmp_path / "out" / "features" / "cub200-efficientnet-lite0.npz").exists()
    assert any("in place of BN-Inception" in each for each in found.deviations)
    assert len(propagation.PAPER_3) == 10


def test_figures_are_read_at_the_best_evaluation():
    figure = EXPERIMENTS["mixed-lp-table1"].figures[0]
    history = [{"step": s, "validation_P@8": p, "test_NMI": n} for s, p, n in ((1, 0.5, 0.7), (2, 0.9, 0.6), (3, 0.8, 0.8))]
    assert figure.of([RunResult(True, 3, history)]) == "60.00"


def test_the_papers_numbers():
    paper = {(cell.row, cell.column): cell.paper for cell in EXPERIMENTS["mixed-lp-table1"].cells}
    assert paper["Ours", "cub200"] == ("57.780",) and paper["DSSML", "pets"] == ("74.867",) and len(paper) == 18
    assert EXPERIMENTS["mixed-lp-table2"].cells[0].paper[1] == "49.9 ± 1.3"

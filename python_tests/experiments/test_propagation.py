# SPDX-License-Identifier: BSD-3-Clause
"""Table 3 and Figures 4 and 5 of mixed label propagation, on few draws."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssmkernels.experiments import cli
from ssmkernels.experiments.analyses import feature_sets, propagation
from ssmkernels.experiments.cli import main
from ssmkernels.experiments.record import read_record
from ssmkernels.experiments.spec import load_tables

TABLES = load_tables()


@pytest.fixture
def few(monkeypatch):
    tables = {name: dataclasses.replace(table, columns={"digits": "digits"}) for name, table in TABLES.items()}
    monkeypatch.setattr(cli, "load_tables", lambda: tables)
    return tables


def test_table_3(few, tmp_path, capsys):
    assert main(["mixed-lp-table3", "--seeds", "1,2", "--out", str(tmp_path)]) == 0
    out = tmp_path / "mixed-lp-table3-smoke"
    report = (out / "report.md").read_text()
    assert report in capsys.readouterr().out
    methods = TABLES["mixed-lp-table3"].rows
    for words in (*methods, "5 per class", "2 to 8 per class", "ours above shuffled W_dis"):
        assert words in report
    kept = [json.loads(path.read_text())["value"] for path in tmp_path.glob("jobs/mixed-lp-table3-digits-*/job.json")]
    assert len(kept) == 4 and all(set(draw) == set(methods) for draw in kept)
    assert all(0.05 < value < 1 for draw in kept for value in draw.values())
    record = read_record(out)
    assert len(record.entries) == 2 * len(methods) and all(entry.seeds == (1, 2) for entry in record.entries)
    assert record.seeds == (1, 2) and record.seconds > 0


def test_figures_4_and_5(few, tmp_path):
    table = few["mixed-lp-figure4"]
    rows = {row: key for row, key in table.rows.items() if key.endswith((", 0", "0.1", "1.0"))}
    few[table.name] = dataclasses.replace(table, rows=rows)
    assert main(["mixed-lp-figure4", "--seeds", "1,2", "--out", str(tmp_path)]) == 0
    assert main(["mixed-lp-figure5", "--seeds", "1,2", "--out", str(tmp_path)]) == 0
    rows = [
        {entry.row for entry in read_record(tmp_path / f"mixed-lp-figure{number}-smoke").entries} for number in (4, 5)
    ]
    assert {
        "without dissimilar edges",
        "LPDR's system indefinite, 10 %",
        "ours, random edges, 100 % of the edges",
    } <= rows[0]
    assert {"β = 0.01", "λ = 128"} <= rows[1]
    for name in (
        "mixed-lp-figure4-smoke/figure4.png",
        "mixed-lp-figure5-smoke/figure5.png",
    ):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    (plot,) = read_record(tmp_path / "mixed-lp-figure4-smoke").plots
    for line in ("without dissimilar edges is 0", "ours, random edges is highest", "LPDR is highest"):
        assert line in plot.alt
    assert "indefinite" not in plot.alt


def test_draws_are_seeded_and_counted():
    classes = torch.arange(7).repeat(20)
    for counts in propagation.LABELINGS.values():
        first, again, other = (propagation.draw_labels(classes, seed, counts) for seed in (1, 1, 2))
        assert first.equal(again) and not first.equal(other)
        assert ((first == classes) | (first == -1)).all()
        assert sorted(torch.bincount(first[first >= 0]).tolist()) == sorted((counts * 7)[:7])


def packed(folder, count=6):
    pictures = [Image.fromarray(np.full((8, 8, 3), 20 * i, dtype=np.uint8)) for i in range(count)]
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(
        folder / "flowers17.npz",
        data=np.frombuffer(b"".join(files), np.uint8),
        offsets=offsets,
        labels=np.arange(count) % 2,
    )


def test_features_of_a_folder_are_made_once_unless_they_are_damaged(tmp_path, monkeypatch, capsys):
    packed(tmp_path)
    names = ["digits", "flowers17", "cifar10-test"]
    assert feature_sets.available(names, str(tmp_path)) == ["digits", "flowers17"]
    made = []

    def extract(model, batches, device):
        made.append(model)
        return torch.cat([images.flatten(1)[:, :3] for images, _ in batches])

    monkeypatch.setattr(feature_sets.models, "extract_features", extract)
    for _ in range(2):
        points = feature_sets.load("flowers17", str(tmp_path), tmp_path / "cache")
    assert (
        len(made) == 1
        and (tmp_path / "cache" / "flowers17-224px.npz").exists()
        and points.labels.tolist() == [0, 1, 0, 1, 0, 1]
    )
    torch.testing.assert_close(points.features[:, 0], (20 * torch.arange(6.0) - 127) / 128)
    kept = tmp_path / "cache" / "flowers17-224px.npz"
    whole = kept.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], whole[:200] + b"?" + whole[201:]):
        kept.write_bytes(damaged)
        feature_sets.load("flowers17", str(tmp_path), tmp_path / "cache")
        assert f"{kept} is damaged" in capsys.readouterr().err
        assert kept.read_bytes() == whole


def test_components_of_glyphs(tmp_path, monkeypatch):
    """The cosines of centred pixels, in as many components as there are pixels; and some of the images."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (200, 8, 8), dtype=np.uint8)
    labels, faces = np.arange(200) % 7, np.arange(200) % 11
    np.savez(tmp_path / "glyphs.npz", images=images, labels=labels, faces=faces)
    assert feature_sets.available(["glyphs", "glyphs-10k", "flowers17"], str(tmp_path)) == ["glyphs", "glyphs-10k"]
    points = feature_sets.load("glyphs", str(tmp_path), tmp_path)
    order = np.argsort(faces % 5 == 0, kind="stable")  # to train on, then to test on
    assert points.labels.tolist() == labels[order].tolist()
    pixels = torch.from_numpy(images[order].reshape(200, 64)).double()
    pixels -= pixels.mean(dim=0)
    inner_products = pixels @ pixels.T
    rounding = 64 * torch.finfo(torch.float32).eps * float(inner_products.abs().max())  # of the components' lengths
    torch.testing.assert_close((points.features @ points.features.T).double(), inner_products, rtol=0, atol=rounding)
    monkeypatch.setitem(feature_sets.GLYPHS, "glyphs-10k", 50)
    assert feature_sets.load("glyphs-10k", str(tmp_path), tmp_path).features.shape == (50, 64)


def test_a_folder_without_the_files_is_an_error(tmp_path, capsys):
    assert main(["mixed-lp-table3", "--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "it should have at least one of cifar10.npz, flowers17.npz, glyphs.npz" in capsys.readouterr().err
    assert main(["mixed-lp-table3", "--data", str(tmp_path / "no"), "--out", str(tmp_path)]) == 1
    assert "which is no folder" in capsys.readouterr().err


def test_the_papers_sets_are_taken_where_they_are(tmp_path, monkeypatch):
    """CUB-200-2011 in its published form, six images of each of ten classes, beside the paper's numbers."""
    paths = [(label, f"{label:03d}.Bird/{i}.jpg") for label in range(1, 11) for i in range(6)]
    for label, path in paths:
        picture = tmp_path / "CUB_200_2011" / "images" / path
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (25 * label, 0, 0)).save(picture)
    for file, values in {
        "images.txt": [path for _, path in paths],
        "image_class_labels.txt": [label for label, _ in paths],
    }.items():
        (tmp_path / "CUB_200_2011" / file).write_text(
            "".join(f"{number} {value}\n" for number, value in enumerate(values, 1))
        )
    table = dataclasses.replace(TABLES["mixed-lp-table3"], columns={"cub": "cub200", "pets": "pets"})
    monkeypatch.setattr(cli, "load_tables", lambda: {table.name: table})

    def extract(model, batches, device):
        assert [images.shape[2:] for images, _ in batches] == [(224, 224)]
        draw = torch.Generator().manual_seed(0)
        labels = torch.tensor([label - 1 for label, _ in paths])
        return torch.nn.functional.one_hot(labels, 12).float() + 0.3 * torch.rand(60, 12, generator=draw)

    monkeypatch.setattr(feature_sets.models, "extract_features", extract)
    assert main(["mixed-lp-table3", "--data", str(tmp_path), "--seeds", "1,2", "--out", str(tmp_path / "out")]) == 0
    record = read_record(tmp_path / "out" / "mixed-lp-table3-smoke")
    papers = {entry.row: entry.paper for entry in record.entries if entry.column == "cub, 5 per class"}
    assert papers["ours"] == "0.468 ± 0.003" and papers["LGC"] == "0.441 ± 0.005" and papers["(12)"] == "-"
    assert all(
        len(entry.values) == 2 and entry.values[0] > 0.2 for entry in record.entries if ", 5 per class" in entry.column
    )
    assert (tmp_path / "out" / "features" / "cub200-efficientnet-lite0.npz").exists()
    assert any("in place of BN-Inception" in deviation for deviation in record.deviations)

# SPDX-License-Identifier: BSD-3-Clause
"""The committed pictures are what _plots.py draws: 200 dpi, its colours, something on them."""

from __future__ import annotations

import numpy as np
import pytest

from ssmkernels._plots import DPI, MARKERS, PALETTE, label_axes, new_figure, save, shared_legend

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

ENOUGH = 50  # pixels of exactly one colour, which a line or a bar has and blended edges have not


def pixels_of(path):
    """[height × width] numbers 0xRRGGBB."""
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(np.int64)
    return (rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]).ravel()


def counts_of(path, colours):
    pixels = pixels_of(path)
    return {colour: int((pixels == int(colour.lstrip("#"), 16)).sum()) for colour in colours}


@pytest.fixture(scope="module")
def pictures(source_tree):
    paths = [path for folder in ("bench/results", "docs") for path in (source_tree / folder).rglob("*.png")]
    assert len(paths) > 15
    return paths


def test_pictures_have_the_resolution_of_the_helper(pictures):
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.info["dpi"] == pytest.approx((DPI, DPI), abs=0.1), path  # kept in pixels a metre
            assert min(picture.size) >= 3.5 * DPI, f"{path}: {picture.size}"


def test_pictures_show_something_in_the_colours_of_the_palette(pictures):
    from matplotlib.colors import TABLEAU_COLORS

    for path in pictures:
        assert (pixels_of(path) != 0xFFFFFF).mean() > 0.01, f"{path} is empty"
        ours = counts_of(path, set(PALETTE) - {"#000000", "#7f7f7f"})
        assert max(ours.values()) >= ENOUGH, f"{path} has none of the palette's colours: {ours}"
        others = counts_of(path, set(TABLEAU_COLORS.values()) - set(PALETTE))
        assert max(others.values()) < ENOUGH, f"{path} has colours of matplotlib's own: {others}"


def test_other_colours_are_noticed(tmp_path):
    figure, (axes,) = new_figure(1)
    axes.plot([0, 1], [0, 1], color="#1f77b4", linewidth=3)
    save(figure, tmp_path / "other.png")
    counts = counts_of(tmp_path / "other.png", ("#1f77b4", PALETTE[0]))
    assert counts["#1f77b4"] >= ENOUGH > counts[PALETTE[0]]


def test_palette_and_markers_go_together():
    assert len(set(PALETTE)) == len(PALETTE) == len(MARKERS) == len(set(MARKERS))


@pytest.mark.parametrize("length", [5, 12, 30, 50])
def test_legends_stay_on_the_figure_and_off_the_axes(length):
    figure, (axes,) = new_figure(1, width=5.0)
    for number in range(9):
        axes.plot([0, 1], [number, 0], label=f"{number:0{length}d}")
    label_axes(axes, xlabel="x", ylabel="y")
    shared_legend(figure)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert box.y1 <= axes.get_tightbbox().y0 + 1

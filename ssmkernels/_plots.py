# SPDX-License-Identifier: BSD-3-Clause
"""How every figure of the project looks: drawn without a display, one palette, 200 dpi, legends beside the axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ssmkernels._files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

DPI = 200
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#000000",
    "#882255",
    "#999933",
)
"""The colours of Okabe and Ito (2008), which people who confuse red and green can separate, and three more; the first
is ours. Ten, as many as the digits have classes."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h", "p")
CHARACTERS_PER_INCH = 14
"""Of a legend's text, small."""
HANDLE_CHARACTERS = 8
"""That the line before a label and the space behind it take."""
SPREAD_ALPHA = 0.18
"""Opacity of the band between the smallest and the largest value of a line."""


def colour(number: int) -> str:
    """The colour of series ``number``; take the same number for a method in every panel."""
    return PALETTE[number % len(PALETTE)]


def marker(number: int) -> str:
    """The marker of series ``number``, so that a figure printed in grey can be read."""
    return MARKERS[number % len(MARKERS)]


def new_figure(
    panels: int, *, title: str = "", width: float = 4.5, height: float = 4.0, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``panels`` axes side by side, each ``width`` x ``height`` inches, without pyplot's state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    return figure, list(figure.subplots(1, panels, squeeze=False, **subplots)[0])


def label_axes(axes: Axes, *, title: str = "", xlabel: str, ylabel: str, **scales: Any) -> None:
    """Names of both axes with their units, a grid behind the data, and what else ``Axes.set`` takes."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, **scales)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def shared_legend(figure: Figure) -> None:
    """One legend below all axes, each label once, in as many columns as fit: it covers nothing, however many lines
    there are.
    """
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        columns = max(
            1, int(CHARACTERS_PER_INCH * figure.get_figwidth() / (max(map(len, handles)) + HANDLE_CHARACTERS))
        )
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize="small"
        )


def draw_panels(
    path: Path, panels: Mapping[str, T], draw: Callable[[Axes, str, T], str], *, title: str = "", **subplots: Any
) -> str:
    """A figure in ``path``: on the axes of each panel what ``draw(axes, panel's title, content)`` draws; below them one
    legend. Returns what ``draw`` says is seen in each.
    """
    figure, axes_of = new_figure(len(panels), title=title, **subplots)
    seen = [draw(axes, name, content) for axes, (name, content) in zip(axes_of, panels.items(), strict=True)]
    shared_legend(figure)
    save(figure, path)
    return " ".join(f"{name}: {what}." for name, what in zip(panels, seen, strict=True) if what)


def save(figure: Figure, path: Path, *, description: str = "") -> None:
    """Writes the figure to ``path`` at :data:`DPI`, and its folder if it is not there; the description stands in the
    file.
    """
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=DPI, metadata={"Description": description or None})

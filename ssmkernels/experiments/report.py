# SPDX-License-Identifier: BSD-3-Clause
"""``ssmkernels report DIR``: every record below a folder as one HTML page and one Markdown file.

Plain data are made here of the records; ``page.html.j2`` and ``page.md.j2`` lay them out.
"""

from __future__ import annotations

import argparse
import base64
import functools
import os
import re
import statistics
import struct
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import jinja2

from ssmkernels._files import check_folder, write_atomically
from ssmkernels._text import duration, markdown_table
from ssmkernels.experiments.record import FILE, Entry, Plot, Record, read_record
from ssmkernels.experiments.statistics import mean_and_std, verdicts

if TYPE_CHECKING:
    from ssmkernels.experiments.spec import Table

TITLE = "Reproduced tables and figures"
INTRODUCTION = (
    "Each table has our number first: the mean over n seeds, or the value of a single one; a dash where there is none."
    " On this page ± is the standard deviation over seeds; intervals are written with their ends. Only in Table 3 of"
    " mixed label propagation does the paper's own ± mean a 95 % interval. The paper's number stands beside ours where"
    " the images are the paper's; the difference is ours minus the paper's; rows that we do not run are quoted and say"
    " so. The budget smoke shows that an experiment runs, not what it reaches; short is a part of the paper's"
    " training; paper is all of it. Where the budget is not the paper's, the order of the methods can be compared, the"
    " numbers cannot."
)
BUDGETS = ("paper", "short", "smoke")
"""The one that says most first."""
NOT_RUN = "not run"
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)\s]+\)")


class Row(NamedTuple):
    """One line of a table."""

    method: str
    span: int
    """Lines of the method in this setting, on the first of them; 0 on the others."""
    cells: tuple[str, ...]
    failed: bool


class Grid(NamedTuple):
    """The table of a record, without columns that are dashes in every line."""

    header: tuple[str, ...]
    """Of what stands behind the method: ours, and figure, paper and difference where there are any."""
    caption: str
    settings: dict[str, list[Row]]


class Picture(NamedTuple):
    """A plot on the page."""

    plot: Plot
    width: int
    """In pixels."""
    height: int
    uri: str


@dataclass(frozen=True)
class Section:
    """An experiment on the page."""

    record: Record
    folder: Path
    """Of the record, which its pictures lie in."""
    anchor: str
    title: str
    """Under the paper's name; with the data where several have the same."""

    @functools.cached_property
    def pictures(self) -> list[Picture]:
        return [_picture(self.folder, plot) for plot in self.record.plots]

    @property
    def notes(self) -> str:
        """Markdown without pictures, which the plots of a record are."""
        return _IMAGE.sub("", self.record.notes).strip()


def write_report(folder: Path, out: Path, tables: Mapping[str, Table]) -> None:
    """Writes ``out``, an HTML page, and beside it the same in Markdown.

    Args:
        folder: where records are looked for, at any depth.
        tables: by name, in the order of the page. Records of others come after these, by name. A record of before
            claims were kept has those of its table.

    Raises:
        ValueError: no records, or a broken record or plot, which is named. Nothing is written.
    """
    records = []
    for place, record in find_records(folder):
        if not record.claims and record.name in tables:
            record = replace(record, claims=tables[record.name].read_claims())
        records.append((place, record))
    papers = arranged(records, tables)
    page = _render("page.html.j2", papers=papers)
    text = _render("page.md.j2", papers=papers, base=out.parent)
    write_atomically(out, page)
    write_atomically(out.with_suffix(".md"), text)


def record_page(record: Record) -> str:
    """A record alone in Markdown, for a file beside it."""
    section = Section(record, Path(), "", record.title)
    return _render("page.md.j2", papers={}, section=section, base=Path())


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"markdown_to_html": markdown_to_html, "plain": _plain, "whole": _unbroken}
    functions = (duration, facts, failures, grid, markdown_table, relative, summary, verdicts)
    environment.globals |= {function.__name__: function for function in functions}
    sections = [section for group in values["papers"].values() for section in group]
    text = environment.get_template(template).render(
        title=TITLE, introduction=INTRODUCTION, sections=sections, **values
    )
    return text.rstrip("\n") + "\n"


def markdown_to_html(text: str) -> str:
    """Notes as HTML: what is HTML in them is shown as it stands, and so are links; headings are of level 5."""
    import markdown

    converter = markdown.Markdown(extensions=["tables", "fenced_code", "sane_lists"])
    converter.preprocessors.deregister("html_block")
    for pattern in ("html", "entity", "link", "reference", "short_reference", "autolink", "automail"):
        converter.inlinePatterns.deregister(pattern)
    html = converter.convert(re.sub(r"^#{1,6} ", "##### ", text, flags=re.MULTILINE))
    html = re.sub(r"<th\b", '<th scope="col"', html)
    html = html.replace(
        "<table>", '<div class="scroll" tabindex="0" role="region" aria-label="Table of the notes">\n<table>'
    )
    return html.replace("</table>", "</table>\n</div>")


def _plain(text: str) -> str:
    """``text`` on one line, with what Markdown would take for marks said to be none."""
    return re.sub(r"([\\`*|\[\]<>&])", r"\\\1", " ".join(text.split()))


def _unbroken(text: str) -> list[str]:
    """The parts of a cell between which a line may break: number, count, and what failed."""
    return re.split(r" (?=\()|(?<=,) ", text)


def relative(folder: Path, file: str, base: Path) -> str:
    return quote(Path(os.path.relpath(folder / file, base)).as_posix())


def find_records(folder: Path) -> list[tuple[Path, Record]]:
    """The records below ``folder`` and the folders they lie in."""
    if not folder.is_dir():
        raise ValueError(
            f"DIR is {str(folder)!r}, which is no folder; it should be one that `ssmkernels reproduce` wrote to"
        )
    records = [(path.parent, read_record(path.parent)) for path in sorted(folder.rglob(FILE))]
    if not records:
        raise ValueError(
            f"DIR is {str(folder)!r}, which has no {FILE} at any depth; `ssmkernels reproduce NAME` leaves one"
        )
    return records


def arranged(records: Sequence[tuple[Path, Record]], tables: Mapping[str, Table]) -> dict[str, list[Section]]:
    """Papers in their order, in each the experiments in theirs, of one experiment the larger budget first."""
    order = [*dict.fromkeys(table.paper for table in tables.values()), *tables, *BUDGETS]

    def place(item: tuple[Path, Record]) -> tuple[object, ...]:
        folder, record = item
        names = (record.paper, record.name, record.budget)
        return *((order.index(name) if name in order else len(order), name) for name in names), folder

    papers: dict[str, list[Section]] = {}
    titles = Counter((record.paper, _title(record)) for _, record in records)
    anchors: Counter[str] = Counter()
    for folder, record in sorted(records, key=place):
        anchor = re.sub(r"[^a-z0-9]+", "-", f"{record.name} {record.budget}".lower()).strip("-")
        anchors[anchor] += 1
        anchor = anchor if anchors[anchor] == 1 else f"{anchor}-{anchors[anchor]}"
        title = f"{_title(record)} ({record.data})" if titles[record.paper, _title(record)] > 1 else _title(record)
        papers.setdefault(record.paper, []).append(Section(record, folder, anchor, title))
    return papers


def _title(record: Record) -> str:
    """The title without the paper's name, which stands above, and with the budget."""
    title = re.sub(rf"^{re.escape(record.paper)}[,:] +", "", record.title)
    return f"{title[:1].upper()}{title[1:]} ({record.budget})"


def _picture(folder: Path, plot: Plot) -> Picture:
    """A plot of the record in ``folder``."""
    path, what = folder / plot.file, f"a plot of {folder / FILE} is {plot.file!r}"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{what}; it should be a file in the folder of the record")
    if not path.is_file():
        raise ValueError(f"{what}, which is not there")
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG\r\n\x1a\n") or len(content) < 24:
        raise ValueError(f"{what}, which is no PNG")
    width, height = struct.unpack(">II", content[16:24])
    return Picture(plot, width, height, f"data:image/png;base64,{base64.b64encode(content).decode()}")


def grid(record: Record) -> Grid:
    """The entries of a record as one table: a part for each setting, in which those of a method stand together; ours
    first, columns of dashes and settings of which nothing was run left out, the figure in the caption where there is
    one alone.
    """
    left_out = settings_left_out(record)
    entries = [entry for entry in record.entries if entry.column not in left_out]
    titles = list(dict.fromkeys(entry.titled for entry in entries))
    columns = {
        "figure": [entry.titled if len(titles) > 1 else "-" for entry in entries],
        "ours": [ours(entry, len(record.seeds)) for entry in entries],
        "paper": [entry.paper for entry in entries],
        "difference": [difference(entry) for entry in entries],
    }
    header = tuple(name for name, texts in columns.items() if name == "ours" or set(texts) - {"-", ""})
    methods = list(dict.fromkeys(entry.row for entry in entries))
    spans = Counter((entry.row, entry.column) for entry in entries)
    settings: dict[str, list[Row]] = {entry.column: [] for entry in entries}
    for number, entry in sorted(enumerate(entries), key=lambda item: methods.index(item[1].row)):
        span = spans.pop((entry.row, entry.column), 0)
        cells = tuple(columns[name][number] for name in header)
        settings[entry.column].append(Row(entry.row, span, cells, bool(entry.failed)))
    whose = "Ours and the paper's" if "paper" in header else "Ours"
    caption = f"{titles[0]}: {whose[0].lower()}{whose[1:]}" if len(titles) == 1 else whose
    return Grid(header, caption, settings)


def settings_left_out(record: Record) -> list[str]:
    """The settings of which nothing was run, where something was of another."""
    settings = dict.fromkeys(entry.column for entry in record.entries)
    with_results = {entry.column for entry in record.entries if entry.has_run}
    return [setting for setting in settings if setting not in with_results] if with_results else []


def ours(entry: Entry, seeds: int) -> str:
    """``mean ± std (n = 3)``, ``n = 3 of 5`` where not all ``seeds`` finished; a dash where none did. Failed ones
    are counted.
    """
    if not entry.run:
        return NOT_RUN
    count = len(entry.values)
    number = f" (n = {count} of {seeds})" if count < seeds else f" (n = {count})" if count > 1 else ""
    finite = all(map(isfinite, entry.values))
    text = (mean_and_std(entry.values, digits=entry.digits) if finite else "nan") + number if count else "-"
    return f"{text}, {len(entry.failed)} failed" if entry.failed else text


def difference(entry: Entry) -> str:
    """Our mean minus the paper's, with its sign; a dash where either is no number."""
    paper = entry.papers_number
    if not paper or not entry.values or not all(map(isfinite, entry.values)):
        return "-"
    exact = round(statistics.fmean(entry.values) - float(paper), entry.digits)
    return f"{exact + 0.0:+.{entry.digits}f}"  # + 0.0: no -0.00


def failures(record: Record) -> dict[str, tuple[str, ...]]:
    """ "method, setting" -> messages of its failed seeds, each once. A seed fails for all its figures together."""
    messages: dict[str, dict[str, None]] = {}
    for entry in record.entries:
        if entry.failed:
            messages.setdefault(f"{entry.row}, {entry.column}", {}).update(dict.fromkeys(entry.failed))
    return {cell: tuple(distinct) for cell, distinct in messages.items()}


def progress(record: Record) -> str:
    """Finished cells of all that are run, a cell being a method in a setting with a seed, and the number of failed
    ones. A dash for a record without a table.
    """
    seeds = max(1, len(record.seeds))
    finished: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    for entry in record.entries:
        if entry.run:
            cell = entry.row, entry.column
            finished[cell] = max(finished[cell], min(len(entry.values), seeds))
            failed[cell] = max(failed[cell], len(entry.failed))
    if not finished:
        return "-"
    text = f"{finished.total()}/{seeds * len(finished)}"
    return f"{text}, {failed.total()} failed" if failed.total() else text


def summary(record: Record) -> tuple[str, ...]:
    """Budget, data, seeds, progress and run time."""
    return record.budget, record.data, str(len(record.seeds)), progress(record), duration(record.seconds)


def facts(record: Record) -> dict[str, str]:
    """The circumstances of the numbers."""
    left_out = settings_left_out(record)
    return {
        "Budget": record.budget,
        "Data": record.data,
        "Seeds": ", ".join(map(str, record.seeds)) or "-",
        "Cells finished": progress(record),
        **({"Settings not run": "; ".join(left_out)} if left_out else {}),
        "Run time": f"{duration(record.seconds)} on {record.machine}",
        "Versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()) or "-",
    }


def main(argv: Sequence[str]) -> int:
    # This needs the packages to train with; the page does not
    from ssmkernels.experiments.spec import load_tables

    parser = argparse.ArgumentParser(prog="ssmkernels report", description="Every record below a folder as one page.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that `ssmkernels reproduce` wrote to")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the HTML page; the Markdown lies beside it (default: DIR/report.html)"
    )
    options = parser.parse_args(argv)
    out = options.folder / "report.html" if options.out is None else options.out
    try:
        if out.suffix != ".html":
            raise ValueError(f"--out is {str(out)!r}; it should end in .html")
        if options.folder.is_dir():  # or write_report says that it is not
            check_folder(out.parent, "--out")
        write_report(options.folder, out, load_tables())
    except (ValueError, OSError) as error:
        print(f"ssmkernels report: {error}", file=sys.stderr)
        return 1
    print(f"The report is {out} and, in Markdown, {out.with_suffix('.md')}.")
    return 0

# SPDX-License-Identifier: BSD-3-Clause
"""``ssmkernels report DIR``: every record below a folder as one HTML page and one Markdown file."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from ssmkernels.experiments.notes_html import IMAGE, shift_headings
from ssmkernels.experiments.record import FILE, Plot, Record, read_record, write_atomically
from ssmkernels.experiments.report import (
    by_setting,
    difference,
    duration,
    facts,
    failures,
    markdown_table,
    ours,
    progress,
    titled,
    verdicts,
)
from ssmkernels.experiments.report_html import INTRODUCTION, TITLE, Section, html_page

_BUDGETS = ("paper", "short", "smoke")  # the one that says most first


def write_report(folder: Path, out: Path, order: Mapping[str, Iterable[str]]) -> None:
    """Writes ``out``, an HTML page, and beside it the same in Markdown.

    Args:
        folder: where records are looked for, at any depth.
        order: papers and the names of their experiments. Records of others come after these, by name.

    Raises:
        ValueError: no records, or a broken record or plot, which is named. Nothing is written.
    """
    papers = arranged(find_records(folder), order)
    page, text = html_page(papers), markdown_page(papers, out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    write_atomically(out.with_suffix(".md"), text)


def find_records(folder: Path) -> list[tuple[Path, Record]]:
    """The records below ``folder`` and the folders they lie in."""
    if not folder.is_dir():
        raise ValueError(
            f"DIR is {str(folder)!r}, which is no folder; it should be one that `ssmkernels reproduce` wrote to"
        )
    found = [(path.parent, read_record(path.parent)) for path in sorted(folder.rglob(FILE))]
    if not found:
        raise ValueError(
            f"DIR is {str(folder)!r}, which has no {FILE} at any depth; `ssmkernels reproduce NAME` leaves one"
        )
    return found


def arranged(found: Sequence[tuple[Path, Record]], order: Mapping[str, Iterable[str]]) -> dict[str, list[Section]]:
    """Papers in their order, in each the experiments in theirs, of one experiment the larger budget first."""

    first, names = list(order), [name for each in order.values() for name in each]

    def place(each: tuple[Path, Record]) -> tuple[object, ...]:
        folder, record = each
        return (
            _index(first, record.paper),
            record.paper,
            _index(names, record.name),
            record.name,
            _index(_BUDGETS, record.budget),
            folder,
        )

    papers: dict[str, list[Section]] = {}
    titles = Counter((record.paper, _title(record)) for _, record in found)
    anchors: Counter[str] = Counter()
    for folder, record in sorted(found, key=place):
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


def _index(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


def markdown_page(papers: Mapping[str, Sequence[Section]], base: Path) -> str:
    """The page in Markdown; pictures are referred to from the folder ``base``."""
    rows = [
        [
            f"[{_plain(each.record.title)}](#{each.anchor})",
            *map(_plain, (each.record.budget, each.record.data)),
            *(str(len(each.record.seeds)), progress(each.record), duration(each.record.seconds)),
        ]
        for sections in papers.values()
        for each in sections
    ]
    summary = markdown_table(["experiment", "budget", "data", "seeds", "cells finished", "time"], rows)
    parts = [f"# {TITLE}", INTRODUCTION, summary]
    for paper, sections in papers.items():
        parts += [f"## {_plain(paper)}", *(_section(each, base) for each in sections)]
    return "\n\n".join(parts) + "\n"


def _section(section: Section, base: Path) -> str:
    heading = f'<a id="{section.anchor}"></a>\n\n### {_plain(section.title)}'
    return f"{heading}\n\n{_content(section.record, section.folder, base)}"


def record_page(record: Record) -> str:
    """A record alone in Markdown, for a file beside it."""
    return f"# {_plain(record.title)}\n\n{_content(record, Path(), Path())}\n"


def _content(record: Record, folder: Path, base: Path) -> str:
    """A record without its heading; pictures in ``folder`` are referred to from ``base``."""

    def picture(plot: Plot) -> str:
        path = quote(Path(os.path.relpath(folder / plot.file, base)).as_posix())
        return f"![{_plain(plot.title)}]({path})" + (f"\n\nIn the paper: {_plain(plot.paper)}" if plot.paper else "")

    plots = {each.file: each for each in record.plots}
    notes = IMAGE.sub(
        lambda found: picture(plots.get(found[2], Plot(found[1], found[2]))), shift_headings(record.notes, 4)
    )
    shown = {file for _, file in IMAGE.findall(record.notes)}
    parts = ["\n".join(f"- {name}: {_plain(text)}" for name, text in facts(record).items())]
    parts.append(f"```sh\n{record.command}\n```")
    if claims := verdicts(record):
        rows = [[_plain(text) for text in claim] for claim in claims]
        table = markdown_table(["claim", "setting", "difference", "verdict"], rows)
        parts.append(f"Differences paired by seed, with their 95 % intervals:\n\n{table}")
    if record.entries:
        parts.append(_entries(record))
    parts += [
        f"**Failed: {_plain(cell)}.** {_plain(each)}"
        for cell, messages in failures(record).items()
        for each in messages
    ]
    parts += [picture(each) for each in record.plots if each.file not in shown]
    if record.deviations:
        parts.append("Deviations from the paper:\n\n" + "\n".join(f"- {_plain(each)}" for each in record.deviations))
    return "\n\n".join((*parts, notes.strip("\n")) if notes.strip() else parts)


def _entries(record: Record) -> str:
    rows = [
        [
            *map(_plain, (column, entry.row, titled(entry), entry.paper)),
            ours(entry, len(record.seeds)),
            difference(entry),
        ]
        for column, entries in by_setting(record).items()
        for entry in entries
    ]
    return markdown_table(["setting", "method", "figure", "paper", "ours", "difference"], rows)


def _plain(text: str) -> str:
    """``text`` on one line, with what Markdown would take for marks said to be none."""
    return re.sub(r"([\\`*|\[\]<>&])", r"\\\1", " ".join(text.split()))


def main(argv: Sequence[str]) -> int:
    from ssmkernels.experiments.spec import load_tables  # needs the packages to train with; the page does not

    parser = argparse.ArgumentParser(prog="ssmkernels report", description=__doc__.replace("``", ""))
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that `ssmkernels reproduce` wrote to")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the HTML page; the Markdown lies beside it (default: DIR/report.html)"
    )
    options = parser.parse_args(argv)
    out = options.folder / "report.html" if options.out is None else options.out
    order: dict[str, list[str]] = {}
    for name, table in load_tables().items():
        order.setdefault(table.paper, []).append(name)
    try:
        if out.suffix != ".html":
            raise ValueError(f"--out is {str(out)!r}; it should end in .html")
        write_report(options.folder, out, order)
    except (ValueError, OSError) as error:
        print(f"ssmkernels report: {error}", file=sys.stderr)
        return 1
    print(f"The report is {out} and, in Markdown, {out.with_suffix('.md')}.")
    return 0

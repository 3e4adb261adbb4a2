# SPDX-License-Identifier: BSD-3-Clause
"""The report as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ssmkernels.experiments.notes_html import html_of_markdown, scrolling_table
from ssmkernels.experiments.record import FILE, Entry, Plot, Record
from ssmkernels.experiments.report import (
    by_setting,
    difference,
    duration,
    facts,
    failures,
    ours,
    progress,
    titled,
    verdicts,
)

TITLE = "Reproduced tables and figures"
INTRODUCTION = (
    "Each table has the paper's number beside ours: the mean ± standard deviation over n seeds, or the value of a"
    " single one; a dash where there is none. The difference is ours minus the paper's. The budget smoke shows that an"
    " experiment runs, not what it reaches; short is a part of the paper's training; paper is all of it. Where budget"
    " or data are not the paper's, the order of the methods can be compared, the numbers cannot."
)


class Section(NamedTuple):
    """An experiment on the page."""

    record: Record
    folder: Path
    """Of the record, which its pictures lie in."""
    anchor: str
    title: str
    """Under the paper's name; with the data where several have the same."""


def html_page(papers: Mapping[str, Sequence[Section]]) -> str:
    """The page; ``papers`` maps a paper to its sections.

    Raises:
        ValueError: a picture is missing, no PNG, or outside the folder of its record.
    """
    contents, chapters = [], []
    for number, (paper, sections) in enumerate(papers.items(), start=1):
        links = "".join(f'<li><a href="#{each.anchor}">{escape(each.title)}</a></li>\n' for each in sections)
        contents.append(f'<li><a href="#paper-{number}">{escape(paper)}</a>\n<ol>\n{links}</ol></li>\n')
        chapters.append(f'<h2 id="paper-{number}">{escape(paper)}</h2>\n' + "".join(map(_section, sections)))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light'
        ' dark">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        '<nav aria-label="Contents">\n<ol>\n<li><a'
        f' href="#summary">Summary</a></li>\n{"".join(contents)}</ol>\n</nav>\n<main>\n'
        f"<h1>{TITLE}</h1>\n<p>{escape(INTRODUCTION)}</p>\n"
        f"{_summary([each for sections in papers.values() for each in sections])}"
        f"{''.join(chapters)}</main>\n</body>\n</html>\n"
    )


def _summary(sections: Sequence[Section]) -> str:
    rows = []
    for record, _, anchor, _ in sections:
        numbers = "".join(
            f"<td>{each}</td>" for each in (len(record.seeds), progress(record), duration(record.seconds))
        )
        rows.append(
            f'<tr><th scope="row"><a href="#{anchor}">{escape(record.title)}</a></th><td>{escape(record.budget)}</td>'
            f'<td class="wide data">{escape(record.data)}</td>{numbers}</tr>\n'
        )
    header = _header(("experiment", "budget", "data", "seeds", "cells finished", "time"))
    total = duration(sum(each.record.seconds for each in sections))
    caption = f"Run time {total} in all; a cell is a method in a setting with one seed"
    return '<h2 id="summary">Summary</h2>\n' + scrolling_table(
        f"{header}<tbody>{''.join(rows)}</tbody>\n", "summary", caption
    )


def _section(section: Section) -> str:
    record = section.record
    plots = {each.file: each for each in record.plots}
    shown: set[str] = set()

    def picture(alt: str, file: str) -> str:
        shown.add(file)
        return _figure(section.folder, plots.get(file, Plot(alt, file)))

    notes = html_of_markdown(record.notes, picture, label=f"{record.title}, notes", level=5)
    parts = [
        f'<section aria-labelledby="{section.anchor}">\n<h3 id="{section.anchor}">{escape(section.title)}</h3>\n',
        _facts(record),
    ]
    if claims := verdicts(record):
        rows = "".join(f"<tr>{_claim(each)}</tr>\n" for each in claims)
        header = _header(("claim", "setting", "difference", "verdict"))
        caption = "Differences paired by seed, with their 95 % intervals"
        parts.append(scrolling_table(f"{header}<tbody>{rows}</tbody>\n", f"{record.title}, claims", caption))
    if record.entries:
        parts.append(_entries(record))
    for cell, messages in failures(record).items():
        parts.extend(
            f'<p class="failed"><strong>Failed: {escape(cell)}.</strong> {escape(each)}</p>\n' for each in messages
        )
    parts.extend(_figure(section.folder, each) for each in record.plots if each.file not in shown)
    if record.deviations:
        items = "".join(f"<li>{escape(each)}</li>\n" for each in record.deviations)
        parts.append(f"<h4>Deviations from the paper</h4>\n<ul>\n{items}</ul>\n")
    if notes:
        parts.append(f"<h4>Notes</h4>\n{notes}")
    return "".join((*parts, "</section>\n"))


def _claim(verdict: Sequence[str]) -> str:
    name, *rest = verdict
    return f'<th scope="row">{escape(name)}</th>' + "".join(f'<td class="wide">{escape(each)}</td>' for each in rest)


def _facts(record: Record) -> str:
    lines = [f"<dt>{name}</dt><dd>{escape(text)}</dd>\n" for name, text in facts(record).items()]
    return f"<dl>\n{''.join(lines)}<dt>Command</dt><dd><code>{escape(record.command)}</code></dd>\n</dl>\n"


def _entries(record: Record) -> str:
    """One group of rows per setting, in it one per method; the figure is a column where there are several, and in
    the caption else.
    """
    figures = {titled(each): None for each in record.entries}
    several = len(figures) > 1
    header = _header(("method", *(("figure",) if several else ()), "paper", "ours", "difference"))
    width = 5 if several else 4
    groups = []
    for column, entries in by_setting(record).items():
        heading = f'<th scope="rowgroup" colspan="{width}"><span class="stay">{escape(column)}</span></th>'
        lines = [f'<tr class="setting">{heading}</tr>\n'] if column else []
        for row, each in groupby(entries, key=lambda entry: entry.row):
            same = list(each)
            method = f'<th scope="row" rowspan="{len(same)}">{escape(row)}</th>'
            for entry in same:
                figure = f"<td>{escape(titled(entry))}</td>" if several else ""
                numbers = f"<td>{escape(entry.paper)}</td>{_ours(entry, len(record.seeds))}<td>{difference(entry)}</td>"
                lines.append(f"<tr>{method}{figure}{numbers}</tr>\n")
                method = ""
        groups.append(f"<tbody>{''.join(lines)}</tbody>\n")
    caption = "The paper's figures and ours" if several else f"{next(iter(figures))}, the paper's and ours"
    return scrolling_table(f"{header}{''.join(groups)}", record.title, caption)


def _ours(entry: Entry, seeds: int) -> str:
    """A line may break between number, count and what failed, not within."""
    parts = re.split(r" (?=\()|(?<=,) ", ours(entry, seeds))
    text = " ".join(f'<span class="whole">{each}</span>' for each in parts)
    return f'<td class="wide failed">{text}</td>' if entry.failed else f'<td class="wide">{text}</td>'


def _header(names: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f"<thead><tr>{cells}</tr></thead>\n"


def _figure(folder: Path, plot: Plot) -> str:
    picture = _png(folder, plot.file)
    width, height = struct.unpack(">II", picture[16:24])  # kept free while the page loads
    said = f"{escape(plot.title)}. In the paper: {escape(plot.paper)}" if plot.paper else escape(plot.title)
    return (
        f'<figure><img src="data:image/png;base64,{base64.b64encode(picture).decode()}" width="{width}"'
        f' height="{height}" alt="{escape(plot.title)}">\n<figcaption>{said}</figcaption></figure>\n'
    )


def _png(folder: Path, file: str) -> bytes:
    """The picture ``file`` of the record in ``folder``."""
    path = folder / file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"a plot of {folder / FILE} is {file!r}; it should be a file in the folder of the record")
    if not path.is_file():
        raise ValueError(f"a plot of {folder / FILE} is {file!r}, which is not there")
    picture = path.read_bytes()
    if not picture.startswith(b"\x89PNG\r\n\x1a\n") or len(picture) < 24:
        raise ValueError(f"a plot of {folder / FILE} is {file!r}, which is no PNG")
    return picture


STYLE = """
:root { --page: #fff; --text: #1b1f24; --quiet: #57606a; --line: #d5dbe1; --tint: #f3f5f7;
  --link: #0b57d0; --bad: #b3261e; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #11151a; --text: #e4e7ea; --quiet: #9fa9b3; --line: #343b43; --tint: #1b2128;
    --link: #86b7ff; --bad: #ff9a90; }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1rem; max-width: 82rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere;
}
a { color: var(--link); text-underline-offset: .15em; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
h1, h2, h3, h4, h5, h6 { line-height: 1.25; text-wrap: balance; }
h1 { font-size: 1.8rem; margin: .5rem 0 1rem; }
h2 { font-size: 1.4rem; margin: 3rem 0 1rem; padding-bottom: .3rem; border-bottom: 2px solid var(--line); }
h3 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h4, h5, h6 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, li, dl, figcaption { max-width: 72ch; }
nav { font-size: .9rem; }
nav ol { list-style: none; margin: 0; padding: 0; }
nav > ol { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
nav ol ol { display: none; }
nav a { display: inline-block; padding: .3rem 0; text-decoration: none; }
nav a:hover { text-decoration: underline; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1rem; margin: 0 0 1rem;
  font-size: .9rem; }
dt { color: var(--quiet); }
dd { margin: 0; }
code { font: .9em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
:not(pre) > code { padding: .1em .3em; background: var(--tint); border-radius: 4px; }
pre { overflow-x: auto; padding: .75rem 1rem; background: var(--tint); border-radius: 6px; }
pre code { overflow-wrap: normal; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { padding: .5rem .75rem; text-align: left; color: var(--quiet); }
th, td { padding: .4rem .75rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
td { white-space: nowrap; }
th { font-weight: 600; }
thead th { background: var(--tint); }
tbody th { min-width: 9rem; font-weight: 500; }
th[scope="row"], thead th:first-child { position: sticky; left: 0; }
th[scope="row"] { background: var(--page); }
.setting th { background: var(--tint); color: var(--quiet); font-weight: 600; }
.stay { position: sticky; left: .75rem; display: inline-block; max-width: calc(100vw - 4rem); }
.wide { white-space: normal; }
.whole { white-space: nowrap; }
.data { min-width: 12rem; }
.failed { color: var(--bad); }
figure { margin: 1.5rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption { margin-top: .4rem; font-size: .9rem; color: var(--quiet); }
@media (max-width: 32rem) {
  th, td { padding: .35rem .5rem; }
  .stay { left: .5rem; }
  tbody th { min-width: 7rem; }
  ul, ol { padding-left: 1.25rem; }
}
@media (min-width: 68rem) {
  body { display: grid; grid-template-columns: 16rem minmax(0, 1fr); gap: 3rem; padding: 1.5rem 2rem; }
  nav { position: sticky; top: 1.5rem; align-self: start; max-height: calc(100vh - 3rem);
    overflow-y: auto; line-height: 1.35; }
  nav > ol { display: block; }
  nav ol ol { display: block; margin: 0 0 .75rem; padding-left: .75rem; border-left: 1px solid var(--line); }
  nav > ol > li > a { font-weight: 600; }
}
@media print {
  body { display: block; max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .scroll { overflow: visible; border: 0; }
  td { white-space: normal; }
  tr, figure, dl { break-inside: avoid; }
  h2, h3, h4, caption { break-after: avoid; }
  thead { display: table-header-group; }
}
"""

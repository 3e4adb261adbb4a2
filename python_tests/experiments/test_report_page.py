# SPDX-License-Identifier: BSD-3-Clause
"""The page of all records: what is in it, in which order, and that it is one well-formed file."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from ssmkernels import cli
from ssmkernels._text import duration
from ssmkernels.experiments.record import Claim, Entry, Plot, Record, write_record
from ssmkernels.experiments.report import (
    difference,
    failures,
    markdown_to_html,
    ours,
    progress,
    write_report,
)
from ssmkernels.experiments.spec import load_tables, read_tables

TABLE1 = Record(
    name="simmatch-table1",
    title="SimMatch, Table 1: accuracy",
    paper="SimMatch",
    budget="short",
    data="CIFAR-10",
    seeds=(1, 2),
    command="ssmkernels reproduce simmatch-table1 --data DIR --budget short",
    entries=(
        Entry("FixMatch", "40 labels", "top-1", "%", "86.19 ± 3.37", (80.0, 82.0)),
        Entry("SimMatch", "40 labels", "top-1", "%", "94.40 ± 1.37", (95.0,), ("out of memory: 3 < 4",)),
        Entry("FixMatch", "250 labels", "top-1", "%", "-", (90.0, 90.0)),
        Entry("SimMatch", "250 labels", "top-1", "%", "95.16", ()),
    ),
    plots=(),
    deviations=("Fewer steps.",),
    notes="",
    seconds=4000.0,
    machine="2 x CPU, no GPU",
    versions={"torch": "2.15.0"},
)
TABLES = load_tables()
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks while it reads that every element is closed, and keeps what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.headings = [], [], [], [], []
        self.rows, self.words, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        if tag == "img":
            self.images.append(values)
        if tag == "th":
            assert values["scope"] in ("row", "col", "rowgroup")
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "table":
            assert self.open[-1] == ("div", "scroll")
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append((tag, values.get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.words.append(data)
        if any(tag in ("th", "td") for tag, _ in self.open):
            self.rows[-1][-1] += data

    def text(self):
        return " ".join("".join(self.words).split())


def make(tmp_path, *records):
    for number, record in enumerate(records):
        write_record(tmp_path / "runs" / str(number), record)
    write_report(tmp_path / "runs", tmp_path / "runs" / "report.html", TABLES)
    return (tmp_path / "runs" / "report.html").read_text(encoding="utf-8"), (tmp_path / "runs" / "report.md").read_text(
        encoding="utf-8"
    )


def picture(folder, name, size=(6, 4)):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "white").save(folder / name)


def test_the_papers_numbers_stand_beside_ours(tmp_path):
    html, markdown = make(tmp_path, TABLE1)
    rows = Page(html).rows
    assert ["FixMatch", "81.00 ± 1.41 (n = 2)", "86.19 ± 3.37", "-5.19"] in rows
    assert ["SimMatch", "95.00 (n = 1 of 2), 1 failed", "94.40 ± 1.37", "+0.60"] in rows
    assert ["FixMatch", "90.00 ± 0.00 (n = 2)", "-", "-"] in rows
    assert ["SimMatch", "-", "95.16", "-"] in rows
    assert [row for row in rows if len(row) == 1] == [["40 labels"], ["250 labels"]]
    lines = [re.sub(r" +", " ", line) for line in markdown.splitlines()]
    assert "| 40 labels | FixMatch | 81.00 ± 1.41 (n = 2) | 86.19 ± 3.37 | -5.19 |" in lines
    assert "| 250 labels | SimMatch | - | 95.16 | - |" in lines


def test_figures_of_a_method_stand_together(tmp_path):
    entries = tuple(Entry(row, "all", figure, "", "-", (0.5,)) for figure in ("NMI", "R@1") for row in ("A", "B"))
    rows = Page(make(tmp_path, replace(TABLE1, seeds=(1,), entries=entries))[0]).rows
    start = rows.index(["method", "figure", "ours"])  # the paper has no numbers: no columns of dashes
    assert rows[start + 2 : start + 6] == [
        ["A", "NMI", "0.500"],
        ["R@1", "0.500"],
        ["B", "NMI", "0.500"],
        ["R@1", "0.500"],
    ]


def test_what_a_reader_has_to_know_is_said(tmp_path):
    html, markdown = make(tmp_path, TABLE1)
    words = Page(html).text()
    for text in ("1 h 07 min on 2 x CPU, no GPU", "torch 2.15.0", "Fewer steps.", TABLE1.command, "CIFAR-10", "1, 2"):
        assert text in words
        assert text in markdown
    for text in ("Failed: SimMatch, 40 labels.", "out of memory: 3 < 4"):
        assert text in words
    assert r"**Failed: SimMatch, 40 labels.** out of memory: 3 \< 4" in markdown


def test_the_summary_links_to_every_experiment(tmp_path):
    page = Page(make(tmp_path, TABLE1, replace(TABLE1, budget="smoke", seconds=7.0, data="digits"))[0])
    assert ["SimMatch, Table 1: accuracy", "short", "CIFAR-10", "2", "5/8, 1 failed", "1 h 07 min"] in page.rows
    assert ["SimMatch, Table 1: accuracy", "smoke", "digits", "2", "5/8, 1 failed", "7 s"] in page.rows
    assert len(set(page.ids)) == len(page.ids)
    assert {link.removeprefix("#") for link in page.links} == set(page.ids)


def test_papers_and_experiments_are_in_their_order(tmp_path):
    records = [
        replace(TABLE1, paper=paper, name=paper, title=f"{paper}, Table 9")
        for paper in ("SLADE", "MLSN", "Mixed label propagation")
    ]
    records += [
        replace(TABLE1, name="simmatch-table5", title="SimMatch, Table 5", budget=budget)
        for budget in ("smoke", "paper")
    ]
    html, markdown = make(tmp_path, *records, replace(TABLE1, name="unknown", title="Another"), TABLE1)
    papers, sections = (re.findall(rf"<{tag} id=[^>]*>(.*?)</{tag}>", html) for tag in ("h2", "h3"))
    assert papers == ["Summary", "SimMatch", "Mixed label propagation", "MLSN", "SLADE"]
    assert sections == [
        *("Table 1: accuracy (short)", "Table 5 (paper)", "Table 5 (smoke)", "Another (short)"),
        *("Table 9 (short)",) * 3,
    ]
    assert re.findall(r"^### (.*)", markdown, flags=re.MULTILINE) == sections


def test_the_same_experiment_on_other_data_is_shown_too(tmp_path):
    html, markdown = make(tmp_path, TABLE1, replace(TABLE1, data="digits"))
    page = Page(html)
    for text in ("Table 1: accuracy (short) (CIFAR-10)", "Table 1: accuracy (short) (digits)"):
        assert text in page.text()
        assert text in markdown
    assert len(set(page.ids)) == len(page.ids)


def test_texts_are_shown_as_they_are(tmp_path):
    nasty = 'a|b <i>&amp; "x" `c` *d* [e](f)'
    record = replace(
        TABLE1,
        title=nasty,
        data=nasty,
        machine=nasty,
        deviations=(nasty,),
        entries=(Entry(nasty, nasty, nasty, "%", nasty, (1.0,), (nasty,)),),
        notes=f"{nasty}\n\n<script>alert(1)</script>",
    )
    html, markdown = make(tmp_path, record)
    page = Page(html)
    assert [nasty, "1.00 (n = 1 of 2), 1 failed", nasty] in page.rows
    assert {"i", "script"}.isdisjoint(page.tags)
    assert "<script>alert(1)</script>" in page.text()
    table = [line for line in markdown.splitlines() if line.startswith("| a")]
    assert len(table) == 1
    assert len(re.split(r"(?<!\\)\|", table[0])) == 6
    assert r"a\|b \<i\>\&amp; " in table[0]


def test_pictures_are_inside(tmp_path):
    picture(tmp_path / "runs" / "0", "my curves.png", (60, 40))
    picture(tmp_path / "runs" / "0", "other.png")
    plots = (Plot("Curves & <more>", "my curves.png", "it rises"), Plot("Other", "other.png"))
    html, markdown = make(tmp_path, replace(TABLE1, plots=plots, notes="before\n\n![x](other.png)\n\nafter"))
    page = Page(html)
    first, second = page.images
    assert (
        base64.b64decode(first["src"].removeprefix("data:image/png;base64,"))
        == (tmp_path / "runs/0/my curves.png").read_bytes()
    )
    assert (first["alt"], first["width"], first["height"]) == ("Curves & <more>", "60", "40")
    assert second["alt"] == "Other"
    assert "In the paper: it rises" in page.text()
    assert r"![Curves \& \<more\>](0/my%20curves.png)" in markdown
    assert markdown.count("other.png") == 1  # the plots of a record are its pictures, not what its notes refer to


def test_the_page_needs_nothing_else(tmp_path):
    picture(tmp_path / "runs" / "0", "p.png")
    html, _ = make(tmp_path, replace(TABLE1, plots=(Plot("P", "p.png"),), notes="# Head\n\n## Sub\n\ntext"))
    page = Page(html)
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert not re.search(r"https?://|@import|url\(", html)
    assert 'name="viewport" content="width=device-width' in html
    assert "prefers-color-scheme: dark" in html
    assert page.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))


def test_a_record_without_numbers_is_shown(tmp_path):
    html, markdown = make(
        tmp_path, replace(TABLE1, entries=(), seeds=(), deviations=(), notes="only words", versions={})
    )
    assert ["SimMatch, Table 1: accuracy", "short", "CIFAR-10", "0", "-", "1 h 07 min"] in Page(html).rows
    assert "only words" in markdown
    assert "Deviations" not in html


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        ("absent.png", "'absent.png', which is not there"),
        ("text.png", "which is no PNG"),
        ("../1/p.png", "in the folder of the record"),
    ],
)
def test_a_plot_that_is_no_picture_is_named(tmp_path, plot, message):
    picture(tmp_path / "runs" / "1", "p.png")
    (tmp_path / "runs" / "0").mkdir()
    (tmp_path / "runs" / "0" / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=message):
        make(tmp_path, replace(TABLE1, plots=(Plot("P", plot),)))
    assert not list(tmp_path.rglob("report.*"))


def test_the_command(tmp_path, capsys):
    write_record(tmp_path / "runs" / "deep" / "er", replace(TABLE1, plots=()))
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "web" / "page.html")]) == 0
    assert sorted(path.name for path in (tmp_path / "web").iterdir()) == ["page.html", "page.md"]
    assert cli.main(["report", str(tmp_path / "runs")]) == 0
    assert str(tmp_path / "runs" / "report.md") in capsys.readouterr().out
    assert (tmp_path / "runs" / "report.html").read_text() == (tmp_path / "web" / "page.html").read_text()


def test_what_is_wrong_with_the_folder_is_said(tmp_path, capsys):
    def message_of(*arguments):
        assert cli.main(["report", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert (
        message_of(tmp_path)
        == f"ssmkernels report: DIR is '{tmp_path}', which has no record.json at any depth; `ssmkernels reproduce NAME`"
        " leaves one\n"
    )
    assert "which is no folder" in message_of(tmp_path / "absent")
    assert "it should end in .html" in message_of(tmp_path, "--out", tmp_path / "report.md")
    write_record(tmp_path / "good", TABLE1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "record.json").write_text('{"name"')
    assert f"{tmp_path / 'bad' / 'record.json'} is not a readable record" in message_of(tmp_path)
    assert not list(tmp_path.rglob("report.*"))


@pytest.mark.parametrize(
    ("paper", "unit", "expected"),
    [
        ("94.40 ± 1.37", "%", "+0.60"),
        ("95.00", "%", "+0.00"),
        ("95.001", "%", "-0.001"),
        ("95.5 %", "%", "-0.50"),
        (".468", "", "+94.532"),
        ("−3", "%", "+98.00"),
        ("-", "%", "-"),
        ("", "%", "-"),
        ("about 90", "%", "-"),
        ("90 to 95", "%", "-"),
    ],
)
def test_differences_are_of_numbers(paper, unit, expected):
    assert difference(Entry("a", "b", "c", unit, paper, (95.0,))) == expected


def test_numbers_that_are_none_are_no_difference():
    assert difference(Entry("a", "b", "c", "%", "1.0", ())) == "-"
    assert difference(Entry("a", "b", "c", "%", "1.0", (float("nan"), 1.0))) == "-"
    assert ours(Entry("a", "b", "c", "%", "1.0", (float("nan"), 1.0)), 2) == "nan (n = 2)"
    assert difference(Entry("a", "b", "c", "%", "95.004", (95.0039,))) == "+0.000"


def test_progress_and_failures_count_cells_once():
    entries = [Entry("a", "x", figure, "%", "-", (1.0,), ("boom",)) for figure in ("top-1", "top-5")]
    record = replace(TABLE1, seeds=(1, 2), entries=(*entries, Entry("b", "x", "top-1", "%", "-", (1.0, 2.0))))
    assert progress(record) == "3/4, 1 failed"
    assert failures(record) == {"a, x": ("boom",)}


def test_durations():
    assert [duration(seconds) for seconds in (0, 42.4, 600, 3599.9, 11100)] == [
        "0 s",
        "42 s",
        "10 min",
        "1 h 00 min",
        "3 h 05 min",
    ]


def test_rows_of_the_paper_are_quoted(tmp_path):
    """A quoted row is no cell that could be finished, and is said not to be run."""
    quoted = Entry("CoMatch", "40 labels", "top-1", "%", "93.09 ± 1.39", (), run=False)
    html, markdown = make(tmp_path, replace(TABLE1, entries=(*TABLE1.entries, quoted)))
    assert ["CoMatch", "not run", "93.09 ± 1.39", "-"] in Page(html).rows
    assert "not run" in markdown and "5/8, 1 failed" in markdown


def test_settings_of_which_nothing_was_run_are_named_alone(tmp_path):
    claimed = replace(TABLE1, claims=(Claim("SimMatch", "FixMatch", "top-1"),))
    unfinished = tuple(
        replace(entry, values=(), failed=()) if entry.column == "250 labels" else entry for entry in TABLE1.entries
    )
    html, markdown = make(tmp_path, replace(claimed, entries=unfinished))
    for text in (Page(html).text(), markdown):
        assert "250 labels" in text.partition("Settings not run")[2] and text.count("250 labels") == 1
    _, text = make(tmp_path, replace(TABLE1, entries=unfinished[2:]))  # nothing at all: what there will be
    assert "Settings not run" not in text and text.count("250 labels") == 2


def test_a_plus_minus_means_one_thing(tmp_path):
    """Only means over seeds have it; an interval is written with its ends."""
    entries = tuple(
        Entry(row, "40 labels", "top-1", "%", "-", values, (), (1, 2, 3))
        for row, values in {"FixMatch": (1.0, 2.0, 4.0), "SimMatch": (11.0, 13.0, 14.0)}.items()
    )
    html, markdown = make(tmp_path, replace(TABLE1, entries=entries, seeds=(1, 2, 3)))
    claim = ["SimMatch above FixMatch, top-1, %", "40 labels", "holds (in 3 of 3 seeds)", "+10.33 (+8.90 to +11.77)"]
    assert claim in Page(html).rows  # of a record without claims, from its table
    assert "+10.33 (+8.90 to +11.77)" in markdown
    assert "± is the standard deviation over seeds" in html and "± is the standard deviation over seeds" in markdown
    assert html.index("+10.33") < html.index("2.33 ± 1.53")


def test_the_structure_of_the_page(tmp_path):
    """What a browser's checks of accessibility and a narrow screen ask for, without a browser."""
    picture(tmp_path / "runs" / "0", "p.png")
    plot = Plot("P", "p.png", "it rises", "Lines that rise")
    notes = "| a | b |\n| :-: | --- |\n| 1 | 2 |"
    html, _ = make(tmp_path, replace(TABLE1, plots=(plot,), notes=notes))
    page = Page(html)  # which checks the scope of every th and that every table is in a part that scrolls
    assert '<html lang="en">' in html and page.headings.count(1) == 1
    assert [image["alt"] for image in page.images] == ["Lines that rise"]
    style = re.search(r"<style>(.*)</style>", html, flags=re.DOTALL)[1]
    assert not re.findall(r"(?<![-\w])width: *[\d.]+(?:px|rem|em)", style), "fixed widths"
    assert " style=" not in html.replace('style="text-align', "")
    labels = re.findall(r'role="region" aria-label="([^"]+)"', html)
    assert len(labels) == page.tags.count("table")


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        ("one\ntwo\n\nthree", "<p>one\ntwo</p>\n<p>three</p>"),
        ("- a\n- c − d", "<ul>\n<li>a</li>\n<li>c − d</li>\n</ul>"),
        ("**a** and `*d*` W_dis, y_sc", "<p><strong>a</strong> and <code>*d*</code> W_dis, y_sc</p>"),
        ("## a", "<h5>a</h5>"),
        ("<script>x</script>", "<p>&lt;script&gt;x&lt;/script&gt;</p>"),
        ("<div onclick='x'>\n\ny", "<p>&lt;div onclick='x'&gt;</p>\n<p>y</p>"),
        ("[e](javascript:x)", "<p>[e](javascript:x)</p>"),
        ("<https://x.y> &amp; [a][b]\n\n[b]: z", "<p>&lt;https://x.y&gt; &amp; [a][b]</p>"),
        ("", ""),
    ],
)
def test_notes_are_markdown_and_no_html(markdown, html):
    assert markdown_to_html(markdown) == html


def test_the_demo_has_records_of_its_own(tmp_path):
    """Tables that are no paper's are on the page too."""
    name, table = next(iter(read_tables("Demo", "demo").items()))
    html, _ = make(tmp_path, replace(TABLE1, name=name, title=table.title, paper="Demo"))
    assert table.title in html

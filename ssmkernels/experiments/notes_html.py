# SPDX-License-Identifier: BSD-3-Clause
"""The part of Markdown that notes of experiments are written in, as HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from html import escape

Picture = Callable[[str, str], str]
"""(alternative text, file) -> HTML."""

IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
_HEADING = re.compile(r"(#{1,6}) +(.*)")
_ITEM = re.compile(r"([-*]|\d{1,2}\.) +")
_RULE = re.compile(r"\|(?: *:?-+:? *\|)+ *")
_BLOCK = re.compile(r"#{1,6} |[-*] |1\. |\||```")  # what ends a paragraph without an empty line
_INLINE = re.compile(
    r"\\(?P<plain>[\\`*|\[\]<>_#&])|`(?P<code>[^`]+)`"
    r"|\*\*(?=\S)(?P<strong>.+?)(?<=\S)\*\*|(?<![\w*])\*(?=[^\s*])(?P<em>[^*]+?)(?<=\S)\*(?![\w*])"
)


def html_of_markdown(text: str, picture: Picture, *, label: str, level: int = 1) -> str:
    """``text`` as HTML, everything in it escaped.

    Headings, paragraphs, tables, lists of one level, fenced and indented code, ``code``, **strong**, *emphasis*, images
    and backslash escapes; anything else is shown as it stands. An underscore is a letter, as W_dis has one.

    Args:
        label: names the regions that the tables scroll in.
        level: of the highest heading.
    """
    text = shift_headings(text, level)
    return "".join(_blocks(text.replace("\t", "    ").splitlines(), picture, label))


def shift_headings(text: str, level: int) -> str:
    """Markdown with its highest heading at ``level`` and the others as far below it as they were, but not below 6."""
    lines, headings, code = text.splitlines(), {}, False
    for number, line in enumerate(lines):
        code ^= line.startswith("```")
        if not code and (heading := _HEADING.fullmatch(line)):
            headings[number] = heading
    highest = min((len(each[1]) for each in headings.values()), default=level)
    for number, heading in headings.items():
        lines[number] = f"{'#' * min(6, len(heading[1]) - highest + level)} {heading[2]}"
    return "\n".join(lines)


def _blocks(lines: Sequence[str], picture: Picture, label: str) -> Iterator[str]:
    start = 0
    while start < len(lines):
        stop = start + 1
        line = lines[start]
        if not line.strip():
            pass
        elif line.startswith("```"):
            while stop < len(lines) and not lines[stop].startswith("```"):
                stop += 1
            yield _code(lines[start + 1 : stop])
            stop += 1
        elif line.startswith("    "):
            while stop < len(lines) and (lines[stop].startswith("    ") or not lines[stop].strip()):
                stop += 1
            yield _code([each[4:] for each in lines[start:stop]])
        elif heading := _HEADING.fullmatch(line):
            yield f"<h{len(heading[1])}>{_inline(heading[2])}</h{len(heading[1])}>\n"
        elif line.startswith("|") and stop < len(lines) and _RULE.fullmatch(lines[stop]):
            while stop < len(lines) and lines[stop].startswith("|"):
                stop += 1
            yield _table(lines[start], lines[start + 2 : stop], label)
        elif _ITEM.match(line):
            while (
                stop < len(lines)
                and lines[stop].strip()
                and (_ITEM.match(lines[stop]) or not _BLOCK.match(lines[stop]))
            ):
                stop += 1
            yield _list(lines[start:stop])
        else:
            while stop < len(lines) and lines[stop].strip() and not _BLOCK.match(lines[stop]):
                stop += 1
            paragraph = " ".join(each.strip() for each in lines[start:stop])
            if words := IMAGE.sub("", paragraph).strip():
                yield f"<p>{_inline(words)}</p>\n"
            yield from (picture(alt, file) for alt, file in IMAGE.findall(paragraph))
        start = stop


def _code(lines: Sequence[str]) -> str:
    return f"<pre><code>{escape(chr(10).join(lines).rstrip())}</code></pre>\n"


def _list(lines: Sequence[str]) -> str:
    items: list[str] = []
    for line in lines:
        if marker := _ITEM.match(line):
            items.append(line[marker.end() :])
        else:
            items[-1] += f" {line.strip()}"
    kind = "ol" if lines[0][0].isdigit() else "ul"
    return f"<{kind}>\n{''.join(f'<li>{_inline(each)}</li>{chr(10)}' for each in items)}</{kind}>\n"


def _table(header: str, rows: Sequence[str], label: str) -> str:
    names = _cells(header)
    head = "".join(f'<th scope="col">{_inline(name)}</th>' for name in names)
    body = []
    for row in rows:
        first, *others = (_cells(row) + [""] * len(names))[: len(names)]
        cells = "".join(f"<td>{_inline(each)}</td>" for each in others)
        body.append(f'<tr><th scope="row">{_inline(first)}</th>{cells}</tr>\n')
    return scrolling_table(f"<thead><tr>{head}</tr></thead>\n<tbody>{''.join(body)}</tbody>\n", label)


def scrolling_table(inside: str, label: str, caption: str = "") -> str:
    """A table that is moved, not the page, where it is wider than the screen; by keyboard too, hence the tabindex."""
    above = f'<caption><span class="stay">{escape(caption)}</span></caption>\n' if caption else ""
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table:'
        f' {escape(label)}">\n<table>{above}{inside}</table>\n</div>\n'
    )


def _cells(row: str) -> list[str]:
    return [each.strip() for each in re.split(r"(?<!\\)\|", row.strip().removeprefix("|").removesuffix("|"))]


def _inline(text: str) -> str:
    parts, end = [], 0
    for found in _INLINE.finditer(text):
        parts.append(escape(text[end : found.start()]))
        if found["plain"]:
            parts.append(escape(found["plain"]))
        elif found["code"]:
            parts.append(f"<code>{escape(found['code'])}</code>")
        elif found["strong"]:
            parts.append(f"<strong>{_inline(found['strong'])}</strong>")
        else:
            parts.append(f"<em>{_inline(found['em'])}</em>")
        end = found.end()
    return "".join((*parts, escape(text[end:])))

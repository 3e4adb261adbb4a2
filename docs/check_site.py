# SPDX-License-Identifier: BSD-3-Clause
"""Checks the built site: every link and picture inside it leads somewhere, anchors too; pages say their language, have
one first heading and no skipped ones; links have a text and pictures a description.

python docs/check_site.py [build/docs]
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page has and refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.targets: list[str] = []
        self.headings: list[int] = []
        self.problems: list[str] = []
        self.link_text: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.names.update(value for value in (values.get("id"), values.get("name")) if value)
        target = values.get("href") if tag in ("a", "link") else values.get("src")
        if target:
            self.targets.append(target)
        if tag == "html" and not values.get("lang"):
            self.problems.append("has no language")
        if tag == "img" and not values.get("alt"):
            self.problems.append(f"the picture {values.get('src')} has no description")
        if tag == "a" and values.get("href"):
            self.link_text = values.get("aria-label") or values.get("title") or ""
        if len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
            self.headings.append(int(tag[1]))

    def handle_data(self, data: str) -> None:
        if self.link_text is not None:
            self.link_text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "a" and self.link_text is not None:
            if not self.link_text.strip():
                self.problems.append("a link has no text")
            self.link_text = None


def broken_links(path: Path, page: Page, pages: dict[Path, Page]) -> list[str]:
    broken = []
    for target in page.targets:
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        fragment = unquote(parts.fragment)
        if not file.exists() or (fragment and file in pages and fragment not in pages[file].names):
            broken.append(f"the link to {target} leads nowhere")
    return broken


def wrong_headings(page: Page) -> list[str]:
    problems = [] if page.headings.count(1) == 1 else [f"has {page.headings.count(1)} first headings"]
    skipped = [level for before, level in zip(page.headings, page.headings[1:], strict=False) if level > before + 1]
    return problems + [f"a heading of level {level} follows one that is two or more above" for level in skipped]


def main() -> int:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs").resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        raise SystemExit(f"{site} holds no page; make docs builds them")
    problems = []
    for path, page in pages.items():
        if path.parent.name == "_downloads" or "_downloads" in path.parts:
            continue  # pages that other commands made
        headings = [] if path.name in ("search.html", "genindex.html", "py-modindex.html") else wrong_headings(page)
        unique = dict.fromkeys(page.problems + broken_links(path, page, pages) + headings)
        problems += [f"{path.relative_to(site)}: {problem}" for problem in unique]
    print(
        "\n".join(problems)
        or f"{len(pages)} pages, {sum(len(page.targets) for page in pages.values())} links: all lead somewhere"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: BSD-3-Clause
"""Checks README.md and docs/**/*.md: ```python blocks and the commands "$ ssmkernels …" of ```console blocks run (one
namespace and one empty folder a page), links lead somewhere, every op has its entry, files that are named exist, and
rows copied from a table in bench/results are still those of that table.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
import tempfile
import traceback
from pathlib import Path

from ssmkernels import cli, ops

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```\w+\n.*?^```", re.MULTILINE | re.DOTALL)  # where [](int64_t n) is no link
COMMAND = re.compile(r"^\$ ssmkernels ((?:.*\\\n)*.*)$", re.MULTILINE)
NAMED = re.compile(r"(?<!\S)((?:csrc|ssmkernels|python_tests|bench|docs|examples|\.ci)/[\w./-]*\w)/?(?=[\s,;:)]|$)")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def run_blocks(page: Path, text: str) -> list[str]:
    namespace: dict[str, object] = {"__name__": "__docs__"}
    with tempfile.TemporaryDirectory() as folder:
        for block in BLOCK.finditer(text):
            line = text[: block.start()].count("\n") + 1
            code = "\n" * line + block[2]  # so that a traceback shows the line of the page
            os.chdir(folder)
            try:
                if block[1] == "console":
                    run_commands(block[2])
                else:
                    exec(compile(code, str(page), "exec"), namespace)
            except Exception:
                return [f"{page.name}:{line}: the example fails\n{traceback.format_exc()}"]
            finally:
                os.chdir(ROOT)
    return []


def run_commands(text: str) -> None:
    for command in COMMAND.findall(text):
        status = cli.main(shlex.split(command.replace("\\\n", " ")))
        if status:
            raise RuntimeError(f"ssmkernels {command} ends with {status}")


def broken_links(page: Path, text: str) -> list[str]:
    return [
        f"{page.name}: the link to {target} leads nowhere"
        for target in LINK.findall(CODE.sub("", text))
        if not (page.parent / target).exists()
    ]


def missing_ops(texts: list[str]) -> list[str]:
    code = " ".join(re.findall(r"`([^`\n]+)`", "\n".join(texts)))
    names = [name for name in ops.__all__ if not isinstance(getattr(ops, name), type)]
    return [f"ops.{name} has no entry in docs/" for name in names if not re.search(rf"\b{name}\b", code)]


def rows_of(text: str) -> list[tuple[str, ...]]:
    """The cells of every line of every table."""
    lines = [line for line in text.splitlines() if line.startswith("|") and set(line) - set("|-: ")]
    return [tuple(cell.strip() for cell in line.strip().strip("|").split("|")) for line in lines]


@functools.cache
def committed_rows() -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """The rows of the tables in bench/results by their first two cells."""
    rows: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for path in sorted((ROOT / "bench" / "results").glob("*.md")):
        for row in rows_of(path.read_text()):
            rows.setdefault(row[:2], []).append(row)
    return rows


def stale_rows(page: Path, text: str) -> list[str]:
    """Rows that begin as committed ones of as many cells do, and go on otherwise."""
    problems = []
    for row in rows_of(text):
        committed = [other for other in committed_rows().get(row[:2], ()) if len(other) == len(row)]
        if committed and row not in committed:
            problems.append(f"{page.name}: bench/results has {' | '.join(committed[0])}, not {' | '.join(row)}")
    return problems


@functools.cache
def files_of_the_tree() -> tuple[str, ...]:
    folders = ("csrc", "ssmkernels", "python_tests", "bench", "docs", "examples", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return tuple(path.relative_to(ROOT).as_posix() for path in [*files, *ROOT.iterdir()])


def missing_files(page: Path, text: str) -> list[str]:
    """Paths in backquotes that begin with a folder of the tree; "bench/targets.py" in "python bench/targets.py"."""
    named = [path for code in re.findall(r"`([^`\n]+)`", text) for path in NAMED.findall(code)]
    return [
        f"{page.name}: there is no {path}"
        for path in named
        if not any(file == path or file.startswith(f"{path}/") for file in files_of_the_tree())
    ]


def main() -> int:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    pages = [page for page in pages if page.parent.name not in ("api", "measurements")]  # directives alone
    texts = [page.read_text() for page in pages]
    problems = missing_ops(texts[1:])
    for page, text in zip(pages, texts, strict=True):
        print(f"{page.relative_to(ROOT)}: {len(BLOCK.findall(text))} examples", flush=True)
        problems += run_blocks(page, text) + broken_links(page, text)
        problems += stale_rows(page, text) + missing_files(page, text)
    print("\n".join(problems) or "all examples run, all links lead somewhere, files are there, copied rows are right")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

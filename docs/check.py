# SPDX-License-Identifier: BSD-3-Clause
"""Checks README.md and docs/**/*.md: ```python blocks and the commands "$ ssmkernels …" of ```console blocks run (one
namespace and one empty folder a page), links lead somewhere, every op has its entry.
"""

from __future__ import annotations

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


def main() -> int:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    pages = [page for page in pages if page.parent.name not in ("api", "measurements")]  # directives alone
    texts = [page.read_text() for page in pages]
    problems = missing_ops(texts[1:])
    for page, text in zip(pages, texts, strict=True):
        print(f"{page.relative_to(ROOT)}: {len(BLOCK.findall(text))} examples", flush=True)
        problems += run_blocks(page, text) + broken_links(page, text)
    print("\n".join(problems) or "all examples run, all links lead somewhere, every op has its entry")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: BSD-3-Clause
"""Plain words and lines of 120 characters, in every file that is written by hand (CONTRIBUTING.md, "Words").

Single words of running text are codespell's, in ``make lint``; here are phrases, names and lengths.
"""

from __future__ import annotations

import ast
import re

import pytest

FOLDERS = ("ssmkernels", "python_tests", "bench", "csrc", "docs", "examples")
AT_THE_ROOT = ("*.py", "*.md", "*.toml", "*.in", "*.json", "*.txt", "Makefile", ".ci/*", ".clang-format", ".*.yaml")
SUFFIXES = {".py", ".cpp", ".h", ".cuh", ".cu", ".cmake", ".txt", ".yaml", ".toml", ".md", ".in", ".j2", ".css"}
WRITTEN_BY_PROGRAMS = (
    "docs/results/runs/",
    "docs/results/report.",
    "docs/_build/",
    "bench/results/",
    "ssmkernels/cpp/",
    "CMakeUserPresets.json",
)
LONGEST_LINE = 120

PHRASES = (
    "(?:is|are|be|been|being|was|were) told",
    "who(?:ever)? reads",
    "told apart",
    "for want of",
    "of the house",
)
GAP = r"\s+(?:(?://|#)\s+)?"  # a comment may be broken between the words
PHRASE = re.compile(r"\b(?:" + "|".join(PHRASES).replace(" ", GAP) + r")\b", re.IGNORECASE)
VAGUE_NAMES = {"each", "found", "said", "told"}  # of a variable: what is it that is found?
METAPHORS = {"room", "rooms", "house", "houses", "floors", "mend", "mends", "tenant", "tenants"}  # as a part of a name


def written_by_hand(root):
    """(path from the root, text) of every file in the tree that people write and read."""
    paths = [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in SUFFIXES]
    paths += [path for pattern in AT_THE_ROOT for path in root.glob(pattern) if path.is_file()]
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        if not name.startswith(WRITTEN_BY_PROGRAMS):
            yield name, path.read_text(encoding="utf-8")


def bound_names(source):
    """(line, name) of everything that Python code gives a name to; those inside f-strings too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name


def parts(name):
    """The words of a name in snake_case, CamelCase or kCamelCase."""
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def is_vague(name):
    return name in VAGUE_NAMES or bool(parts(name) & METAPHORS)


def phrases(text):
    """(line, phrase) of what CONTRIBUTING.md replaces."""
    for match in PHRASE.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split())


def too_long(name, text):
    """(line, length) of lines that could be broken: rows of tables and links could not."""
    keeps = r"^\s*\||\]\(|https?://" if name.endswith(".md") else r"https?://"
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > LONGEST_LINE and not re.search(keeps, line):
            yield number, len(line)


def refuse(source_tree, find, exempt=(), suffixes=tuple(SUFFIXES)):
    wrong = []
    for name, text in written_by_hand(source_tree):
        if name.endswith(suffixes) and not name.startswith(exempt):
            wrong += [f"{name}:{line}: {what}" for line, what in find(name, text)]
    assert not wrong, "\n".join(wrong)


def test_names_say_what_they_hold(source_tree):
    def vague_names(name, text):
        return [(line, bound) for line, bound in bound_names(text) if is_vague(bound)]

    refuse(source_tree, vague_names, suffixes=(".py",))


def test_names_of_cpp_are_no_metaphors(source_tree):
    def metaphors(name, text):
        code = re.sub(r"//.*", "", text)
        for number, line in enumerate(code.splitlines(), 1):
            yield from ((number, word) for word in re.findall(r"[A-Za-z]\w+", line) if parts(word) & METAPHORS)

    refuse(source_tree, metaphors, suffixes=(".cpp", ".h", ".cuh", ".cu"))


def test_phrases_are_plain(source_tree):
    lists = ("python_tests/test_words.py", "CONTRIBUTING.md")
    refuse(source_tree, lambda name, text: phrases(text), lists)


def test_lines_are_short(source_tree):
    refuse(source_tree, too_long, suffixes=tuple(SUFFIXES - {".py"} | {"Makefile", ".ci/run", ".json"}))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("for each in range(3): pass", "each"),
        ("text = f'{[found for found in (1, 2)]}'", "found"),
        ("def told(): pass", "told"),
        ("lambda said: 0", "said"),
        ("def imported_rooms(): pass", "imported_rooms"),
        ("class HouseRules: pass", "HouseRules"),
        ("FLOORS = 1", "FLOORS"),
        ("import this as mend", "mend"),
    ],
)
def test_a_vague_name_is_seen(source, name):
    assert [bound for _, bound in bound_names(source) if is_vague(bound)] == [name]


@pytest.mark.parametrize("name", ["row", "eachother", "mushroom", "floor", "recommend", "foundation", "kRows"])
def test_a_plain_name_is_not(name):
    assert not is_vague(name)


@pytest.mark.parametrize(
    ("text", "line"),
    [("The row is told", 1), ("a\n# what it is\n# told", 2), ("// For want\n// of", 1), ("so\nwho reads it", 2)],
)
def test_a_phrase_is_seen_over_lines(text, line):
    assert [number for number, _ in phrases(text)] == [line]
    assert not list(phrases("It told us; each of the readers was found."))


def test_glossary_has_every_word(source_tree):
    """CONTRIBUTING.md lists what these tests and codespell refuse."""
    glossary = (source_tree / "CONTRIBUTING.md").read_text().split("## Words")[1].split("\n## ")[0]
    refused = VAGUE_NAMES | {line.split("->")[0] for line in (source_tree / ".ci/words.txt").read_text().splitlines()}
    stems = {word.removesuffix("s").removesuffix("ed").removesuffix("ing") for word in refused}
    assert not {stem for stem in stems if not re.search(rf"\b{stem}", glossary)}
    for phrase in ("is told", "who reads", "told apart", "for want of"):
        assert phrase in glossary
        assert PHRASE.fullmatch(phrase)

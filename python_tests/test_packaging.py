# SPDX-License-Identifier: BSD-3-Clause
"""What stands beside the package says what the package says."""

from __future__ import annotations

import re

import pytest

import ssmkernels

yaml = pytest.importorskip("yaml")


def test_citation_names_this_version_and_the_papers_of_readme(source_tree):
    citation = yaml.safe_load((source_tree / "CITATION.cff").read_text())
    assert citation["version"] == ssmkernels.__version__
    readme = (source_tree / "README.md").read_text()
    assert len(citation["references"]) == 4
    for paper in citation["references"]:
        assert f"({paper['url']}), " in readme and str(paper["year"]) in readme
        assert paper["authors"] and paper["title"]


def test_workflows_call_the_scripts_of_the_tree(source_tree):
    folder = source_tree / ".github"
    steps = {}
    for path in folder.glob("workflows/*.yml"):
        (job,) = yaml.safe_load(path.read_text())["jobs"].values()
        steps[path.stem] = [step["run"] for step in job["steps"] if "run" in step]
    assert steps == {"ci": [".ci/run"], "wheels": ["make wheel PYTHON=/opt/python/cp312-cp312/bin/python"]}
    assert re.search(r"^wheel:", (source_tree / "Makefile").read_text(), re.MULTILINE)
    for path in folder.glob("ISSUE_TEMPLATE/*.yml"):
        assert yaml.safe_load(path.read_text())

# SPDX-License-Identifier: BSD-3-Clause
"""What stands beside the package says what the package says."""

from __future__ import annotations

import re
import subprocess
import sys

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
    steps, actions = {}, {}
    for path in folder.glob("workflows/*.yml"):
        (job,) = yaml.safe_load(path.read_text())["jobs"].values()
        steps[path.stem] = [step["run"] for step in job["steps"] if "run" in step]
        actions[path.stem] = [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]
    assert steps == {"ci": [".ci/run", "make axe"], "wheels": ["make wheel PYTHON=/opt/python/cp312-cp312/bin/python"]}
    assert "browser-actions/setup-chrome" in actions["ci"]
    run = (source_tree / ".ci" / "run").read_text()
    assert re.search(r"^ *make docs$", run, re.MULTILINE)  # whose site make axe looks at
    assert re.search(r"^wheel:", (source_tree / "Makefile").read_text(), re.MULTILINE)
    for path in folder.glob("ISSUE_TEMPLATE/*.yml"):
        assert yaml.safe_load(path.read_text())


def test_without_a_browser_axe_says_so(source_tree, tmp_path):
    """And is an error on GitHub alone, whose workflow installs one."""
    (tmp_path / "index.html").write_text("<!DOCTYPE html>")
    command = [sys.executable, str(source_tree / "docs" / "axe.py"), str(tmp_path)]
    for variables, status in (({}, 0), ({"GITHUB_ACTIONS": "true"}, 1)):
        environment = {"PATH": str(tmp_path), **variables}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout.split(":")[0]) == (status, "no browser"), result.stderr

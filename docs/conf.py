# SPDX-License-Identifier: BSD-3-Clause
"""The site: ``make docs`` builds it offline, with every warning an error."""

from __future__ import annotations

import builtins
import importlib
import re
import sys
from typing import Any

import ssmkernels

project = "ssmkernels"
author = "ssmkernels contributors"
copyright = author
release = version = ssmkernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "results/runs", "results/report.md"]
nitpicky = True
attributes: dict[str, list[str]] = {}

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "ssmkernels"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_show_sphinx = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"


def exists(name: str) -> bool:
    """Whether ``name`` is a built-in or something that can be imported: a module, or an attribute below one."""
    if hasattr(builtins, name):
        return True
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            value = getattr(value, part, None)
        if value is not None:
            return True
    return False


def plain_names(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Names that have no entry here (Python's, torch's, private ones) are plain text, as no inventory is fetched; one
    that does not exist is an error all the same. Annotations and roles use the names of the module they stand in."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if not re.fullmatch(r"[\w.]+", target):  # a type with parameters, which is an expression and no name
        return contnode
    scopes = [name for name in sys.modules if name.split(".")[0] == project]
    if node.get("py:module") and node.get("py:class"):
        scopes.append(f"{node['py:module']}.{node['py:class']}")
    return contnode if exists(target) or any(exists(f"{scope}.{target}") for scope in scopes) else None


def keep(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what in ("attribute", "data", "property"):
        attributes[name] = list(lines)


def restore(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon for the type of an attribute; ours is in the annotation."""
    if name in attributes:
        lines[:] = attributes.pop(name)


def tables_of_measurements(app: Any, docname: str, source: list[str]) -> None:
    """A link to a table in bench/results leads to its page of this site."""
    source[0] = re.sub(r"\]\((?:\.\./)+bench/results/([\w-]+\.md)", r"](/measurements/\1", source[0])


def readable_defaults(app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> Any:
    """A default made by a factory is shown by ``<factory>``, which is not Python."""
    return (signature.replace("<factory>", "..."), returns) if signature else None


def setup(app: Any) -> None:
    app.connect("missing-reference", plain_names)
    app.connect("autodoc-process-docstring", keep, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", restore, priority=600)
    app.connect("source-read", tables_of_measurements)
    app.connect("autodoc-process-signature", readable_defaults)

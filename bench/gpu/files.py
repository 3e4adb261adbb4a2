# SPDX-License-Identifier: BSD-3-Clause
"""The package's writer of files, without importing the package: that would load the library, which a step builds."""

from __future__ import annotations

import importlib.util

from bench.gpu.steps import ROOT

_spec = importlib.util.spec_from_file_location("_files", ROOT / "ssmkernels" / "_files.py")
assert _spec is not None
assert _spec.loader is not None
_files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_files)
write_atomically = _files.write_atomically

# SPDX-License-Identifier: BSD-3-Clause
"""What all tests share."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent

# What a shell starts in the background ignores Ctrl-C, and so does all that it starts in turn, which tests of Ctrl-C
# would wait for.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What stands above the ops needs more than torch. Where that is missing (`make gpu` with torch alone) it is left out,
# and the header says so.
TRAIN_PACKAGES = ("jsonargparse", "lightning_fabric", "PIL", "sklearn", "torchvision", "tqdm", "yaml")
missing = [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]
collect_ignore = ["data", "experiments", "models", "trainers"] if missing else []


def pytest_report_header() -> list[str]:
    if not missing:
        return []
    return [f"left out without {', '.join(missing)}: {', '.join(collect_ignore)} (pip install 'ssmkernels[train]')"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first, so that no process of pytest-xdist runs one when the others have ended; those of ranks
    stand together, because a process that runs one loads everything for them.
    """
    items.sort(key=lambda item: "ranks" not in item.fixturenames and item.get_closest_marker("long") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A process of pytest-xdist whose CUDA context a test has lost ends, and another takes its place."""
    result = yield
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Generator[Ranks, None, None]:
    """A function: ranks(2, script, *arguments) runs a script in two Gloo ranks; see ranks.py."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def source_tree() -> Path:
    """The checkout that these tests lie in; skips where they were copied out of it."""
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("not in a source tree")
    return ROOT

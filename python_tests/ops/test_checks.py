# SPDX-License-Identifier: BSD-3-Clause
"""Checks of values: those the library makes where the values lie, and those torch makes for other dtypes, layouts
and transforms.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from ssmkernels import ops
from ssmkernels.ops import _checks as check

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def layouts(values):
    """The same values contiguous, and every second one of a larger tensor whose others would fail every check."""
    spaced = torch.full((2 * len(values),), math.nan if values.is_floating_point() else -1, dtype=values.dtype)
    spaced[::2] = values
    return values, spaced[::2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 17, 999])
def test_one_bad_value_is_found(dtype, bad, at):
    good = torch.linspace(0, 1, 1000).to(dtype)
    wrong = good.clone()
    wrong[at] = bad
    for fine, flawed in zip(layouts(good), layouts(wrong), strict=True):
        check.check_finite("x", fine)
        check.check_weights("x", fine)
        with pytest.raises(ValueError, match=r"^x must be finite, got values from"):
            check.check_finite("x", flawed)
        with pytest.raises(ValueError, match=r"^x must be finite and >= 0, got values from"):
            check.check_weights("x", flawed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends_of_a_dtype_are_finite(dtype):
    ends = torch.tensor([torch.finfo(dtype).min, -0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max], dtype=dtype)
    for values in layouts(ends):
        check.check_finite("x", values)
        check.check_weights("x", values[1:])
        with pytest.raises(ValueError, match=">= 0"):
            check.check_weights("x", values)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ranges_of_ids(dtype):
    ids = torch.arange(10, dtype=dtype)
    for values in layouts(ids):
        check.check_range("ids", values, 10, "ten")
        with pytest.raises(ValueError, match=r"^ids must be in \[0, 9\), nine; got values from 0 to 9"):
            check.check_range("ids", values, 9, "nine")
        with pytest.raises(ValueError, match="got values from -1 to 8"):
            check.check_range("ids", values - 1, 10, "ten")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_starts_of_rows_ascend(dtype):
    for values in layouts(torch.tensor([0, 2, 2, 5], dtype=dtype)):
        assert check.ascends_from_zero(values, 5)
        assert not check.ascends_from_zero(values, 4)
        assert not check.ascends_from_zero(values + 1, 6)
    for values in layouts(torch.tensor([0, 3, 2, 5], dtype=dtype)):
        assert not check.ascends_from_zero(values, 5)
    assert not check.ascends_from_zero(torch.empty(0, dtype=dtype), 0)


def test_nothing_is_in_order():
    for dtype in DTYPES:
        check.check_finite("x", torch.empty(0, dtype=dtype))
        check.check_weights("x", torch.empty(0, dtype=dtype))
    check.check_range("x", torch.empty(0, dtype=torch.int64), 0, "nothing")


def test_values_are_found_under_a_transform():
    def loss(x):
        check.check_finite("x", x)
        return (x * x).sum()

    torch.testing.assert_close(torch.func.grad(loss)(torch.arange(3.0)), 2 * torch.arange(3.0))
    with pytest.raises(ValueError, match=r"^x must be finite"):
        torch.func.grad(loss)(torch.tensor([1.0, math.nan]))


@pytest.mark.parametrize(
    "value",
    [3, 3.0, np.int64(3), np.uint8(3), np.float32(3), np.float16(3), torch.tensor(3), torch.tensor(3.0)],
    ids=repr,
)
def test_numbers_of_every_kind(value):
    for numeric in (check.check_number, check.check_positive, check.check_nonnegative, check.check_threshold):
        assert numeric("x", value) == 3 and type(numeric("x", value)) is float


INTEGERS = [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers_of_every_kind(value):
    assert check.check_count("x", value) == 3 and type(check.check_integer("x", value)) is int


NO_NUMBERS = [
    True,
    np.bool_(True),
    None,
    "3",
    3j,
    [3],
    np.array(3.0),
    torch.tensor(True),
    torch.ones(1),
    torch.tensor(3.0, requires_grad=True),
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused_by_name(value):
    for numeric in (check.check_number, check.check_positive, check.check_fraction, check.check_threshold):
        with pytest.raises(TypeError, match=r"^x must be a number"):
            numeric("x", value)
    with pytest.raises(TypeError, match=r"^x must be an int"):
        check.check_count("x", value)


NOT_FINITE = [math.nan, math.inf, -math.inf, 10**400, -(10**400), np.float32("inf")]


@pytest.mark.parametrize("value", NOT_FINITE, ids=lambda value: str(value)[:9])
def test_numbers_that_are_not_finite(value):
    for numeric in (check.check_number, check.check_positive, check.check_nonnegative):
        with pytest.raises(ValueError, match=r"^x must be finite"):
            numeric("x", value)


def test_integers_beyond_64_bits():
    for value in (2**63, -(2**63) - 1, 10**400):
        with pytest.raises(ValueError, match=r"^x must fit 64 bits"):
            check.check_integer("x", value)


@pytest.mark.parametrize("value", ["means", None, 0, torch.ones(2), ["mean"]], ids=repr)
def test_choices_are_named(value):
    with pytest.raises(ValueError, match=r"^reduction must be 'mean', 'sum' or 'none', got"):
        check.check_choice("reduction", value, ("mean", "sum", "none"))


def test_tensors_that_are_not_dense():
    parts = [torch.ones(2, 3), torch.ones(1, 3)]
    nested = [torch.nested.nested_tensor(parts, layout=layout) for layout in (torch.jagged, torch.strided)]
    for value in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.eye(3).to_mkldnn(), *nested):
        assert not check.is_matrix(value)
        assert not check.fits(value, (3, 3), torch.float32, torch.device("cpu"))
        with pytest.raises(TypeError, match=r"^x must be a dense tensor"):
            check.check_tensor("x", value, "[n, d]", 2)


def test_tensors_whose_memory_does_not_hold_their_values():
    """torch._neg_view says −x of the memory of x, and torch._efficientzerotensor has none."""
    zeros = torch._efficientzerotensor((4,))
    check.check_weights("x", zeros)
    check.check_range("x", torch._efficientzerotensor((4,), dtype=torch.int64), 1, "one")
    assert not check.ascends_from_zero(torch._efficientzerotensor((4,), dtype=torch.int64), 1)
    check.check_weights("x", torch._neg_view(-torch.ones(4)))
    with pytest.raises(ValueError, match=r"values from -1\.0 to -1\.0"):
        check.check_weights("x", torch._neg_view(torch.ones(4)))
    query, bank = torch.eye(4), torch.eye(4)
    loss = ops.instance_matching(query, query, bank, torch.arange(4), torch._efficientzerotensor((4, 4))).loss
    assert loss.equal(ops.instance_matching(query, query, bank, torch.arange(4), torch.zeros(4, 4)).loss)


def test_values_are_not_looked_at_under_vmap():
    def scaled(x):
        check.check_weights("x", x)
        return 2 * x

    torch.testing.assert_close(torch.func.vmap(scaled)(-torch.ones(2, 3)), -2 * torch.ones(2, 3))


def update(**changed):
    arguments = {
        "bank": torch.eye(4),
        "bank_labels": torch.arange(4),
        "index": torch.tensor([1, 2]),
        "features": torch.ones(2, 4),
        "labels": torch.tensor([3, 3]),
    } | changed
    before = {name: value.clone() for name, value in arguments.items()}
    try:
        ops.memory_update_(**arguments)
    finally:
        written = {name for name, value in arguments.items() if not value.equal(before[name])}
    return written


BANK, IDS = torch.eye(4), torch.arange(4)


@pytest.mark.parametrize(
    ("name", "message", "changed"),
    [
        ("bank", "must not require grad", {"bank": torch.eye(4).requires_grad_()}),
        ("bank", "must not require grad", {"bank": 2 * torch.eye(4).requires_grad_()}),
        ("bank", "must not overlap itself", {"bank": torch.ones(1, 4).expand(4, 4)}),
        ("bank", "must not overlap itself", {"bank": torch.ones(7).unfold(0, 4, 1)}),
        ("bank_labels", "must not overlap itself", {"bank_labels": torch.zeros(1, dtype=torch.int64).expand(4)}),
        ("features", "must not share memory with bank", {"bank": BANK, "features": BANK[2:]}),
        ("features", "must not share memory with bank", {"bank": BANK, "features": BANK.t()[1:3]}),
        ("labels", "must not share memory with bank_labels", {"bank_labels": IDS, "labels": IDS[1:3]}),
        ("index", "must not share memory with bank_labels", {"bank_labels": IDS, "index": IDS[1:3]}),
        ("labels", "must be >= 0, got -1", {"labels": torch.tensor([0, -1])}),
    ],
)
def test_what_memory_update_refuses_to_write(name, message, changed):
    written = None
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        written = update(**changed)
    assert written is None
    assert BANK.equal(torch.eye(4)) and IDS.equal(torch.arange(4))


def test_what_memory_update_may_write():
    buffer = torch.eye(8)
    for bank in (
        torch.eye(4).t(),
        buffer[:4, :4],
        buffer[::2, 1::2],
        torch.ones(13)[:9].as_strided((4, 4), (3, 1)).clone(),
    ):
        assert update(bank=bank) == {"bank", "bank_labels"}
    rows = torch.eye(4).repeat(2, 1)
    assert update(bank=rows[:4], features=rows[4:6]) == {"bank", "bank_labels"}  # one storage, places apart


def test_every_op_takes_a_meta_tensor():
    """Shapes and dtypes without values, as a dry run on the meta device needs them."""

    def meta(*size, dtype=torch.float16):
        return torch.empty(size, device="meta", dtype=dtype)

    ids = torch.int64
    rows, bank, probs = meta(5, 6), meta(9, 6), meta(5, 3)
    network = (meta(4, 12), meta(4), meta(4), meta())
    assert ops.instance_matching(rows, rows, bank, meta(9, dtype=ids), probs).loss.shape == (5,)
    assert ops.instance_matching_partial(rows, rows, bank, meta(9, dtype=ids), probs).strong_mean.shape == (5, 6)
    assert ops.aggregate(rows, bank, meta(9, dtype=ids), 3).shape == (5, 3)
    assert ops.unfold(rows, bank, meta(9, dtype=ids), probs).shape == (5, 9)
    ops.memory_update_(bank, meta(9, dtype=ids), meta(5, dtype=ids), rows, meta(5, dtype=ids))
    assert ops.pair_logits(rows, bank, *network).shape == (5, 9)
    assert ops.pair_focal_loss(rows, bank, meta(5, dtype=ids), meta(9, dtype=ids), *network).shape == ()
    assert ops.pair_ranking_loss(rows, meta(5, dtype=ids)).shape == ()
    assert ops.mined_pair_ranking_loss(rows, rows, positive_threshold=0.5, negative_threshold=0.1).shape == ()
    assert ops.similarity_moments(rows, meta(5, dtype=ids)).positive_var.shape == ()
    edges = (meta(6, dtype=ids), meta(8, dtype=torch.int32))
    assert ops.laplacian_solve(*edges, meta(8), None, meta(5), meta(5, 2)).solution.shape == (5, 2)
    assert ops.leave_one_edge_out(*edges, meta(8, dtype=ids), meta(8), meta(5, 2)).shape == (8,)


def test_negative_margins():
    """Below 0 a margin of negatives would leave none of them; one of positives adds to the loss of each."""
    rows, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1])
    basis = {"basis_features": rows, "positive_threshold": 0.0, "negative_threshold": 1.0}
    for call in (
        lambda **margins: ops.pair_ranking_loss(rows, labels, **margins),
        lambda **m: ops.mined_pair_ranking_loss(rows, **basis, **m),
    ):
        with pytest.raises(ValueError, match=r"^negative_margin must be finite and >= 0, got -1\.0"):
            call(negative_margin=-1)
    shifted = ops.pair_ranking_loss(rows, labels, positive_margin=-1, negative_margin=0, reduction="sum")
    assert shifted == 2 * (1 + 1)


def test_thresholds_that_overlap_take_a_pair_twice():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    margins = {"positive_margin": 0.0, "negative_margin": 3.0, "reduction": "sum"}
    both = ops.mined_pair_ranking_loss(rows, rows, positive_threshold=-0.5, negative_threshold=0.5, **margins)
    torch.testing.assert_close(both, torch.tensor(2 * (2**0.5 + 3 - 2**0.5)))


def test_tf32_setting_is_read_when_a_graph_is_made():
    """By hand where torch.compiler.assume_constant_result would do it, and import dynamo."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision

    @torch.compile(backend="eager", fullgraph=True)
    def scaled(x):
        return x * (2 if check._tf32_setting() else 3)

    try:
        for setting, expected in (("tf32", 2), ("ieee", 3)):
            matmul.fp32_precision = setting
            torch.compiler.reset()
            assert scaled(torch.ones(())) == expected
    finally:
        matmul.fp32_precision = before


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def loaded():
    """What is loaded beside torch and this package, once the ops are imported and once what stands on them is."""
    code = (
        "import json, sys, torch; before = set(sys.modules)\n"
        "def new(): return [name for name in set(sys.modules) - before if not name.startswith('ssmkernels')]\n"
        "import ssmkernels.ops; by_ops = new()\n"
        "import ssmkernels.nn, ssmkernels.graph, ssmkernels.metrics, ssmkernels.distributed\n"
        "print(json.dumps([by_ops, new()]))"
    )
    return json.loads(run_python(code))


def test_importing_the_ops_loads_no_compiler(loaded):
    """torch._dynamo and what it brings take seconds; the ops take a tenth of one."""
    assert loaded[0] == []


def test_importing_what_stands_on_the_ops_loads_no_compiler(loaded):
    assert not {"torch._dynamo", "torch._inductor"} & set(loaded[1])


def test_importing_the_package_registers_the_operators():
    code = (
        "import ssmkernels, torch\n"
        "x = torch.eye(3).requires_grad_(); labels, order = torch.tensor([0, 0, 1]), torch.arange(3)\n"
        "torch.ops.ssmkernels.similarity_moments(x, order, labels).sum().backward(); print(tuple(x.grad.shape))"
    )
    assert run_python(code) == "(3, 3)\n"

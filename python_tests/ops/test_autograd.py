# SPDX-License-Identifier: BSD-3-Clause
"""The short way by which eager calls are differentiated against torch's own: same values, same gradients, and who takes which."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import graph, ops
from ssmkernels.ops import _autograd as autograd


def _calls():
    draw = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=draw)

    rows, bank, features = normal(6, 5), normal(9, 5), normal(7, 5)
    labels, bank_labels = torch.tensor([0, 1, 0, 2, 1, 0, 2]), torch.arange(9) % 3
    probs = normal(6, 3).softmax(1)
    network = (normal(4, 10), normal(4), normal(4), normal())
    points = graph.knn_graph(normal(12, 4), 3)
    return {
        "instance_matching": (lambda x: ops.instance_matching(rows, x, bank, bank_labels, probs).loss, rows),
        "aggregate": (lambda x: ops.aggregate(x, bank, bank_labels, 3), rows),
        "pair_logits": (lambda x: ops.pair_logits(x, rows, *network), features),
        "pair_focal_loss": (lambda x: ops.pair_focal_loss(x, x, labels, labels, *network, reduction="none"), features),
        "pair_focal_loss_sum": (lambda x: ops.pair_focal_loss(x, x, labels, labels, *network), features),
        "pair_ranking_loss": (lambda x: ops.pair_ranking_loss(x, labels, negative_margin=3), features),
        "mined_pair_ranking_loss": (
            lambda x: ops.mined_pair_ranking_loss(x, features, positive_threshold=0, negative_threshold=0, negative_margin=3),
            features,
        ),
        "similarity_moments": (lambda x: torch.stack(ops.similarity_moments(x, labels)), features),
        "leave_one_edge_out": (
            lambda x: ops.leave_one_edge_out(points.crow, points.col, points.reverse, points.weight, x),
            normal(12, 3),
        ),
        "laplacian_solve": (
            lambda x: ops.laplacian_solve(points.crow, points.col, points.weight, None, torch.ones(12), x).solution,
            normal(12, 3),
        ),
    }


NAMES = sorted(_calls())


def _value_and_gradient(call, rows):
    rows = rows.clone().requires_grad_()
    out = call(rows)
    (out.sin() if out.ndim else 3 * out).sum().backward()
    return out.detach(), rows.grad


def test_every_differentiable_op_is_here():
    assert sorted(autograd._functions) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_eager_and_registered_derivatives_have_the_same_bits(name, monkeypatch):
    call, rows = _calls()[name]
    taken = []
    functions = autograd._functions[name]
    seen = type("Seen", (), {"apply": lambda *inputs: taken.append(name) or functions.eager.apply(*inputs)})
    monkeypatch.setitem(autograd._functions, name, functions._replace(eager=seen))
    short = _value_and_gradient(call, rows)
    assert taken == [name]
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "call", lambda name, *inputs: autograd.kernel(name)(*inputs))
        registered = _value_and_gradient(call, rows)
    assert taken == [name]
    assert all(a.equal(b) for a, b in zip(short, registered, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gradient(name):
    call, rows = _calls()[name]
    with torch.no_grad():
        out = call(rows.clone().requires_grad_())
    assert not out.requires_grad and out.equal(call(rows))


def test_undefined_gradients():
    """What comes after the op may have no gradient to give it."""
    (call, rows), given = _calls()["pair_logits"], []
    rows = rows.clone().requires_grad_()

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            given.append(grad)

    Nothing.apply(call(rows)).sum().backward()
    assert len(given) == 1 and rows.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_function_transforms(name):
    """torch.func takes neither the registered derivative nor the short way."""
    call, rows = _calls()[name]
    expected = _value_and_gradient(call, rows)[1]

    def loss(x):
        out = call(x)
        return (out.sin() if out.ndim else 3 * out).sum()

    torch.testing.assert_close(torch.func.grad(loss)(rows), expected)

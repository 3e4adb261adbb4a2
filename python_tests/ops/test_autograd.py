# SPDX-License-Identifier: BSD-3-Clause
"""How the ops are differentiated: in eager mode, by the operators themselves, twice, and under torch.func."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from torch.autograd import forward_ad, gradgradcheck
from torch.autograd.functional import hessian
from torch.func import grad, jacrev, jvp, vmap

from ssmkernels import graph, ops, reference
from ssmkernels.ops import _autograd as autograd
from ssmkernels.ops import _second_order as second_order


def _calls(module=ops, dtype=torch.float32):
    """Each differentiable op as a function of one matrix, and that matrix."""
    draw = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=draw).to(dtype)

    rows, bank, features = normal(6, 5), normal(9, 5), normal(7, 5)
    labels, bank_labels = torch.tensor([0, 1, 0, 2, 1, 0, 2]), torch.arange(9) % 3
    probs = normal(6, 3).softmax(1)
    network = (normal(4, 10), normal(4), normal(4), normal())
    points = graph.knn_graph(normal(12, 4), 3)
    margins = {"positive_margin": 0.5, "negative_margin": 3.0}
    thresholds = {"positive_threshold": 0.0, "negative_threshold": 0.0}
    edges, rtol = (points.crow, points.col), 1e-6 if dtype == torch.float32 else 1e-14
    ends = torch.repeat_interleave(points.crow.diff()), points.col

    def symmetric(values):
        return values[ends[0]].square() + values[ends[1]].square()

    return {
        "instance_matching": (lambda x: module.instance_matching(rows, x, bank, bank_labels, probs).loss, rows),
        "aggregate": (lambda x: module.aggregate(x, bank, bank_labels, 3, temperature=1.0), rows),
        "pair_logits": (lambda x: module.pair_logits(x, rows, *network), features),
        "pair_focal_loss": (
            lambda x: module.pair_focal_loss(x, x, labels, labels, *network, reduction="none"),
            features,
        ),
        "pair_focal_loss_sum": (lambda x: module.pair_focal_loss(x, x, labels, labels, *network), features),
        "pair_ranking_loss": (lambda x: module.pair_ranking_loss(x, labels, **margins), features),
        "mined_pair_ranking_loss": (
            lambda x: module.mined_pair_ranking_loss(x, features, **thresholds, **margins),
            features,
        ),
        "similarity_moments": (lambda x: torch.stack(module.similarity_moments(x, labels)), features),
        "leave_one_edge_out": (
            lambda x: module.leave_one_edge_out(*edges, points.reverse, points.weight.to(dtype), x),
            normal(12, 3),
        ),
        "laplacian_solve": (
            lambda x: (
                module.laplacian_solve(
                    *edges, symmetric(x[:, 0]), symmetric(x[:, 2]), x[:, 1].exp(), x, rtol=rtol
                ).solution
            ),
            normal(12, 3),
        ),
    }


NAMES = sorted(_calls())
TWICE = sorted(name for name in NAMES if autograd.public_name(name) in autograd.twice_differentiable())
ONCE = sorted(set(NAMES) - set(TWICE))


def _scalar(call):
    """A function of a matrix, curved where the op is not."""

    def scalar(x):
        out = call(x)
        return (out.sin() if out.ndim else 3 * out).sum()

    return scalar


def _gradient(call, rows):
    rows = rows.clone().requires_grad_()
    out = call(rows)
    _scalar(lambda _: out)(rows).backward()
    return out.detach(), rows.grad


def _penalty(call, x):
    """The gradient penalty of WGAN-GP, (‖∇f‖ − 1)², by torch.autograd."""
    (gradient,) = torch.autograd.grad(call(x), x, create_graph=True)
    assert gradient.requires_grad
    return (gradient.norm() - 1).square()


def _distances(x, y, **_):
    """torch.cdist, differentiable twice; the derivatives of a distance 0 are 0."""
    squares = (x[:, None] - y).square().sum(dim=2)
    return torch.where(squares == 0, 0.0, torch.where(squares == 0, 1.0, squares).sqrt())


def test_what_is_asked_here_and_of_every_case():
    """These ops; of any other one, test_contract_torch.py asks that its second derivative is right or raises."""
    differentiable = {name for name in autograd._functions if not name.endswith("_backward")}
    registered = {name for case in CASES.values() if case.differentiable for name in case.registered}
    assert set(NAMES) <= differentiable <= registered


def test_which_ops_have_second_derivatives():
    assert ONCE == ["instance_matching", "leave_one_edge_out", "pair_focal_loss", "pair_focal_loss_sum"]


@pytest.mark.parametrize("name", NAMES)
def test_eager_and_registered_derivatives_have_the_same_bits(name, monkeypatch):
    call, rows = _calls()[name]
    taken = []
    functions = autograd._functions[name]
    seen = type("Seen", (), {"apply": lambda *inputs: taken.append(name) or functions.eager.apply(*inputs)})
    monkeypatch.setitem(autograd._functions, name, functions._replace(eager=seen))
    short = _gradient(call, rows)
    assert taken == [name]
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "call", lambda name, *inputs: autograd.kernel(name)(*inputs))
        registered = _gradient(call, rows)
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


def test_arguments_without_a_gradient_are_detached():
    rows, bank, labels = torch.randn(4, 5), torch.randn(6, 5), torch.arange(6) % 3
    probs, points = torch.rand(4, 3), graph.knn_graph(torch.randn(8, 3), 2)
    edges = (points.crow, points.col, points.weight, None, torch.ones(8), torch.ones(8, 2))
    thresholds = {"positive_threshold": 0.0, "negative_threshold": 0.0}
    calls = [
        (lambda x: ops.instance_matching(x, rows, bank, labels, probs).loss, rows),
        (lambda x: ops.instance_matching(rows, rows, x, labels, probs).loss, bank),
        (lambda x: ops.instance_matching(rows, rows, bank, labels, x).loss, probs),
        (lambda x: ops.instance_matching(x, rows, bank, labels, probs).pseudo_probs, rows),
        (lambda x: ops.aggregate(rows, x, labels, 3), bank),
        (lambda x: ops.unfold(x, bank, labels, probs), rows),
        (lambda x: ops.mined_pair_ranking_loss(rows, x, **thresholds), rows),
        (lambda x: ops.laplacian_solve(*edges, initial=x).solution, torch.zeros(8, 2)),
    ]
    for call, value in calls:
        assert not call(value.clone().requires_grad_()).requires_grad
    strong = rows.clone().requires_grad_()
    given = [tensor.clone().requires_grad_() for tensor in (rows, bank, probs)]
    ops.instance_matching(given[0], strong, given[1], labels, given[2]).loss.sum().backward()
    assert strong.grad.any() and all(tensor.grad is None for tensor in given)


@pytest.mark.parametrize("tile", [7, 40, 1 << 18])
@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives(name, tile, monkeypatch):
    """Both sides in float64: what differs is the order of sums, of some hundred terms at most."""
    monkeypatch.setattr(second_order, "TILE_ELEMENTS", tile)
    monkeypatch.setattr(torch, "cdist", _distances)  # torch 2.11's has no second derivative
    values = []
    for module in (ops, reference):
        call, rows = _calls(module, torch.float64)[name]
        x = rows.clone().requires_grad_()
        penalty = _penalty(_scalar(call), x)
        values.append((penalty.detach(), torch.autograd.grad(penalty, x)[0], hessian(_scalar(call), rows)))
    for ours, expected in zip(*values, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", TWICE)
def test_third_derivatives(name):
    """The formulas of second derivatives are differentiable themselves."""

    call, rows = _calls(ops, torch.float64)[name]

    def slope(x):
        return grad(lambda y: grad(_scalar(call))(y).square().sum())(x).square().sum()

    direction, step = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1e-5
    difference = (slope(rows + step * direction) - slope(rows - step * direction)) / (2 * step)
    torch.testing.assert_close((grad(slope)(rows) * direction).sum(), difference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interaction", ["concat", "absdiff", "product"])
@pytest.mark.parametrize("listed", [False, True])
def test_second_derivatives_of_every_argument_of_pair_logits(interaction, listed, monkeypatch):
    monkeypatch.setattr(second_order, "TILE_ELEMENTS", 40)
    draw = torch.Generator().manual_seed(0)
    sizes = [(4, 5), (3, 5), (6, 10 if interaction == "concat" else 5), (6,), (6,), ()]
    network = [torch.randn(size, generator=draw, dtype=torch.float64).requires_grad_() for size in sizes]
    pairs = torch.tensor([[0, 1], [3, 2], [0, 1], [2, 2]]) if listed else None
    assert gradgradcheck(lambda *network: ops.pair_logits(*network, interaction=interaction, pairs=pairs), network)


@pytest.mark.parametrize("reduction", ["mean_nonzero", "mean", "sum"])
def test_second_derivatives_of_embeddings_and_references(reduction):
    draw = torch.Generator().manual_seed(0)
    rows, references = (
        torch.randn(size, generator=draw, dtype=torch.float64).requires_grad_() for size in ((7, 3), (5, 3))
    )
    labels, reference_labels = torch.tensor([0, 1, 0, 2, 1, 0, 2]), torch.tensor([1, 0, 2, 2, 3])
    options = {
        "positive_margin": 0.5,
        "negative_margin": 3.0,
        "reduction": reduction,
        "reference_labels": reference_labels,
    }
    assert gradgradcheck(lambda x, y: ops.pair_ranking_loss(x, labels, references=y, **options), (rows, references))


def test_pairs_at_distance_0_have_no_second_derivative():
    """As they have no first one; all others are what they are without the copy."""
    rows, labels = (
        torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64),
        torch.zeros(3, dtype=torch.int64),
    )
    curvature = hessian(lambda x: ops.pair_ranking_loss(x, labels, reduction="sum"), rows)
    apart = hessian(lambda x: 4 * (x[0] - x[2]).norm() / 2 + 4 * (x[1] - x[2]).norm() / 2, rows)
    torch.testing.assert_close(curvature, apart, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ONCE)
def test_what_has_no_second_derivative_says_so(name):
    call, rows = _calls()[name]
    x = rows.clone().requires_grad_()
    message = (
        rf"ssmkernels: the gradient of `{autograd.public_name(name)}` is not differentiable \(second derivatives exist"
        r" for aggregate, "
    )
    for scalar in (_scalar(call), lambda x: call(x).sum()):
        with pytest.raises(NotImplementedError, match=message):
            _penalty(scalar, x).backward()
        with pytest.raises(NotImplementedError, match=message):
            hessian(scalar, rows)
        with pytest.raises(NotImplementedError, match=message):
            grad(lambda x, scalar=scalar: grad(scalar)(x).square().sum())(rows)


def test_a_matching_that_is_finished_by_hand_has_no_second_derivative_either():
    rows, bank, labels, probs = torch.randn(4, 5), torch.randn(6, 5), torch.arange(6) % 3, torch.rand(4, 3)
    partial = ops.instance_matching_partial(rows, rows, bank, labels, probs)

    def loss(x):
        return ops.finish_instance_matching(partial, x, probs).loss.sum()

    torch.testing.assert_close(
        grad(loss)(rows), grad(lambda x: ops.instance_matching(rows, x, bank, labels, probs).loss.sum())(rows)
    )
    with pytest.raises(NotImplementedError, match="the gradient of `instance_matching` is not differentiable"):
        _penalty(loss, rows.clone().requires_grad_()).backward()
    with pytest.raises(NotImplementedError, match="the gradient of `instance_matching` is not differentiable"):
        grad(lambda x: grad(loss)(x).square().sum())(rows)


@pytest.mark.parametrize("name", NAMES)
def test_operators_called_directly_are_differentiated_twice_or_say_so(name, monkeypatch):
    call, rows = _calls(dtype=torch.float64)[name]
    x = rows.clone().requires_grad_()
    expected = torch.autograd.grad(_penalty(_scalar(call), x), x)[0] if name in TWICE else None
    monkeypatch.setattr(autograd, "call", lambda name, *inputs: autograd.kernel(name)(*inputs))
    if expected is not None:
        assert torch.autograd.grad(_penalty(_scalar(call), x), x)[0].equal(expected)
        return
    with pytest.raises(NotImplementedError, match="is not differentiable"):
        _penalty(_scalar(call), x).backward()


@pytest.mark.parametrize("name", NAMES)
def test_function_transforms(name):
    """torch.func takes neither the registered derivative nor the short way."""
    call, rows = _calls()[name]
    torch.testing.assert_close(grad(_scalar(call))(rows), _gradient(call, rows)[1])


@pytest.mark.parametrize("name", TWICE)
def test_nested_function_transforms(name):
    call, rows = _calls(dtype=torch.float64)[name]
    x = rows.clone().requires_grad_()
    expected = torch.autograd.grad(_penalty(_scalar(call), x), x)[0]

    def penalty(x):
        return (grad(_scalar(call))(x).norm() - 1).square()

    torch.testing.assert_close(grad(penalty)(rows), expected)
    torch.testing.assert_close(jacrev(grad(_scalar(call)))(rows), hessian(_scalar(call), rows))


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name):
    """Of the op, of its gradient, and the gradient of it: the bits of one call each."""
    call, rows = _calls()[name]
    batch, scalar = torch.stack([rows, 1.5 * rows, rows - 0.3]), _scalar(call)
    gradients = torch.stack([grad(scalar)(x) for x in batch])
    assert vmap(call)(batch).equal(torch.stack([call(x) for x in batch]))
    assert vmap(call, in_dims=1, out_dims=-1)(batch.transpose(0, 1)).equal(
        torch.stack([call(x) for x in batch], dim=-1)
    )
    torch.testing.assert_close(vmap(grad(scalar))(batch), gradients)
    torch.testing.assert_close(grad(lambda batch: vmap(scalar)(batch).sum())(batch), gradients)
    recorded = batch.clone().requires_grad_()
    vmap(scalar)(recorded).sum().backward()
    torch.testing.assert_close(recorded.grad, gradients)


def test_vmap_of_what_has_no_gradient():
    rows, bank, labels, probs = torch.randn(3, 4, 5), torch.randn(6, 5), torch.arange(6) % 3, torch.rand(3, 4, 3)
    unfolded = vmap(lambda x, p: ops.unfold(x, bank, labels, p))(rows, probs)
    assert unfolded.equal(torch.stack([ops.unfold(x, bank, labels, p) for x, p in zip(rows, probs, strict=True)]))
    partial = vmap(lambda x, p: tuple(ops.instance_matching_partial(x, x, bank, labels, p)))(rows, probs)
    for row in range(3):
        alone = ops.instance_matching_partial(rows[row], rows[row], bank, labels, probs[row])
        assert all(a[row].equal(b) for a, b in zip(partial, alone, strict=True))
    banks = torch.randn(3, 6, 5)
    with pytest.raises(ValueError, match=r"^bank is written in place, which torch\.func\.vmap cannot do"):
        vmap(lambda bank: ops.memory_update_(bank, labels, torch.tensor([1]), torch.ones(1, 5), torch.tensor([0])))(
            banks
        )


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_names_the_op(name):
    call, rows = _calls()[name]
    message = rf"ssmkernels: `{autograd.public_name(name)}` has no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=message):
        jvp(call, (rows,), (rows,))
    for recording in (torch.enable_grad, torch.no_grad):
        with recording(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
            call(forward_ad.make_dual(rows, rows))

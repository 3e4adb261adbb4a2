# SPDX-License-Identifier: BSD-3-Clause
"""The pipeline against dense float64 transcriptions of the equations, and on real digits."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssmkernels import ops, reference
from ssmkernels.graph import (
    Graph,
    comparisons,
    confidence_of,
    knn_graph,
    label_propagation,
    mixed_label_propagation,
    propagation,
)

MU = 1 / 99


def blobs(sizes, seed=0, k=6):
    """Clouds far apart, so that each is a component of its own."""
    draw = torch.Generator().manual_seed(seed)
    axes = torch.eye(len(sizes) + 1, dtype=torch.float64)
    points = [
        axes[i] + 0.2 * torch.randn(n, len(sizes) + 1, generator=draw, dtype=torch.float64).abs()
        for i, n in enumerate(sizes)
    ]
    graphs = [knn_graph(cluster, min(k, len(cluster) - 1)).to_scipy() for cluster in points]
    from scipy.sparse import block_diag

    return Graph.from_scipy(block_diag(graphs, format="csr"))


def dense_system(graph, labels, classes, *, mu=MU, mu_unlabeled=0.0, balance=True):
    """L, u, Y·share and c_K, by loops."""
    weight = torch.from_numpy(graph.to_scipy().toarray()).double()
    component, count = graph.components
    u, rhs, offset = (
        torch.full((len(labels),), mu_unlabeled).double(),
        torch.zeros(len(labels), classes).double(),
        torch.zeros(len(labels)),
    )
    offset = offset.double()
    for part in range(count):
        inside = component == part
        present = sorted({int(c) for c in labels[inside & (labels >= 0)]})
        for c in present:
            rows = (inside & (labels == c)).nonzero()[:, 0]
            share = int((inside & (labels >= 0)).sum()) / (len(present) * len(rows)) if balance else 1.0
            u[rows], rhs[rows, c] = mu * share, share
        if present:
            offset[inside] = 1 / (len(present) * mu)
    return torch.diag(weight.sum(1)) - weight, u, rhs, offset


CASES = {
    "balanced": ([60, 40], {0: [0, 1, 2], 1: [3, 61], 2: [62, 63]}, {}),
    "unequal": ([80], {0: [0], 1: [1, 2, 3, 4], 2: [5, 6]}, {}),
    "literal": ([80], {0: [0], 1: [1, 2, 3, 4], 2: [5, 6]}, {"balance": False}),
    "pull to 0": ([50, 30], {0: [0], 1: [1, 2, 51]}, {"mu_unlabeled": MU, "balance": False}),
    "pull to 0, balanced": ([50, 30], {0: [0], 1: [1, 2, 51]}, {"mu_unlabeled": 0.3}),
    "a component without labels": ([40, 30, 20], {0: [0, 1], 1: [2, 41]}, {}),
    "a component lacking a class": ([40, 30], {0: [0, 1, 41], 1: [2, 3], 2: [42]}, {"mu": 0.5}),
    "isolated nodes": ([40, 2], {0: [0, 1], 1: [2, 3]}, {}),
}


def case(name, isolated=3):
    sizes, where, options = CASES[name]
    graph = blobs(sizes)
    if name == "isolated nodes":
        matrix = graph.to_scipy()
        matrix.resize((graph.num_nodes + isolated,) * 2)
        graph = Graph.from_scipy(matrix)
    labels = torch.full((graph.num_nodes,), -1)
    for c, rows in where.items():
        labels[rows] = c
    if name == "isolated nodes":
        labels[-1] = 1
    return graph, labels, options


@pytest.mark.parametrize("name", CASES)
def test_label_propagation(name):
    graph, labels, options = case(name)
    laplacian, u, rhs, offset = dense_system(graph, labels, 3, **options)
    known = u.new_zeros(graph.num_nodes, 3)
    component = graph.components[0]
    for part in component.unique():  # components without labels and pull are singular, and 0 by definition
        inside = (component == part).nonzero()[:, 0]
        if u[inside].any():
            known[inside] = torch.linalg.solve((laplacian + torch.diag(u))[inside][:, inside], rhs[inside])
    result = label_propagation(graph, labels, num_classes=3, rtol=1e-12, **options)
    expected = torch.where(offset[:, None] > 0, known - offset[:, None], 0)
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_mixed_label_propagation(name, beta):
    """(24) with each pair once and weights of mean 1, G̃, ω and the pseudo-labels."""
    graph, labels, options = case(name)
    result = mixed_label_propagation(graph, labels, num_classes=3, beta=beta, rtol=1e-12, **options)
    graph = graph.with_weight(graph.weight / graph.weight.mean())  # all are positive
    laplacian, u, rhs, offset = dense_system(graph, labels, 3, **options)
    weights = reference.leave_one_edge_out(graph.crow, graph.col, graph.reverse, graph.weight, result.propagated)
    torch.testing.assert_close(result.dissimilarity, weights, rtol=1e-9, atol=1e-12)
    dis = torch.zeros_like(laplacian)
    dis[graph.rows, graph.col.long()] = weights
    matrix = laplacian + torch.diag(u) + beta * (torch.diag(dis.sum(1)) + dis)
    known = offset > 0
    scores = torch.zeros_like(rhs)
    scores[known] = torch.linalg.solve(matrix[known][:, known], rhs[known])
    torch.testing.assert_close(result.scores[known], scores[known], rtol=1e-6, atol=1e-7)
    positive = scores.clamp_min(0)
    torch.testing.assert_close(
        result.probs[known], (positive / positive.sum(1, keepdim=True))[known], rtol=1e-6, atol=1e-7
    )
    assert result.pseudo_labels[known].equal(scores[known].argmax(1))
    assert (
        (result.pseudo_labels[~known] == -1).all()
        and not result.confidence[~known].any()
        and not result.probs[~known].any()
    )
    assert result.num_undecided == int((~known).sum())
    torch.testing.assert_close(result.confidence, confidence_of(result.probs))
    assert result.iterations.shape == (3,) and result.residual.max() <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixed_is_free_of_scale(dtype, digits, draw_labels):
    """W and c W give the same results, by bits for a power of two; and as W_dis, β and μ are in the unit of W/w̄, so
    do comparisons.
    """
    graph, classes = digits
    labels = draw_labels(classes, 0)
    graph = graph.to(dtype)
    results = {
        c: mixed_label_propagation(graph.with_weight(c * graph.weight), labels) for c in (1, 1e-12, 1e12, 2.0**-40)
    }
    for c, result in results.items():
        assert result.pseudo_labels.equal(results[1].pseudo_labels)
        torch.testing.assert_close(result.dissimilarity, results[1].dissimilarity, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(result.confidence, results[1].confidence, rtol=1e-3, atol=1e-5)
        assert result.scores.equal(results[1].scores) or c in (1e-12, 1e12)
    damped = [
        comparisons.uniform_damping(graph.with_weight(c * graph.weight), labels, results[1].dissimilarity).pseudo_labels
        for c in (1, 1e-12, 1e12)
    ]
    assert damped[0].equal(damped[1]) and damped[0].equal(damped[2])


def test_paper_literal_scale_is_a_no_op(digits, draw_labels):
    """With the printed right side μY the softmax of (20) is flat and W_dis vanishes; with Y it does not."""
    graph, classes = digits
    labels = draw_labels(classes, 0)
    propagated = label_propagation(graph, labels)
    arguments = (graph.crow, graph.col, graph.reverse, graph.weight)
    assert ops.leave_one_edge_out(*arguments, MU * propagated).max() < 1e-5
    assert ops.leave_one_edge_out(*arguments, propagated).max() > 0.05


def test_plain_float32_fails_where_the_deviation_does_not(digits, draw_labels):
    """F is a large constant and a small signal: float32 loses the signal, unless the deviation is what is solved
    for.
    """
    graph, classes = digits
    labels = draw_labels(classes, 1)
    exact = label_propagation(graph, labels, rtol=1e-10).argmax(1)
    single = graph.to(torch.float32)
    assert (label_propagation(single, labels).argmax(1) == exact).double().mean() >= 0.999
    one_hot = torch.nn.functional.one_hot(labels.clamp_min(0), 10).float() * (labels >= 0)[:, None]
    diagonal = MU * (labels >= 0).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rtol in (1e-4, 1e-6):
            plain = ops.laplacian_solve(
                single.crow, single.col, single.weight, None, diagonal, one_hot, rtol=rtol
            ).solution
            assert (plain.argmax(1) == exact).double().mean() < 0.999
    mixed = [mixed_label_propagation(g, labels) for g in (graph, single)]
    assert (mixed[0].pseudo_labels == mixed[1].pseudo_labels).double().mean() >= 0.999
    torch.testing.assert_close(mixed[1].confidence.double(), mixed[0].confidence, rtol=0.05, atol=5e-3)


def test_class_balance_matters(digits, draw_labels):
    graph, classes = digits
    labels = draw_labels(classes, 2, counts=(2, 8, 4, 3, 6))
    accuracy = {
        balance: (label_propagation(graph, labels, balance=balance).argmax(1) == classes).double().mean()
        for balance in (False, True)
    }
    assert accuracy[True] > 0.8 and accuracy[False] < 0.4
    equal = draw_labels(classes, 2)
    torch.testing.assert_close(
        label_propagation(graph, equal, balance=False, rtol=1e-10),
        label_propagation(graph, equal, rtol=1e-10),
        rtol=1e-5,
        atol=1e-6,
    )


def test_normalised_confidence_and_given_dissimilarity(digits, draw_labels):
    graph, classes = digits
    labels = draw_labels(classes, 3)
    plain, normal = (mixed_label_propagation(graph, labels, normalize_confidence=flag) for flag in (False, True))
    torch.testing.assert_close(normal.confidence, plain.confidence / plain.confidence.max())
    again = mixed_label_propagation(graph, labels, dissimilarity=plain.dissimilarity)
    assert again.scores.equal(plain.scores)
    none = mixed_label_propagation(graph, labels, dissimilarity=torch.zeros_like(plain.dissimilarity))
    assert none.pseudo_labels.equal(label_propagation(graph.normalized(), labels).argmax(1))


def test_confidence():
    probs = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    expected = torch.tensor([1.0, 0.0, 0.0, 1 - torch.log(torch.tensor(2.0)) / torch.log(torch.tensor(3.0))])
    torch.testing.assert_close(confidence_of(probs), expected)
    with pytest.raises(ValueError, match=r"probs must be \[N, C\] with C > 0, got shape \[8, 0\]"):
        confidence_of(torch.zeros(8, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_confidence_of_half_types_is_computed_in_float32(dtype):
    probs = torch.tensor([[0.3, 0.36, 0.34]]).to(dtype)  # 1 - H/log C cancels
    torch.testing.assert_close(confidence_of(probs), confidence_of(probs.double()).to(dtype), rtol=0, atol=1e-6)


def test_one_class():
    graph, labels, _ = case("balanced")
    labels = torch.where(labels == 0, 0, -1)
    result = mixed_label_propagation(graph, labels)
    component = graph.components[0]
    assert result.pseudo_labels.tolist() == [0 if part == component[0] else -1 for part in component]
    assert not result.dissimilarity.any()


def test_bits_do_not_depend_on_the_run_or_the_threads(digits, draw_labels):
    graph, classes = digits
    labels, single = draw_labels(classes, 4), graph.to(torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(mixed_label_propagation(single, labels))
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_unconverged_solve_warns(digits, draw_labels):
    graph, classes = digits
    with pytest.warns(RuntimeWarning, match="did not converge"):
        label_propagation(graph, draw_labels(classes, 0), max_iter=2)


@pytest.mark.gpu
def test_on_a_gpu(digits, draw_labels):
    graph, classes = digits
    labels = draw_labels(classes, 0)
    here, there = mixed_label_propagation(graph, labels), mixed_label_propagation(graph.to("cuda"), labels.cuda())
    torch.testing.assert_close(there.scores.cpu(), here.scores, rtol=1e-3, atol=1e-4)
    assert (there.pseudo_labels.cpu() == here.pseudo_labels).double().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_of_weight_0_join_nothing(dtype):
    pair = Graph(torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.zeros(2, dtype=dtype))
    labels = torch.tensor([-1, 2])
    expected = torch.tensor([[0.0, 0, 0], [-99, -99, 0]], dtype=dtype)
    rounding = 4 * np.finfo(np.float64).eps * 99
    torch.testing.assert_close(label_propagation(pair, labels), expected, rtol=torch.finfo(dtype).eps, atol=rounding)
    mixed = mixed_label_propagation(pair, labels)
    assert mixed.pseudo_labels.tolist() == [-1, 2]
    assert mixed.dissimilarity.tolist() == [0, 0]
    given = mixed_label_propagation(pair, labels, dissimilarity=torch.ones(2, dtype=dtype))
    assert bool(given.scores.isfinite().all())


def test_a_component_of_one_class_has_no_deviation():
    # c_K = 1/(m_K μ) in float64: a float32 one would leave 1.5e-7.
    lone = Graph(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64))
    scores = label_propagation(lone, torch.tensor([0]), mu=float(np.float32(0.1)))
    assert abs(float(scores)) <= 2 * np.finfo(np.float64).eps * 10


def test_probabilities_of_tiny_scores_sum_to_1():
    pair = Graph(torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.full((2,), 0.3))
    mixed = mixed_label_propagation(pair, torch.tensor([-1, 2]), mu_unlabeled=1e300, balance=False)
    decided = mixed.pseudo_labels >= 0
    assert bool(decided.any()) and mixed.probs.sum(dim=1)[decided].allclose(torch.ones(()), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "mu"), [(torch.float32, 1e-300), (torch.float64, 1e-320)])
def test_mu_whose_inverse_overflows_is_refused(dtype, mu):
    lone = Graph(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=dtype))
    for propagate in (label_propagation, mixed_label_propagation):
        with pytest.raises(ValueError, match="mu is too small"):
            propagate(
                lone,
                torch.tensor(
                    [
                        0,
                    ]
                ),
                mu=mu,
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("class_block", [1, 2, 5, np.int64(3)])
@pytest.mark.parametrize("name", CASES)
def test_classes_in_blocks(name, class_block, dtype):
    graph, labels, options = case(name)
    graph = graph.with_weight(graph.weight.to(dtype))
    rtol, atol = (1e-6, 1e-6) if dtype == torch.float32 else (1e-7, 1e-7)  # rtol of the solve and a few roundings
    whole, blocks = (
        label_propagation(graph, labels, num_classes=4, class_block=block, **options) for block in (None, class_block)
    )
    torch.testing.assert_close(blocks, whole, rtol=rtol, atol=atol)
    assert blocks.argmax(dim=1).equal(whole.argmax(dim=1))
    whole, blocks = (
        mixed_label_propagation(graph, labels, num_classes=4, class_block=block, **options)
        for block in (None, class_block)
    )
    assert blocks.pseudo_labels.equal(whole.pseudo_labels)
    assert blocks.iterations.shape == blocks.residual.shape == (4,)
    for name in ("scores", "probs", "confidence", "propagated", "dissimilarity"):
        torch.testing.assert_close(getattr(blocks, name), getattr(whole, name), rtol=10 * rtol, atol=10 * atol)


class LargestTensors(TorchDispatchMode):
    """The largest number of entries of a tensor that any operation returned, by dtype."""

    def __init__(self):
        super().__init__()
        self.entries = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.entries[tensor.dtype] = max(self.entries[tensor.dtype], tensor.numel())
        return result


@pytest.mark.parametrize("run", [label_propagation, mixed_label_propagation])
def test_blocks_of_classes_bound_the_work_space(run):
    """No float64 tensor, and no index, of all nodes and classes: what is returned is float32."""
    graph = blobs([300, 200], k=4)
    graph = graph.with_weight(graph.weight.float())
    nodes, classes, block = graph.num_nodes, 200, 8
    labels = torch.full((nodes,), -1)
    labels[::2] = torch.arange(len(labels[::2])) % classes
    with LargestTensors() as mode:
        run(graph, labels, num_classes=classes, class_block=block)
    assert mode.entries[torch.float32] == nodes * classes
    assert 0 < mode.entries[torch.float64] <= max(nodes * block, graph.num_edges) < nodes * classes
    assert mode.entries[torch.int64] < nodes * classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 3, 7])
def test_the_largest_of_a_row_stays_the_largest(block, dtype):
    """Of scores that differ by less than float32 tells, in blocks of columns, and of equal ones."""
    draw = torch.Generator().manual_seed(0)
    scores = 1 + 1e-9 * torch.randint(-3, 4, (200, 7), generator=draw).double()
    largest = propagation.Largest(scores[:, 0])
    for start in range(0, 7, block):
        largest.add(scores[:, start : start + block], start)
    assert largest.value.equal(scores.amax(dim=1))
    assert largest.column.equal(scores.argmax(dim=1))
    shift = torch.linspace(-1, 1, 200).double()
    kept = largest.keep((scores + shift[:, None]).to(dtype), shift)
    is_alone = (scores == largest.value[:, None]).sum(dim=1) == 1
    assert kept.argmax(dim=1)[is_alone].equal(scores.argmax(dim=1)[is_alone])
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(kept.double(), scores + shift[:, None], rtol=2 * unit, atol=unit)


def test_numpy_scalars():
    graph, labels, _ = case("balanced")
    plain = mixed_label_propagation(
        graph, labels, num_classes=3, beta=1.0, logit_scale=4.0, mu=0.5, rtol=0.0625, max_iter=500
    )
    for kind in (np.float32, np.float64, torch.tensor):
        settings = {
            "beta": kind(1.0),
            "logit_scale": kind(4),
            "mu": kind(0.5),
            "mu_unlabeled": kind(0),
            "rtol": kind(0.0625),
        }
        mixed = mixed_label_propagation(
            graph, labels, num_classes=labels.numpy().max() + 1, max_iter=np.int32(500), **settings
        )
        assert mixed.scores.equal(plain.scores)


@pytest.mark.parametrize("function", [label_propagation, mixed_label_propagation])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_weights_written_after_the_check(function, value):
    graph, labels, _ = case("balanced")
    graph.weight[0] = value
    with pytest.raises(ValueError, match="weight must be finite and >= 0"):
        function(graph, labels)


def test_no_convergence_is_said_of_nan(monkeypatch):
    """As where values are not checked, on a GPU."""
    graph, labels, _ = case("balanced")
    graph.weight[0] = graph.weight[graph.reverse[0]] = torch.nan
    monkeypatch.setattr(propagation.check, "values_are_checked", lambda tensor: False)
    with pytest.warns(RuntimeWarning, match="label_propagation did not converge .*residual nan"):
        propagated = label_propagation(graph, labels)
    assert propagated[graph.components[0] == graph.components[0][0]].isnan().any()


BAD = [
    ({"labels": torch.full((100,), -1)}, ValueError, r"labels must have at least one label; all are -1"),
    ({"num_classes": 1}, ValueError, r"labels must be below num_classes = 1, got 2"),
    ({"labels": torch.full((100,), -2)}, ValueError, r"labels must be -1 \(unlabelled\) or a class from 0 on, got -2"),
    ({"labels": torch.zeros(99, dtype=torch.int64)}, ValueError, r"labels must be \[N\] = \[100\], got shape \[99\]"),
    ({"labels": torch.zeros(100)}, TypeError, r"labels must be int64, got torch.float32"),
    (
        {"labels": torch.zeros(100, dtype=torch.int64, device="meta")},
        ValueError,
        r"labels are on meta but the graph is on cpu",
    ),
    ({"labels": [0] * 100}, TypeError, r"labels must be a tensor or an array"),
    ({"num_classes": 3.0}, TypeError, r"num_classes must be an int, got float"),
    ({"num_classes": True}, TypeError, r"num_classes must be an int, got bool"),
    ({"mu": 0.0}, ValueError, r"mu must be finite and > 0, got 0.0"),
    ({"mu_unlabeled": -1.0}, ValueError, r"mu_unlabeled must be finite and >= 0, got -1.0"),
    ({"rtol": 0.0}, ValueError, r"rtol must be finite and > 0, got 0.0"),
    ({"max_iter": 0}, ValueError, r"max_iter must be at least 1, got 0"),
    ({"mu": torch.tensor([0.01])}, TypeError, r"mu must be a number, got a tensor"),
    ({"mu": True}, TypeError, r"mu must be a number, got bool"),
    ({"beta": None}, TypeError, r"beta must be a number, got NoneType"),
    ({"beta": -1.0}, ValueError, r"beta must be finite and >= 0, got -1.0"),
    ({"logit_scale": 0.0}, ValueError, r"logit_scale must be finite and > 0, got 0.0"),
    ({"dissimilarity": torch.ones(3)}, ValueError, r"dissimilarity must be \[E\]"),
    ({"dissimilarity": "negative"}, ValueError, r"dissimilarity must be finite and >= 0"),
    ({"dissimilarity": "one way"}, ValueError, r"dissimilarity must be symmetric"),
    ({"graph": None}, TypeError, r"graph must be a ssmkernels.graph.Graph or SplitGraph, got NoneType"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_input(change, error, message):
    graph, labels, _ = case("balanced")
    named = {"negative": -graph.weight, "one way": (graph.rows < graph.col).double()}
    change = {key: named[value] if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(error, match=message):
        mixed_label_propagation(**({"graph": graph, "labels": labels} | change))

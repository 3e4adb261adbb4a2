# SPDX-License-Identifier: BSD-3-Clause
import warnings

import pytest
import torch

from ssmkernels.graph import Graph, comparisons, label_propagation, mixed_label_propagation


def accuracy(predicted, classes):
    return float((predicted == classes).double().mean())


def test_table_3_on_digits(digits, draw_labels):
    """Three draws of five labels: the paper's order holds, and the shuffled weights do as well
    (docs/results/mixed_lp_table3.md).
    """
    graph, classes = digits
    rows = {}
    for seed in range(3):
        labels = draw_labels(classes, seed)
        ours = mixed_label_propagation(graph, labels)
        shuffled = comparisons.shuffled_dissimilarity(graph, ours.dissimilarity, torch.Generator().manual_seed(seed))
        results = {
            "lgc": comparisons.learning_with_local_and_global_consistency(graph, labels).argmax(1),
            "(12)": label_propagation(graph, labels, balance=False, mu_unlabeled=1 / 99).argmax(1),
            "(16)": label_propagation(graph, labels).argmax(1),
            "mom": mixed_label_propagation(
                graph, labels, dissimilarity=comparisons.mutual_neighbour_dissimilarity(graph)
            ).pseudo_labels,
            "control": mixed_label_propagation(
                graph, labels, dissimilarity=comparisons.control_dissimilarity(graph, labels)
            ).pseudo_labels,
            "ours": ours.pseudo_labels,
            "shuffled": mixed_label_propagation(graph, labels, dissimilarity=shuffled).pseudo_labels,
            "damping": comparisons.uniform_damping(graph, labels, ours.dissimilarity).pseudo_labels,
        }
        for name, predicted in results.items():
            rows.setdefault(name, []).append(accuracy(predicted, classes))
    mean = {name: sum(values) / len(values) for name, values in rows.items()}
    assert mean["mom"] < mean["(16)"] < mean["ours"] and abs(mean["control"] - mean["(16)"]) < 0.01
    assert all(0.84 < mean[name] < 0.96 for name in mean if name != "mom") and 0.7 < mean["mom"] < 0.88
    assert mean["shuffled"] > mean["ours"] - 0.01 and mean["damping"] > mean["ours"] - 0.01


def test_local_and_global_consistency_solves_its_system(digits, draw_labels):
    graph, classes = digits
    labels = draw_labels(classes, 0)
    scores = comparisons.learning_with_local_and_global_consistency(graph, labels, rtol=1e-10)
    root = graph.degree.rsqrt()
    smooth = root[:, None] * torch.from_numpy(graph.to_scipy() @ (root[:, None] * scores).numpy())
    one_hot = torch.nn.functional.one_hot(labels.clamp_min(0), 10) * (labels >= 0)[:, None]
    torch.testing.assert_close(scores - 0.99 * smooth, one_hot.double(), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\), got 1"):
        comparisons.learning_with_local_and_global_consistency(graph, labels, alpha=1)


def test_oracle_draws_true_edges_only(digits, draw_labels):
    graph, classes = digits
    labels = draw_labels(classes, 0)
    draw = torch.Generator().manual_seed(0)
    some, everything = (
        comparisons.oracle_dissimilarity(graph, classes, part, labels=labels, generator=draw) for part in (0.2, 1.0)
    )
    rows, col = graph.rows, graph.col.long()
    assert some.equal(some[graph.reverse]) and (classes[rows] != classes[col])[some > 0].all()
    known = (labels[rows] >= 0) & (labels[col] >= 0)
    assert not everything[known].any() and everything[(classes[rows] != classes[col]) & ~known].all()
    assert abs(some.sum() / everything.sum() - 0.2) < 1e-3
    helped = mixed_label_propagation(graph, labels, dissimilarity=everything)
    assert (
        accuracy(helped.pseudo_labels, classes) > accuracy(label_propagation(graph, labels).argmax(1), classes) + 0.02
    )
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 1.1"):
        comparisons.oracle_dissimilarity(graph, classes, 1.1)


def test_shuffling_keeps_the_values(digits, draw_labels):
    graph, classes = digits
    weights = mixed_label_propagation(graph, draw_labels(classes, 0)).dissimilarity
    shuffled = comparisons.shuffled_dissimilarity(graph, weights, torch.Generator().manual_seed(1))
    assert shuffled.equal(shuffled[graph.reverse]) and shuffled.sort().values.equal(weights.sort().values)
    assert not shuffled.equal(weights)


def test_lpdr_of_few_weak_edges_is_definite(digits, draw_labels):
    """Then it solves its system: (L + U − β L_dis) G = (U/μ) Y."""
    graph, classes = digits
    labels = draw_labels(classes, 0)
    weak = 0.01 * comparisons.oracle_dissimilarity(
        graph, classes, 0.05, labels=labels, generator=torch.Generator().manual_seed(0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = comparisons.lpdr(graph, labels, weak, rtol=1e-9)
    assert not result.indefinite and result.curvature > 0
    net = graph.normalized().to_scipy()
    net.data = net.data - weak.numpy()
    product = torch.from_numpy(net.sum(axis=1))[:, None] * result.scores - torch.from_numpy(net @ result.scores.numpy())
    product += 1 / 99 * (labels >= 0)[:, None] * result.scores
    one_hot = torch.nn.functional.one_hot(labels.clamp_min(0), 10) * (labels >= 0)[:, None]
    torch.testing.assert_close(product, one_hot.double(), rtol=1e-5, atol=1e-5)


def test_indefinite_lpdr_says_so(digits, draw_labels):
    graph, classes = digits
    labels = draw_labels(classes, 0)
    everything = comparisons.oracle_dissimilarity(graph, classes, 1.0, labels=labels)
    with pytest.warns(RuntimeWarning, match="lpdr: the system is not positive definite"):
        result = comparisons.lpdr(graph, labels, 5 * everything, beta=2.0)
    assert result.indefinite and result.curvature <= 0 and result.scores.isfinite().all()


def two_squares():
    """Two components of four nodes, labels in the first."""
    ring = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 0], [1, 0, 2, 1, 3, 2, 0, 3]])
    graph = Graph.from_edge_index(torch.cat([ring, ring + 4], dim=1), torch.ones(16, dtype=torch.float64))
    return graph, torch.tensor([0, -1, 1, -1, -1, -1, -1, -1])


def test_lpdr_of_a_component_without_labels():
    """Its constant is no direction of the problem, neither a reason to call it indefinite nor a class 0."""
    graph, labels = two_squares()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = comparisons.lpdr(graph, labels, torch.full_like(graph.weight, 0.5))
    assert (
        not result.indefinite
        and result.pseudo_labels[4:].tolist() == [-1] * 4
        and (result.pseudo_labels[:4] >= 0).all()
    )
    with pytest.warns(RuntimeWarning, match="not positive definite"):
        result = comparisons.lpdr(graph, labels, torch.full_like(graph.weight, 3.0))
    assert result.indefinite and result.pseudo_labels[4:].tolist() == [-1] * 4 and not result.scores[4:].any()


@pytest.mark.parametrize("dense", [True, False])
def test_stationary_point_solves_the_indefinite_system(dense, monkeypatch):
    graph, labels = two_squares()
    monkeypatch.setattr(comparisons, "DENSE_NODES", 4096 if dense else 0)
    with pytest.warns(RuntimeWarning, match="not positive definite") as caught:
        scores = comparisons.lpdr(graph, labels, torch.full_like(graph.weight, 3.0)).scores
    assert len(caught) == 1
    laplacian = torch.from_numpy(-graph.to_scipy().toarray()) + torch.diag(graph.degree)
    expected = torch.nn.functional.one_hot(labels.clamp_min(0), 2) * (labels >= 0)[:, None]
    gradient = -2 * laplacian @ scores + (labels >= 0)[:, None] / 99 * scores
    torch.testing.assert_close(gradient, expected.double(), rtol=1e-5, atol=1e-5)


def test_lpdr_that_does_not_converge_says_so(digits, draw_labels):
    graph, classes = digits
    with pytest.warns(RuntimeWarning, match=r"lpdr did not converge to rtol = 1e-06 .*: raise max_iter \(3\)"):
        comparisons.lpdr(graph, draw_labels(classes, 0), torch.zeros_like(graph.weight), max_iter=3)


BAD = [
    ("lpdr", {"beta": -1.0}, r"beta must be finite and >= 0, got -1.0"),
    ("lpdr", {"rtol": 0.0}, r"rtol must be finite and > 0, got 0.0"),
    ("lpdr", {"max_iter": 0}, r"max_iter must be at least 1, got 0"),
    ("lpdr", {"dissimilarity": torch.ones(3)}, r"dissimilarity must be \[E\]"),
    ("lpdr", {"seed": 0.5}, r"seed must be an int, got float"),
    ("uniform_damping", {"beta": float("nan")}, r"beta must be finite and >= 0, got nan"),
    ("uniform_damping", {"beta": None}, r"beta must be a number, got NoneType"),
]


@pytest.mark.parametrize(("function", "change", "message"), BAD)
def test_bad_input(function, change, message):
    graph, labels = two_squares()
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(comparisons, function)(graph, labels, **({"dissimilarity": graph.weight} | change))
    with pytest.raises(ValueError, match=r"true_labels must be \[N\] = \[8\], got shape \[3\]"):
        comparisons.oracle_dissimilarity(graph, labels[:3], 0.5)
    for alpha in (None, True, "x"):
        with pytest.raises(TypeError, match="alpha must be a number"):
            comparisons.learning_with_local_and_global_consistency(graph, labels, alpha=alpha)
    with pytest.raises(TypeError, match="fraction must be a number, got NoneType"):
        comparisons.oracle_dissimilarity(graph, labels, None)


def test_mutual_neighbours_must_be_known(digits):
    graph, _ = digits
    other = type(graph).from_scipy(graph.to_scipy())
    with pytest.raises(ValueError, match="does not know which of its edges join mutual neighbours"):
        comparisons.mutual_neighbour_dissimilarity(other)
    assert set(comparisons.mutual_neighbour_dissimilarity(graph).unique().tolist()) == {0.0, 1.0}

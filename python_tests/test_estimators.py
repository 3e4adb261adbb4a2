# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import importlib
import pickle
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ssmkernels import estimators, graph
from ssmkernels.estimators import LabelPropagation, MixedLabelPropagation

BOTH = pytest.mark.parametrize(
    "estimator", [LabelPropagation(), MixedLabelPropagation()], ids=lambda estimator: type(estimator).__name__
)


def expected_failures(estimator):
    """scikit-learn spares its own semi-supervised estimators this check, by their names: LabelPropagation is one of
    them.
    """
    if isinstance(estimator, MixedLabelPropagation):
        return {"check_classifiers_classes": "it takes -1 for a class, which is the mark of unlabelled points here"}
    return {}


@parametrize_with_checks([LabelPropagation(), MixedLabelPropagation()], expected_failed_checks=expected_failures)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    """Pixels, classes, and the classes with all but five of each hidden."""
    pixels, truth = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    labels = np.full(len(truth), -1)
    for c in range(10):
        labels[generator.choice(np.flatnonzero(truth == c), 5, replace=False)] = c
    return pixels, truth, labels


@pytest.fixture(scope="module", params=[LabelPropagation, MixedLabelPropagation])
def fitted(request, digits):
    return request.param().fit(digits[0], digits[2])


def arcs(seed=0):
    """Three classes in the directions of the axes: 60 points, one label each for classes 0 and 1, none near the
    third axis.
    """
    generator = np.random.default_rng(seed)
    truth = np.arange(60) % 3
    points = np.eye(3)[truth]
    points[:, :2] += np.where(truth[:, None] < 2, 0.1 * generator.random((60, 2)), 0)
    labels = np.full(60, -1)
    labels[[0, 1, 3]] = 0, 1, 0
    return points * generator.uniform(0.5, 2, (60, 1)), truth, labels


def test_labels_of_digits(fitted, digits):
    _, truth, labels = digits
    assert (fitted.transduction_ == truth).mean() > 0.84
    np.testing.assert_allclose(fitted.label_distributions_.sum(axis=1), 1)
    assert (fitted.label_distributions_ >= 0).all() and ((fitted.confidence_ >= 0) & (fitted.confidence_ <= 1)).all()
    assert (fitted.predict(digits[0]) == fitted.transduction_).mean() > 0.95
    assert (fitted.transduction_[labels >= 0] == labels[labels >= 0]).mean() > 0.95


def test_label_propagation_is_that_of_graph(digits):
    pixels, _, labels = digits
    affinity = graph.knn_graph(torch.from_numpy(pixels), 50, gamma=3.0)
    scores = graph.label_propagation(affinity, torch.from_numpy(labels), rtol=1e-10)
    np.testing.assert_array_equal(LabelPropagation(rtol=1e-10).fit(pixels, labels).transduction_, scores.argmax(dim=1))


def test_mixed_label_propagation_is_that_of_graph(digits):
    pixels, _, labels = digits
    settings = {
        "beta": 0.5,
        "logit_scale": 2.0,
        "mu": 0.02,
        "mu_unlabeled": 0.001,
        "balance": False,
        "rtol": 1e-8,
        "max_iter": 500,
    }
    affinity = graph.knn_graph(torch.from_numpy(pixels), 20, gamma=2.0)
    expected = graph.mixed_label_propagation(affinity, torch.from_numpy(labels), **settings)
    fitted = MixedLabelPropagation(20, gamma=2.0, **settings).fit(pixels, labels)
    np.testing.assert_array_equal(fitted.transduction_, expected.pseudo_labels)
    np.testing.assert_allclose(fitted.label_distributions_, expected.probs, atol=1e-8)
    np.testing.assert_allclose(fitted.confidence_, expected.confidence, atol=1e-6)
    assert fitted.n_iter_ == int(expected.iterations.max())


@BOTH
def test_kinds_of_labels(estimator, digits):
    pixels, _, labels = digits
    pixels, labels = pixels[:507], labels[:507].copy()
    labels[:20] = digits[1][:20]
    expected = clone(estimator).fit(pixels, labels)
    names = np.array([f"digit {c}" for c in range(10)], dtype=object)
    mixed = np.where(labels < 0, -1, names[labels])
    for y, classes in (
        (labels.astype(float), np.arange(10.0)),
        (labels.tolist(), np.arange(10)),
        (labels.astype(object), np.arange(10)),
        (np.where(labels < 0, -1, 7 * labels), 7 * np.arange(10)),
        (mixed, names),
    ):
        fitted = clone(estimator).fit(pixels, y)
        np.testing.assert_array_equal(fitted.classes_, classes)
        np.testing.assert_array_equal(fitted.transduction_, classes[expected.transduction_])
        np.testing.assert_array_equal(fitted.predict(pixels[:17]), classes[expected.predict(pixels[:17])])


@BOTH
def test_missing_labels_are_unlabelled(estimator, digits):
    """Columns of strings, and of integers in pandas, hold no -1: a missing value marks the point there."""
    pandas = pytest.importorskip("pandas")
    pixels, _, labels = digits
    pixels, labels = pixels[:507], labels[:507].copy()
    labels[:20] = digits[1][:20]
    expected = clone(estimator).fit(pixels, labels).transduction_
    names = np.array([f"digit {c}" for c in range(10)])
    for missing in (None, np.nan, pandas.NA):
        y = np.array([missing if c < 0 else names[c] for c in labels], dtype=object)
        for column in (y, *(pandas.Series(y, dtype=dtype) for dtype in (object, "string", "category"))):
            np.testing.assert_array_equal(clone(estimator).fit(pixels, column).transduction_, names[expected])
    whole = pandas.Series(labels, dtype="Int64").mask(labels < 0)
    np.testing.assert_array_equal(clone(estimator).fit(pixels, whole).transduction_, expected)


@BOTH
@pytest.mark.parametrize("make", [np.array, sparse.csr_array, sparse.csc_matrix, sparse.coo_array])
def test_precomputed_affinity(estimator, make, digits):
    """The graph of the cosines gives what the cosines give, in any order of the entries; and new points are judged
    by their weights.
    """
    pixels, truth, labels = digits
    expected = clone(estimator).set_params(n_neighbors=20).fit(pixels, labels)
    weights = graph.knn_graph(pixels, 20).to_scipy().toarray()
    fitted = clone(estimator).set_params(affinity="precomputed").fit(make(weights), labels)
    np.testing.assert_array_equal(fitted.transduction_, expected.transduction_)
    np.testing.assert_allclose(fitted.label_distributions_, expected.label_distributions_, atol=1e-7)
    assert fitted.n_features_in_ == len(truth)
    new = make(weights[:29] * (np.arange(29) > 0)[:, None])
    by_hand = weights[1:29] @ fitted.label_distributions_ / weights[1:29].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(fitted.predict_proba(new)[1:], by_hand)
    np.testing.assert_allclose(fitted.predict_proba(new)[0], np.full(10, 0.1))  # five labels of each class


@BOTH
def test_a_graph_and_kernels_with_a_diagonal_are_precomputed_affinities(estimator, digits):
    """A loop changes nothing: kernels have 1 on the diagonal, however small their other values are."""
    pixels, _, labels = digits
    weights = graph.knn_graph(pixels, 20)
    model = clone(estimator).set_params(affinity="precomputed")
    expected = clone(model).fit(weights.to_scipy(), labels).label_distributions_
    with_loops = weights.to_scipy() + sparse.eye_array(weights.num_nodes)
    for X in (weights, with_loops, with_loops.toarray(), graph.Graph.from_scipy(with_loops)):
        np.testing.assert_array_equal(clone(model).fit(X, labels).label_distributions_, expected)
    with pytest.raises(ValueError, match="X is a Graph, which needs affinity='precomputed', got 'cosine'"):
        clone(estimator).fit(weights, labels)


@BOTH
def test_precomputed_affinity_is_split_both_ways(estimator, digits):
    """By scikit-learn's cross validation, as the tag of pairwise input asks."""
    pixels, truth, _ = digits
    weights = graph.knn_graph(pixels[:300], 20).to_scipy().toarray()
    assert cross_val_score(clone(estimator).set_params(affinity="precomputed"), weights, truth[:300], cv=3).mean() > 0.8


@BOTH
@pytest.mark.parametrize(
    ("message", "X"),
    [
        ("X is no precomputed affinity: matrix must be square", np.ones((4, 3))),
        ("X is no precomputed affinity: weight must be symmetric", np.eye(4) + np.triu(np.ones((4, 4))) + 1),
        ("X is no precomputed affinity: it has weights below 0", np.ones((4, 4)) - 3 * np.eye(4)),
    ],
)
def test_no_precomputed_affinity(estimator, message, X):
    with pytest.raises(ValueError, match=message):
        clone(estimator).set_params(affinity="precomputed").fit(X, [0, 1, -1, -1])


@BOTH
@pytest.mark.parametrize("make", [sparse.csr_array, sparse.csc_matrix, sparse.coo_array])
def test_sparse_points(estimator, make, digits):
    pixels, _, labels = digits
    expected, fitted = (clone(estimator).set_params(n_neighbors=20).fit(X, labels) for X in (pixels, make(pixels)))
    np.testing.assert_array_equal(fitted.transduction_, expected.transduction_)
    np.testing.assert_allclose(fitted.label_distributions_, expected.label_distributions_, atol=1e-7)
    for new in (pixels[:29], make(pixels[:29])):
        np.testing.assert_allclose(fitted.predict_proba(new), expected.predict_proba(pixels[:29]), atol=1e-7)


@BOTH
def test_unconverged_fit_warns_once_as_scikit_learn_does(estimator, digits):
    pixels, _, labels = digits
    with pytest.warns(ConvergenceWarning) as caught:
        clone(estimator).set_params(max_iter=2).fit(pixels, labels)
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    assert (
        message.startswith(f"{type(estimator).__name__} did not converge to rtol = 1e-08") and "float64" not in message
    )


@BOTH
def test_numpy_scalars(estimator):
    points, _, labels = arcs()
    plain = clone(estimator).set_params(n_neighbors=5, gamma=2, mu=0.5, mu_unlabeled=0.25, rtol=0.0625, max_iter=50)
    numpy = {
        "n_neighbors": np.int64(5),
        "gamma": np.float32(2),
        "mu": np.float32(0.5),
        "mu_unlabeled": np.float64(0.25),
    }
    fitted = clone(estimator).set_params(**numpy, rtol=np.float32(0.0625), max_iter=np.int16(50))
    np.testing.assert_array_equal(
        fitted.fit(points, labels).label_distributions_, plain.fit(points, labels).label_distributions_
    )


@BOTH
def test_nothing_unlabelled(estimator, digits):
    pixels, truth, _ = digits
    fitted = clone(estimator).set_params(n_neighbors=10).fit(pixels[:600], truth[:600])
    assert (fitted.transduction_ == truth[:600]).mean() > 0.92
    assert fitted.score(pixels[600:], truth[600:]) > 0.85


@BOTH
def test_points_that_no_label_reaches(estimator):
    points, truth, labels = arcs()
    fitted = clone(estimator).set_params(n_neighbors=5).fit(points, labels)
    np.testing.assert_array_equal(fitted.transduction_[truth < 2], truth[truth < 2])
    # Two labels of 0, one of 1
    np.testing.assert_allclose(fitted.label_distributions_[truth == 2], np.tile([2 / 3, 1 / 3], (20, 1)))
    np.testing.assert_array_equal(fitted.transduction_[truth == 2], 0)
    np.testing.assert_array_equal(fitted.confidence_[truth == 2], 0)
    np.testing.assert_allclose(
        fitted.predict_proba([[0, 0, 3.0], [0, 0, 0], [-1, -1, -1]]), np.tile([2 / 3, 1 / 3], (3, 1))
    )


def test_prediction_is_the_weighted_mean_over_the_nearest(fitted, digits):
    pixels = digits[0]
    new = np.random.default_rng(1).permutation(pixels.ravel())[: 23 * 64].reshape(23, 64)
    cosine = (new / np.linalg.norm(new, axis=1, keepdims=True)) @ (
        pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    ).T
    for i, row in enumerate(cosine):
        nearest = np.argsort(-row)[:50]
        expected = np.average(fitted.label_distributions_[nearest], axis=0, weights=row[nearest] ** 3)
        np.testing.assert_allclose(fitted.predict_proba(new[i : i + 1])[0], expected, rtol=1e-9)


def test_chunks_change_no_prediction(fitted, digits, monkeypatch):
    expected = fitted.predict_proba(digits[0][:123])
    monkeypatch.setattr(estimators, "_CHUNK_ENTRIES", 17 * 1797)
    np.testing.assert_allclose(fitted.predict_proba(digits[0][:123]), expected, rtol=1e-9)


@BOTH
def test_equally_near_points_all_count(estimator):
    """Four times each point; a product of matrices rounds their cosines differently, and which of them were first
    must not matter.
    """
    points, _, labels = arcs(seed=3)
    points, labels = np.tile(points, (4, 1)), np.concatenate([labels, np.full(180, -1)])
    fitted = clone(estimator).set_params(n_neighbors=7).fit(points, labels)
    together = fitted.predict_proba(points)
    apart = np.concatenate([fitted.predict_proba(point[None]) for point in points])
    np.testing.assert_allclose(together, apart, rtol=1e-9)
    np.testing.assert_allclose(together[:60], together[60:120], rtol=1e-9)


@BOTH
def test_scale_of_points_and_small_sets(estimator):
    points, truth, labels = arcs()
    fitted = clone(estimator).fit(points, labels)  # 50 neighbours of 60
    for scale in (1e-200, 1e200):
        scaled = clone(estimator).fit(scale * points, labels)
        np.testing.assert_allclose(scaled.label_distributions_, fitted.label_distributions_, rtol=1e-6)
        np.testing.assert_allclose(scaled.predict_proba(points), fitted.predict_proba(points), rtol=1e-6)
    few = clone(estimator).fit(points[:4], truth[[0, 1, 0, 1]])  # 50 neighbours of 4
    assert few.label_distributions_.shape == (4, 2)


@BOTH
def test_within_scikit_learn(estimator, digits):
    pixels, truth, labels = digits
    pipeline = make_pipeline(MinMaxScaler(), clone(estimator)).fit(pixels[:800], labels[:800])
    assert pipeline.score(pixels[800:], truth[800:]) > 0.5
    search = GridSearchCV(clone(estimator), {"n_neighbors": [5, 20]}, cv=2).fit(pixels[:300], truth[:300])
    assert search.best_score_ > 0.8
    copy = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(copy.predict_proba(pixels[:17]), search.best_estimator_.predict_proba(pixels[:17]))


@BOTH
@pytest.mark.parametrize(
    ("error", "message", "parameters"),
    [
        (TypeError, "n_neighbors should be an integer, got 2.5", {"n_neighbors": 2.5}),
        (ValueError, "n_neighbors should be at least 1, got 0", {"n_neighbors": 0}),
        (ValueError, "gamma", {"gamma": -1.0}),
        (ValueError, "mu", {"mu": 0.0}),
        (ValueError, "mu_unlabeled", {"mu_unlabeled": -1.0}),
        (ValueError, "rtol", {"rtol": 0.0}),
        (ValueError, "max_iter", {"max_iter": 0}),
        (ValueError, "affinity should be 'cosine' or 'precomputed', got 'rbf'", {"affinity": "rbf"}),
        (TypeError, "mu", {"mu": "x"}),
        (TypeError, "gamma", {"gamma": None}),
    ],
)
def test_parameters_refused(estimator, error, message, parameters):
    points, _, labels = arcs()
    with pytest.raises(error, match=message):
        clone(estimator).set_params(**parameters).fit(points, labels)


@pytest.mark.parametrize(("message", "parameters"), [("beta", {"beta": -1.0}), ("logit_scale", {"logit_scale": 0.0})])
def test_parameters_of_mixed_label_propagation_refused(message, parameters):
    points, _, labels = arcs()
    with pytest.raises(ValueError, match=message):
        MixedLabelPropagation(**parameters).fit(points, labels)


@BOTH
@pytest.mark.parametrize(
    ("message", "labels"),
    [
        ("y should have labels of at least 2 classes, but all of it is -1", [-1] * 4),
        ("y should have labels of at least 2 classes, got 1 class", [3, -1, -1, 3]),
        ("y is of strings and holds '-1'; y should be of dtype object", np.array(["a", "b", "-1", "a"])),
        ("Unknown label type", [0.5, 1.25, -1, 2]),
        ("y is of strings and holds '-1'", ["a", -1, "b", "a"]),  # an array of strings, to numpy
        ("y is of strings and holds '-1'", np.array(["a", "-1", "b", -1], dtype=object)),
        (
            "y should have labels that are all strings or all numbers, got both",
            np.array(["a", 1, -1, "b"], dtype=object),
        ),
        ("inconsistent numbers of samples", [0, 1]),
    ],
)
def test_labels_refused(estimator, message, labels):
    with pytest.raises(ValueError, match=message):
        clone(estimator).fit(np.eye(4) + 0.1, labels)


@BOTH
def test_one_label_per_class_is_no_regression(estimator, recwarn):
    """scikit-learn suspects one where most labels differ."""
    points, _, _ = arcs()
    clone(estimator).fit(points, [*range(30), *[-1] * 30])
    assert not [warning for warning in recwarn if "unique classes" in str(warning.message)]


def test_message_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "ssmkernels.estimators")
    with pytest.raises(ImportError, match=r"needs scikit-learn 1\.6 or newer: pip install scikit-learn"):
        importlib.import_module("ssmkernels.estimators")


@pytest.mark.parametrize("estimator", [LabelPropagation, MixedLabelPropagation])
@pytest.mark.parametrize("affinity", ["cosine", "precomputed"])
def test_gamma_is_checked_whether_it_is_used_or_not(estimator, affinity):
    with pytest.raises(ValueError, match="gamma"):
        estimator(affinity=affinity, gamma=float("nan")).fit(np.eye(3), [0, 1, -1])


def test_gamma_of_any_numpy_type():
    fitted = LabelPropagation(2, gamma=np.uint64(2)).fit(np.eye(3) + 0.5, [0, 1, -1])
    assert np.isfinite(fitted.predict_proba(np.eye(3) + 0.25)).all()

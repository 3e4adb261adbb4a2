# SPDX-License-Identifier: BSD-3-Clause
import copy
import math

import pytest
import torch

from ssmkernels.nn import FeatureBasis

N, DIM, BASIS = 7, 5, 4


def make(dtype=torch.float64):
    torch.manual_seed(0)
    basis = FeatureBasis(DIM, BASIS).to(dtype)
    return basis, torch.randn(N, DIM, dtype=dtype, requires_grad=True), torch.tensor([0, 3, 1, 1, 2, 0, 3])


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))


def test_measures_features_on_the_rows_of_the_weight():
    basis, features, _ = make()
    for feature, measured in zip(features.tolist(), basis(features).tolist(), strict=True):
        for vector, value in zip(basis.weight.tolist(), measured, strict=True):
            assert value == pytest.approx(sum(a * b for a, b in zip(vector, feature, strict=True)), rel=1e-12)
    assert [name for name, _ in basis.named_parameters()] == ["weight"]


def test_cross_entropy_is_the_literal_loop():
    basis, features, labels = make()
    total = 0.0
    for scores, label in zip(basis(features).tolist(), labels.tolist(), strict=True):
        total += math.log(sum(math.exp(score) for score in scores)) - scores[label]
    assert basis.cross_entropy(features, labels).item() == pytest.approx(total / N, rel=1e-12)


def test_similarities_are_cosines_on_the_basis():
    basis, features, _ = make()
    references = torch.randn(3, DIM, dtype=torch.float64)
    measured, others = basis(features).tolist(), basis(references).tolist()
    expected = [[cosine(x, y) for y in measured] for x in measured]
    torch.testing.assert_close(basis.similarities(features), torch.tensor(expected, dtype=torch.float64))
    expected = [[cosine(x, y) for y in others] for x in measured]
    torch.testing.assert_close(basis.similarities(features, references), torch.tensor(expected, dtype=torch.float64))


def test_gradients():
    basis, features, labels = make()
    weight = basis.weight.detach().clone().requires_grad_()

    def of(method):
        def run(f, w):
            basis_of_w = copy.deepcopy(basis)
            del basis_of_w.weight
            basis_of_w.weight = w
            return getattr(basis_of_w, method)(f, *([labels] if method == "cross_entropy" else []))

        return run

    for method in ("forward", "cross_entropy", "similarities"):
        assert torch.autograd.gradcheck(of(method), (features, weight))


def test_zero_features_and_empty_batches():
    basis, features, labels = make()
    similarities = basis.similarities(torch.cat([features.detach(), torch.zeros(1, DIM, dtype=torch.float64)]))
    assert (similarities[-1] == 0).all()
    empty = basis.cross_entropy(features[:0], labels[:0])
    empty.backward()
    assert empty == 0
    assert (basis.weight.grad == 0).all()
    assert basis.similarities(features[:0]).shape == (0, 0)


def test_starts_as_a_linear_layer_and_keeps_its_state():
    torch.manual_seed(0)
    weight = FeatureBasis(100, 400).weight
    assert weight.abs().max() <= 0.1
    assert weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)
    basis, features, _ = make()
    other = FeatureBasis(DIM, BASIS).double()
    other.load_state_dict(basis.state_dict())
    assert torch.equal(other(features), basis(features))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b, f, y: b(f[0]), ValueError, r"features must be \[n, d\], got shape \[5\]"),
        (lambda b, f, y: b(f[:, 1:]), ValueError, "features must have in_features = 5 in dimension 1"),
        (lambda b, f, y: b(f.float()), TypeError, "features is torch.float32 but weight is torch.float64"),
        (lambda b, f, y: b.similarities(f, f[:, 1:]), ValueError, "references must have in_features = 5"),
        (lambda b, f, y: b.cross_entropy(f, y.float()), TypeError, "labels must be int64"),
        (lambda b, f, y: b.cross_entropy(f, y[1:]), ValueError, "labels must have n of features = 7"),
        (
            lambda b, f, y: b.cross_entropy(f, y + 1),
            ValueError,
            r"labels must be in \[0, 4\), num_basis; got values from 1 to 4",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(*make())

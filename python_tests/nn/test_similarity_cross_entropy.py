# SPDX-License-Identifier: BSD-3-Clause
import copy
import math

import pytest
import torch

from ssmkernels.nn import GlobalCrossEntropy, LocalCrossEntropy, SimilarityDistributionLoss

MOMENTS = ("positive_mean", "positive_var", "negative_mean", "negative_var")
N, BASIS, CLUSTERS = 9, 4, 6


def batch(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(N, BASIS, generator=generator, dtype=torch.float64)
    return features.to(dtype), torch.randint(0, CLUSTERS, (N,), generator=generator)


def make_local(**settings):
    return LocalCrossEntropy(**settings)


def make_global(**settings):
    torch.manual_seed(0)
    return GlobalCrossEntropy(BASIS, CLUSTERS, **settings)


BOTH = pytest.mark.parametrize("make", [make_local, make_global])


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))


def test_local_is_the_literal_loop():
    features, labels = batch()
    parts = {True: [], False: []}
    for i, x in enumerate(features.tolist()):
        for j, y in enumerate(features.tolist()):
            if i != j:
                same = bool(labels[i] == labels[j])
                probability = 1 / (1 + math.exp(-3.0 * cosine(x, y)))
                parts[same].append(-math.log(probability if same else 1 - probability))
    expected = sum(sum(losses) / len(losses) for losses in parts.values())
    assert make_local(scale=3.0)(features, labels).item() == pytest.approx(expected, rel=1e-12)


def test_global_is_the_literal_loop():
    features, labels = batch()
    loss = make_global(scale=3.0)
    total = 0.0
    for x, label in zip(features.tolist(), labels.tolist(), strict=True):
        logits = [3.0 * cosine(x, prototype) for prototype in loss.prototypes.tolist()]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
    assert loss(features, labels).item() == pytest.approx(total / N, rel=1e-12)


@BOTH
def test_moments_are_those_of_the_similarity_distribution_loss(make):
    loss, other = make(momentum=0.8), SimilarityDistributionLoss(momentum=0.8)
    for step in range(3):
        features, labels = batch(step, torch.float32)
        loss(features.requires_grad_(), labels).backward()
        other(features, labels)
    for name in MOMENTS:
        assert torch.equal(getattr(loss, name), getattr(other, name))
        assert not getattr(loss, name).requires_grad
    state = copy.deepcopy(loss.state_dict())
    loss.eval()(*batch(4, torch.float32))
    assert all(torch.equal(loss.state_dict()[name], value) for name, value in state.items())


def test_gradients():
    features, labels = batch()
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: make_local(scale=2.0)(f, labels), features)
    loss = make_global(scale=2.0).double()
    prototypes = loss.prototypes.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, p: torch.func.functional_call(loss, {"prototypes": p}, (f, labels)),
        (features, prototypes),
    )


def test_only_global_has_something_to_learn():
    assert not list(make_local().parameters())
    learnt = {name: tuple(parameter.shape) for name, parameter in make_global().named_parameters()}
    assert learnt == {"prototypes": (CLUSTERS, BASIS)}


@BOTH
@pytest.mark.parametrize("labels", [[], [2], [3] * N, [0, 1, 2, 3, 4, 5]])
def test_batches_that_lack_a_kind_of_pair(make, labels):
    features = batch()[0][: len(labels)].requires_grad_()
    value = make(scale=1e4)(features, torch.tensor(labels, dtype=torch.int64))
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all()
    if len(labels) == 0 or (make is make_local and len(labels) == 1):
        assert value == 0


@BOTH
def test_bad_input(make):
    features, labels = batch()
    with pytest.raises(ValueError, match=r"basis_features must be \[n, k\]"):
        make()(features[0], labels)
    with pytest.raises(TypeError, match="labels must be int64"):
        make()(features, labels.int())
    with pytest.raises(ValueError, match=r"scale must be in \[1e-18, 1e\+18\], got 0"):
        make(scale=0)
    with pytest.raises(ValueError, match="momentum must be below 1"):
        make(momentum=1)


def test_bad_input_of_global():
    features, labels = batch()
    with pytest.raises(ValueError, match="basis_features must have num_basis = 4 in dimension 1"):
        make_global()(features[:, 1:], labels)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 6\), num_clusters"):
        make_global()(features, labels + CLUSTERS)
    with pytest.raises(ValueError, match="num_clusters must be at least 1"):
        GlobalCrossEntropy(3, 0)


def test_logits_past_20_keep_the_accuracy_of_float64():
    # Two opposite rows of one class: a pair of cosine -1, softplus(σ) = σ + log(1 + e^-σ).
    rows = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    loss = LocalCrossEntropy(scale=20.5).double()(rows, torch.zeros(2, dtype=torch.int64))
    assert abs(float(loss) - (20.5 + math.log1p(math.exp(-20.5)))) <= 4 * torch.finfo(torch.float64).eps * 20.5

# SPDX-License-Identifier: BSD-3-Clause
import copy

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor

from ssmkernels.nn import SimilarityDistributionLoss

MOMENTS = ("positive_mean", "positive_var", "negative_mean", "negative_var")
N, BASIS = 12, 5


def batch(seed=0, kind="both", n=N, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = {
        "both": torch.arange(n) % 3 - 1,
        "no positives": torch.randperm(n, generator=generator),
        "no negatives": torch.full((n,), 9),
    }[kind]
    centers = torch.randn(100, BASIS, generator=generator, dtype=torch.float64)
    return (centers[labels] + torch.randn(n, BASIS, generator=generator, dtype=torch.float64)).to(dtype), labels


def literal_moments(features, labels):
    similarities = {True: [], False: []}
    units = F.normalize(features)
    for i in range(len(units)):
        for j in range(len(units)):
            if i != j:
                similarities[bool(labels[i] == labels[j])].append(units[i] @ units[j])
    moments = {}
    for side, same in (("positive", True), ("negative", False)):
        if similarities[same]:
            values = torch.stack(similarities[same])
            moments[f"{side}_mean"], moments[f"{side}_var"] = values.mean(), values.var(correction=0)
    return moments


def loss_of(moments, margin, variance_weight):
    gap = (moments["negative_mean"] - moments["positive_mean"] + margin).clamp_min(0)
    return gap + variance_weight * (moments["positive_var"] + moments["negative_var"])


@pytest.mark.parametrize("gradient", ["batch", "momentum"])
def test_follows_equations_5_and_6(gradient):
    loss = SimilarityDistributionLoss(0.4, 0.7, 0.9, gradient).double()
    running = {name: torch.zeros(()) for name in MOMENTS}
    seen = set()
    for step, kind in enumerate(["no negatives", "both", "no positives", "both", "no negatives", "both"]):
        features, labels = batch(step, kind)
        of_batch = literal_moments(features, labels)
        for name, value in of_batch.items():
            running[name] = 0.1 * value + 0.9 * running[name] if name in seen else value
        seen |= of_batch.keys()
        torch.testing.assert_close(
            loss(features, labels),
            loss_of(running, 0.4, 0.7),
            rtol=1e-12,
            atol=1e-12,
            check_dtype=False,
        )
        for name in MOMENTS:
            torch.testing.assert_close(getattr(loss, name), running[name], rtol=1e-12, atol=1e-12, check_dtype=False)


def gradients(gradient, first, second, momentum=0.99):
    loss = SimilarityDistributionLoss(0.5, 1.0, momentum, gradient).double()
    for features, labels in (first, second):
        leaf = features.clone().requires_grad_()
        value = loss(leaf, labels)
        yield value, torch.autograd.grad(value, leaf)[0]


def test_the_gradient_of_momentum_is_that_of_equation_6_and_a_hundredth_of_that_of_batch():
    first, second = batch(0), batch(1)
    kept = literal_moments(*first)
    leaf = second[0].clone().requires_grad_()
    of_batch = literal_moments(leaf, second[1])
    literal = loss_of({name: 0.01 * of_batch[name] + 0.99 * kept[name] for name in MOMENTS}, 0.5, 1.0)
    (expected,) = torch.autograd.grad(literal, leaf)

    (_, momentum_first), (momentum_value, momentum_second) = gradients("momentum", first, second)
    (_, batch_first), (batch_value, batch_second) = gradients("batch", first, second)
    torch.testing.assert_close(momentum_second, expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(batch_second, 100 * expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(batch_value, momentum_value, rtol=1e-14, atol=0)
    torch.testing.assert_close(batch_first, momentum_first, rtol=1e-12, atol=1e-14)  # nothing is averaged yet
    assert batch_second.abs().max() > 1e-3


@pytest.mark.parametrize("gradient", ["batch", "momentum"])
def test_the_running_means_open_and_close_the_hinge(gradient):
    spread = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 1]]
    apart, labels = spread + 0.1 * batch(5, n=4)[0][:, :4], torch.tensor([0, 0, 1, 1])
    crossed = apart[[0, 2, 1, 3]]  # the same features under labels that they contradict
    for history, now, is_open in ((apart, crossed, False), (crossed, apart, True)):
        loss = SimilarityDistributionLoss(0.3, 0.0, 0.99, gradient).double()
        loss(history, labels)
        leaf = now.clone().requires_grad_()
        value = loss(leaf, labels)
        value.backward()
        assert (value > 0) == is_open
        assert (leaf.grad.abs().max() > 0) == is_open


@pytest.mark.parametrize(("gradient", "share"), [("batch", 1.0), ("momentum", 0.01)])
@pytest.mark.parametrize(("missing", "present", "sign"), [("positive", "negative", 1), ("negative", "positive", -1)])
def test_a_side_without_pairs_keeps_its_moments_and_has_no_gradient(missing, present, sign, gradient, share):
    loss = SimilarityDistributionLoss(margin=2.0, gradient=gradient).double()  # the hinge is always open
    loss(*batch(0))
    before = {name: getattr(loss, name).clone() for name in MOMENTS}
    features, labels = batch(1, f"no {missing}s")
    features.requires_grad_()
    loss(features, labels).backward()
    for name in MOMENTS:
        assert torch.equal(getattr(loss, name), before[name]) == name.startswith(missing)
    of_batch = literal_moments(features, labels)
    assert of_batch.keys() == {f"{present}_mean", f"{present}_var"}
    (expected,) = torch.autograd.grad(sign * of_batch[f"{present}_mean"] + of_batch[f"{present}_var"], features)
    torch.testing.assert_close(features.grad, share * expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_for_a_pair(rows):
    loss = SimilarityDistributionLoss(0.5)
    features = torch.randn(rows, BASIS, requires_grad=True)
    value = loss(features, torch.zeros(rows, dtype=torch.int64))
    value.backward()
    assert value == 0.5  # all four moments are still 0
    assert (features.grad == 0).all()
    assert not loss.positive_seen
    assert not loss.negative_seen


def test_eval_reads_without_writing():
    loss = SimilarityDistributionLoss().double()
    loss(*batch(0))
    state = copy.deepcopy(loss.state_dict())
    twin = copy.deepcopy(loss)
    assert torch.equal(loss.eval()(*batch(1)), twin(*batch(1)))
    assert all(torch.equal(loss.state_dict()[name], value) for name, value in state.items())
    assert not torch.equal(twin.positive_mean, loss.positive_mean)


def test_no_matrix_of_similarities_exists():
    features, labels = batch(0, n=300)
    with LargestTensor() as largest:
        SimilarityDistributionLoss().double()(features.requires_grad_(), labels).backward()
    assert largest.elements == features.numel()


def test_moments_have_no_graph_and_inputs_are_left_alone():
    loss = SimilarityDistributionLoss()
    features, labels = batch(0, dtype=torch.float32)
    before = features.clone(), labels.clone()
    for _ in range(2):
        leaf = features.requires_grad_()
        loss(leaf, labels).backward()  # twice: no step reaches back into the one before
    assert not any(getattr(loss, name).requires_grad for name in MOMENTS)
    assert torch.equal(features, before[0])
    assert torch.equal(labels, before[1])


def test_training_separates_the_two_distributions():
    torch.manual_seed(0)
    features, labels = torch.randn(24, 8), torch.arange(24) % 4
    weight = torch.eye(8, requires_grad=True)
    loss, optimizer = SimilarityDistributionLoss(momentum=0.9), torch.optim.Adam([weight], 0.02)
    for step in range(150):
        optimizer.zero_grad()
        loss(features @ weight.t(), labels).backward()
        optimizer.step()
        if step == 0:
            start = (loss.positive_mean - loss.negative_mean).item()
    assert (loss.positive_mean - loss.negative_mean).item() > start + 0.25


@pytest.mark.gpu
@pytest.mark.sanitizer
def test_does_not_synchronise_and_agrees_with_the_cpu():
    loss, on_device = SimilarityDistributionLoss(), SimilarityDistributionLoss().cuda()
    kinds = ("no positives", "both", "no negatives", "both")
    batches = [batch(step, kind, dtype=torch.float32) for step, kind in enumerate(kinds)]
    moved = [(features.cuda().requires_grad_(), labels.cuda()) for features, labels in batches]
    on_device.eval()(*moved[0])  # the first call may allocate
    on_device.train()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = [on_device(*arguments) for arguments in moved]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for value, (features, labels) in zip(values, batches, strict=True):
        torch.testing.assert_close(value.cpu(), loss(features, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"basis_features": torch.zeros(N)}, ValueError, r"basis_features must be \[n, k\], got shape \[12\]"),
        ({"basis_features": torch.zeros(N, 2, dtype=torch.int64)}, TypeError, "basis_features must be float32"),
        ({"labels": torch.zeros(N)}, TypeError, "labels must be int64"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "labels must have n of basis_features = 12 in dimension 0",
        ),
    ],
)
def test_bad_input(changed, error, message):
    features, labels = batch()
    loss = SimilarityDistributionLoss()
    with pytest.raises(error, match=message):
        loss(**{"basis_features": features, "labels": labels, **changed})
    assert not loss.positive_seen

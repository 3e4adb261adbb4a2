# SPDX-License-Identifier: BSD-3-Clause
"""What is particular to the ops of the ranking family; what every op must show is in test_contract.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, judge

from ssmkernels import ops, reference

SIZES = [(1, 4), (2, 1), (3, 5), (17, 16), (33, 3), (64, 40), (123, 64), (507, 17), (1001, 24)]  # n, d
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean_nonzero", "mean", "sum"]
LABELED, MINED, MOMENTS = (
    CASES[name] for name in ("pair_ranking_loss", "mined_pair_ranking_loss", "similarity_moments")
)
THRESHOLDS = {"positive_threshold": 0.35, "negative_threshold": -0.05}
MOMENT_GRADS = (0.7, -1.3, 0.4, 2.1)


class Problem:
    """Rows around the directions of their classes; values are drawn in float64 and rounded."""

    def __init__(self, n, d, dtype=torch.float64, device="cpu", seed=0, classes=5, references=None, unit=True):
        draw = torch.Generator().manual_seed(seed)
        directions = torch.randn(classes, d, generator=draw, dtype=torch.float64)

        def rows(count):
            labels = torch.randint(classes, (count,), generator=draw)
            values = directions[labels] + torch.randn(count, d, generator=draw, dtype=torch.float64)
            # Zero is nobody's distance in one dimension, where unit vectors are ±1.
            return (F.normalize(values) if unit and d > 1 else values).to(device, dtype), 3 * labels.to(device) - 4

        self.embeddings, self.labels = rows(n)
        self.references, self.reference_labels = (None, None) if references is None else rows(references)
        # Cosines of one-hot combinations: no pair is near a threshold, where rounding would move it.
        kinds = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, -1], [-1, 0, 0.5]], dtype=torch.float64)
        self.basis = (
            kinds[torch.randint(4, (n,), generator=draw)] * torch.rand(n, 1, generator=draw, dtype=torch.float64)
        ).to(device, dtype)

    def double(self):
        other = object.__new__(Problem)
        other.__dict__ = {
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in self.__dict__.items()
        }
        return other

    def loss(self, package, **options):
        """The loss by labels, and its gradients."""
        rows = [
            value.detach().clone().requires_grad_() for value in (self.embeddings, self.references) if value is not None
        ]
        if self.references is not None:
            options |= {"references": rows[1], "reference_labels": self.reference_labels}
        out = package.pair_ranking_loss(rows[0], self.labels, **options)
        return out.detach(), *torch.autograd.grad(out, rows)

    def mined(self, package, **options):
        rows = self.embeddings.detach().clone().requires_grad_()
        out = package.mined_pair_ranking_loss(rows, self.basis, **(THRESHOLDS | options))
        return out.detach(), *torch.autograd.grad(out, rows)

    def moments(self, package):
        rows = self.embeddings.detach().clone().requires_grad_()
        out = torch.stack(package.similarity_moments(rows, self.labels))
        return out.detach(), *torch.autograd.grad(out, rows, out.new_tensor(MOMENT_GRADS))


@pytest.mark.parametrize("metric", ["value", "gradient"])
def test_agrees_with_pytorch_metric_learning(metric, device):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    problem = Problem(90, 12, device=device)
    theirs, ours = (problem.embeddings.clone().requires_grad_() for _ in range(2))
    expected = losses.ContrastiveLoss(pos_margin=0.2, neg_margin=1.1)(theirs, problem.labels)
    loss = ops.pair_ranking_loss(ours, problem.labels, positive_margin=0.2, negative_margin=1.1)
    if metric == "value":
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    else:
        (a,), (b,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs)
        along = (b - b * problem.embeddings * problem.embeddings).norm()  # theirs comes back through a normalisation
        tangent = a - (a * problem.embeddings).sum(1, keepdim=True) * problem.embeddings
        torch.testing.assert_close(tangent, b, rtol=1e-8, atol=1e-10 * float(along))


def _zero(values):
    return not any(value.any() for value in values)


def test_no_positives_or_no_negatives(device):
    for reduction in REDUCTIONS:
        problem = Problem(40, 6, device=device)
        problem.labels = torch.arange(40, device=device)
        assert _zero(problem.loss(ops, reduction=reduction, negative_margin=0.0))
        problem.labels = problem.labels * 0
        assert _zero(problem.loss(ops, reduction=reduction, positive_margin=3.0))
        assert _zero(problem.mined(ops, reduction=reduction, positive_threshold=2.0, negative_threshold=-2.0))
        one_kind = problem.loss(ops, reduction=reduction)
        assert one_kind[0] > 0 and one_kind[1].any()
    moments, grad = problem.moments(ops)
    assert moments[:2].all() and not moments[2:].any() and grad.isfinite().all()


@pytest.mark.parametrize("n", [0, 1])
def test_no_pairs(n, device):
    problem = Problem(n, 6, device=device)
    for values in (problem.loss(ops), problem.mined(ops, positive_threshold=-1.0), problem.moments(ops)):
        assert values[1].shape == (n, 6) and _zero(values)
    against = Problem(n, 6, device=device, references=0)
    assert _zero(against.loss(ops))


@pytest.mark.parametrize("size", [(60, 40), (400, 24)], ids=str)
def test_moments_of_similar_features(size, device):
    """Variances of cosines near 1, which are the difference of two large sums."""
    for dtype in (torch.float64, torch.float32):
        problem = Problem(*size, dtype, device)
        problem.embeddings = F.normalize(1 + 0.3 * problem.embeddings)
        ours, exact = problem.moments(ops)[0].double(), problem.double().moments(reference)[0]
        torch.testing.assert_close(ours, exact, rtol=1e-8 if dtype == torch.float64 else 2e-3, atol=0)


def test_order_of_the_rows_does_not_matter(device):
    problem, shuffled = Problem(130, 10, device=device), Problem(130, 10, device=device)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1)).to(device)
    for name in ("embeddings", "labels", "basis"):
        setattr(shuffled, name, getattr(problem, name)[order])
    for call in (lambda p: p.loss(ops, negative_margin=1.2), lambda p: p.mined(ops), lambda p: p.moments(ops)):
        (value, grad), (other, other_grad) = call(problem), call(shuffled)
        torch.testing.assert_close(other, value, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(other_grad, grad[order], rtol=1e-10, atol=1e-13)


def test_references_equal_to_the_rows_count_each_row_with_itself(device):
    problem = Problem(60, 8, device=device)
    alone = problem.loss(ops, reduction="sum", negative_margin=1.2)
    problem.references, problem.reference_labels = problem.embeddings, problem.labels
    loss, left, right = problem.loss(ops, reduction="sum", negative_margin=1.2)
    torch.testing.assert_close(loss, alone[0], rtol=1e-11, atol=0)  # a row is at no distance of itself
    torch.testing.assert_close(left + right, alone[1], rtol=1e-10, atol=1e-12)


def _direct(problem):
    """Arguments of the operators below the checks: embeddings and references, in the order of their labels."""
    labels, order = problem.labels.sort(stable=True)
    reference_labels, reference_order = problem.reference_labels.sort(stable=True)
    return problem.embeddings, order, labels, problem.references, reference_order, reference_labels


def test_mixed_dtypes_are_promoted(device):
    """Such as a half embedding under autocast beside a float32 memory; each gradient has the dtype of its input."""
    problem = Problem(40, 8, torch.bfloat16, device, references=30)
    problem.references = problem.references.float()
    loss, grad, reference_grad = problem.loss(ops)
    assert (loss.dtype, grad.dtype, reference_grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    problem.basis = problem.basis.float()
    assert problem.mined(ops)[1].dtype == torch.bfloat16


def test_backward_under_another_instruction_set():
    """What the forward leaves for the backward has the same meaning in all of them."""
    from ssmkernels import _C

    chosen = _C.current_isa()
    problem = Problem(200, 20, torch.float32)
    expected = problem.loss(ops, negative_margin=1.2)[1]
    try:
        for forward, backward in (("baseline", chosen), (chosen, "baseline")):
            rows = problem.embeddings.clone().requires_grad_()
            _C.set_isa(forward)
            loss = ops.pair_ranking_loss(rows, problem.labels, negative_margin=1.2)
            _C.set_isa(backward)
            torch.testing.assert_close(torch.autograd.grad(loss, rows)[0], expected, rtol=1e-4, atol=1e-7)
    finally:
        _C.set_isa(chosen)


def test_operators_below_the_checks_do_not_read_out_of_bounds():
    problem = Problem(40, 6, torch.float32, references=20)
    rows, order, labels, references, reference_order, reference_labels = _direct(problem)
    with pytest.raises(RuntimeError, match=r"order must be a permutation of \[0, 40\)"):
        torch.ops.ssmkernels.pair_ranking_loss(rows, order + 1, labels, None, None, None, 0.0, 0.5, 0)
    with pytest.raises(RuntimeError, match=r"reference_order must be a permutation of \[0, 20\)"):
        torch.ops.ssmkernels.pair_ranking_loss(
            rows, order, labels, references, reference_order - 1, reference_labels, 0.0, 0.5, 0
        )
    with pytest.raises(RuntimeError, match=r"order must be a permutation of \[0, 40\)"):
        torch.ops.ssmkernels.similarity_moments(rows, order * 2, labels)
    weights, active = torch.ones(2), torch.ones(1, 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"active must be \[3, 3\]"):
        torch.ops.ssmkernels.pair_ranking_loss_backward(
            torch.tensor(1.0), rows, order, labels, *[None] * 3, 0.0, 0.5, weights, active
        )


def test_nan_at_every_margin(device):
    for dtype in (torch.float64, torch.float32):
        for place in (0, 33):
            problem = Problem(50, 6, dtype, device)
            problem.embeddings[place, 2] = torch.nan
            for margin in (0.5, 1.2):
                assert problem.loss(ops, negative_margin=margin)[0].isnan()
                assert problem.mined(ops, negative_margin=margin, negative_threshold=1.0)[0].isnan()
            assert problem.moments(ops)[0].isnan().any()


MARGINS = [(0.0, 0.5), (0.3, 1.4), (-0.2, 0.1), (1.0, 0.2), (0.0, 10.0), (2.5, 0.0)]


@pytest.mark.arithmetic
@pytest.mark.parametrize("margins", MARGINS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_margins(margins, reduction, device):
    options = dict(zip(("positive_margin", "negative_margin"), margins, strict=True)) | {"reduction": reduction}
    for others in (None, 50):
        judge(LABELED, LABELED.draw((70, 6), torch.float64, others=others, **options), device)
    judge(MINED, MINED.draw((70, 6), torch.float64, **options), device)


@pytest.mark.parametrize(
    "thresholds", [(2.0, -2.0), (-2.0, 2.0), (float("-inf"), float("-inf")), (1e300, -1e300), (0.1, 0.8)], ids=str
)
def test_thresholds(thresholds, device):
    """None mined; every pair mined as both; all positives; some as both. As numbers and as tensors."""
    numbers = dict(zip(("positive_threshold", "negative_threshold"), thresholds, strict=True))
    inputs = MINED.draw((80, 7), torch.float64, negative_margin=1.2, **numbers)
    expected = judge(MINED, inputs, device)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    results = judge(MINED, inputs | tensors, device)
    assert all(results[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_distance_zero(dtype, device):
    """Equal rows are at a distance of exactly 0, whose gradient is 0, whatever their length."""
    for scale in (1.0, 1e-3, 300.0):
        rows = scale * torch.ones(50, 9, dtype=dtype, device=device)
        labels = torch.arange(50, device=device) % 5
        rows.requires_grad_()
        loss = ops.pair_ranking_loss(rows, labels, positive_margin=0.0, negative_margin=0.5)
        assert loss == 0.5  # each negative pair has a loss of m_neg, no positive has one
        (grad,) = torch.autograd.grad(loss, rows)
        assert not grad.any()
    inputs = LABELED.draw((60, 8), dtype, negative_margin=1.2)
    inputs["embeddings"][1] = inputs["embeddings"][59] = inputs["embeddings"][0]
    inputs["labels"][1] = inputs["labels"][0]
    inputs["labels"][59] = inputs["labels"][0] + 1
    judge(LABELED, inputs, device)


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("case", [LABELED, MINED], ids=lambda case: case.name)
def test_collapsed_embeddings(case, spread, device):
    """Rows near one point, as an untrained network gives them: distances do not drown in |x|² + |y|² − 2 x·y."""
    inputs = case.draw((100, 16), torch.float32, positive_margin=0.1 * spread, negative_margin=0.8 * spread)
    inputs["embeddings"] = F.normalize(1 + spread * inputs["embeddings"])
    judge(case, inputs, device)


def test_tight_classes_far_apart(device):
    inputs = LABELED.draw((100, 16), torch.float32, negative_margin=1.5)
    centers = torch.eye(16)[(inputs["labels"] + 4) // 3]
    inputs["embeddings"] = F.normalize(centers + 1e-4 * inputs["embeddings"])
    judge(LABELED, inputs, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_long_rows(dtype, device):
    """Lengths of ±1e4 against margins of 1."""
    inputs = LABELED.draw((80, 12), dtype, negative_margin=4.0)
    inputs["embeddings"] = 1e4 + inputs["embeddings"]
    inputs["embeddings"][:3] = -1e4
    judge(LABELED, inputs, device)
    assert all(moment.isfinite() for moment in ops.similarity_moments(inputs["embeddings"], inputs["labels"]))


def test_rows_of_zeros_have_no_direction(device):
    inputs = MOMENTS.draw((50, 6), torch.float64)
    inputs["features"][[3, 7]] = 0
    assert not judge(MOMENTS, inputs, device)["grad features"][[3, 7]].any()
    inputs = MINED.draw((50, 6), torch.float64, negative_threshold=0.0)
    inputs["basis_features"][[3, 7]] = 0
    judge(MINED, inputs, device)

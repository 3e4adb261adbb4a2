# SPDX-License-Identifier: BSD-3-Clause
"""Every op of the ranking family against its reference, and everything else an op must show."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.library import opcheck

from ssmkernels import ops, reference

SIZES = [(1, 4), (2, 1), (3, 5), (17, 16), (33, 3), (64, 40), (123, 64), (507, 17), (1001, 24)]  # n, d
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean_nonzero", "mean", "sum"]
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
        self.basis = (kinds[torch.randint(4, (n,), generator=draw)] * torch.rand(n, 1, generator=draw, dtype=torch.float64)).to(
            device, dtype
        )

    def double(self):
        other = object.__new__(Problem)
        other.__dict__ = {
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in self.__dict__.items()
        }
        return other

    def loss(self, room, **options):
        """The loss by labels, and its gradients."""
        rows = [value.detach().clone().requires_grad_() for value in (self.embeddings, self.references) if value is not None]
        if self.references is not None:
            options |= {"references": rows[1], "reference_labels": self.reference_labels}
        out = room.pair_ranking_loss(rows[0], self.labels, **options)
        return out.detach(), *torch.autograd.grad(out, rows)

    def mined(self, room, **options):
        rows = self.embeddings.detach().clone().requires_grad_()
        out = room.mined_pair_ranking_loss(rows, self.basis, **(THRESHOLDS | options))
        return out.detach(), *torch.autograd.grad(out, rows)

    def moments(self, room):
        rows = self.embeddings.detach().clone().requires_grad_()
        out = torch.stack(room.similarity_moments(rows, self.labels))
        return out.detach(), *torch.autograd.grad(out, rows, out.new_tensor(MOMENT_GRADS))


def assert_no_worse(ours, same_dtype, exact, dtype):
    """The error against float64 is at most twice that of the reference in the same dtype, plus rounding."""
    eps = 1e-11 if dtype == torch.float64 else torch.finfo(dtype).eps
    for a, b, x in zip(ours, same_dtype, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == x.shape
        scale = max(1e-4, x.abs().max().item()) if x.numel() else 1.0
        error, allowed = ((y.double() - x).abs().max().item() if x.numel() else 0.0 for y in (a, b))
        assert error <= 2 * allowed + 8 * eps * scale, f"error {error:.2e}, the reference's {allowed:.2e}, scale {scale:.2e}"


def compare(problem, dtype, call):
    assert_no_worse(call(problem, ops), call(problem, reference), call(problem.double(), reference), dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_value_and_gradient(size, dtype, reduction, device):
    for negative_margin in (0.5, 1.3):
        options = {"reduction": reduction, "negative_margin": negative_margin}
        compare(Problem(*size, dtype, device), dtype, lambda p, room, o=options: p.loss(room, **o))
        compare(Problem(*size, dtype, device), dtype, lambda p, room, o=options: p.mined(room, **o))
        compare(Problem(*size, dtype, device, references=size[0] // 2 + 3), dtype, lambda p, room, o=options: p.loss(room, **o))


@pytest.mark.parametrize("classes", [1, 2, 40, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (300, 90), (600, 130)], ids=str)
def test_moments(size, dtype, classes, device):
    """From pairs of rows where they are few, from RᵀR where they are many, by class and in total."""
    compare(Problem(*size, dtype, device, classes=classes), dtype, lambda p, room: p.moments(room))


@pytest.mark.parametrize("margins", [(0.0, 0.5), (0.3, 1.4), (-0.2, -0.1), (1.0, 0.2), (0.0, 10.0), (2.5, 0.0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_margins(margins, reduction, device):
    options = dict(zip(("positive_margin", "negative_margin"), margins, strict=True)) | {"reduction": reduction}
    for references in (None, 50):
        problem = Problem(70, 6, device=device, references=references)
        compare(problem, torch.float64, lambda p, room: p.loss(room, **options))
    compare(problem, torch.float64, lambda p, room: p.mined(room, **options))


@pytest.mark.parametrize("thresholds", [(2.0, -2.0), (-2.0, 2.0), (float("-inf"), float("-inf")), (0.1, 0.8)], ids=str)
def test_thresholds(thresholds, device):
    """None mined; every pair mined as both; all positives; some as both. As numbers and as tensors."""
    numbers = dict(zip(("positive_threshold", "negative_threshold"), thresholds, strict=True))
    problem = Problem(80, 7, device=device)
    compare(problem, torch.float64, lambda p, room: p.mined(room, negative_margin=1.2, **numbers))
    tensors = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in numbers.items()}
    for a, b in zip(problem.mined(ops, **tensors), problem.mined(ops, **numbers), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("metric", ["value", "gradient"])
def test_agrees_with_pytorch_metric_learning(metric, device):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    problem = Problem(90, 12, device=device)
    theirs, ours = (problem.embeddings.clone().requires_grad_() for _ in range(2))
    expected = losses.ContrastiveLoss(pos_margin=0.2, neg_margin=1.1)(theirs, problem.labels)
    found = ops.pair_ranking_loss(ours, problem.labels, positive_margin=0.2, negative_margin=1.1)
    if metric == "value":
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    else:
        (a,), (b,) = torch.autograd.grad(found, ours), torch.autograd.grad(expected, theirs)
        along = (b - b * problem.embeddings * problem.embeddings).norm()  # theirs comes back through a normalisation
        tangent = a - (a * problem.embeddings).sum(1, keepdim=True) * problem.embeddings
        torch.testing.assert_close(tangent, b, rtol=1e-8, atol=1e-10 * float(along))


def _zero(values):
    return not any(each.any() for each in values)


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
    problem = Problem(60, 8, dtype, device)
    problem.embeddings[1] = problem.embeddings[59] = problem.embeddings[0]
    problem.labels[1] = problem.labels[0]
    problem.labels[59] = problem.labels[0] + 1
    compare(problem, dtype, lambda p, room: p.loss(room, negative_margin=1.2))


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-4])
def test_collapsed_embeddings(spread, device):
    """Rows near one point, as an untrained network gives them: distances do not drown in |x|² + |y|² − 2 x·y."""
    problem = Problem(100, 16, torch.float32, device, unit=False)
    problem.embeddings = F.normalize(1 + spread * problem.embeddings)
    margins = {"positive_margin": 0.1 * spread, "negative_margin": 0.8 * spread}
    compare(problem, torch.float32, lambda p, room: p.loss(room, **margins))
    compare(problem, torch.float32, lambda p, room: p.mined(room, **margins))


def test_tight_classes_far_apart(device):
    problem = Problem(100, 16, torch.float32, device)
    centers = torch.eye(16, device=device)[(problem.labels + 4) // 3]
    problem.embeddings = F.normalize(centers + 1e-4 * problem.embeddings)
    compare(problem, torch.float32, lambda p, room: p.loss(room, negative_margin=1.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_long_rows(dtype, device):
    """Lengths of ±1e4 against margins of 1."""
    problem = Problem(80, 12, dtype, device, unit=False)
    problem.embeddings = 1e4 + problem.embeddings
    problem.embeddings[:3] = -1e4
    compare(problem, dtype, lambda p, room: p.loss(room, negative_margin=4.0))
    assert all(each.isfinite().all() for each in problem.moments(ops))


@pytest.mark.parametrize("size", [(60, 40), (400, 24)], ids=str)
def test_moments_of_similar_features(size, device):
    """Variances of cosines near 1, which are the difference of two large sums."""
    for dtype in (torch.float64, torch.float32):
        problem = Problem(*size, dtype, device)
        problem.embeddings = F.normalize(1 + 0.3 * problem.embeddings)
        ours, exact = problem.moments(ops)[0].double(), problem.double().moments(reference)[0]
        torch.testing.assert_close(ours, exact, rtol=1e-8 if dtype == torch.float64 else 2e-3, atol=0)


def test_rows_of_zeros_have_no_direction(device):
    problem = Problem(50, 6, device=device)
    problem.embeddings[[3, 7]] = 0
    problem.basis[[3, 7]] = 0
    compare(problem, torch.float64, lambda p, room: p.moments(room))
    assert not problem.moments(ops)[1][[3, 7]].any()
    compare(problem, torch.float64, lambda p, room: p.mined(room, negative_threshold=0.0))


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


def test_non_contiguous(device):
    problem = Problem(37, 12, device=device, references=21)
    expected = (*problem.loss(ops), *problem.mined(ops), *problem.moments(ops))
    for name in ("embeddings", "references", "basis"):
        value = getattr(problem, name)
        setattr(problem, name, torch.stack([value, value], dim=-1)[..., 0])
    problem.labels = torch.stack([problem.labels] * 2, dim=1)[:, 0]
    ours = (*problem.loss(ops), *problem.mined(ops), *problem.moments(ops))
    assert all(a.equal(b) for a, b in zip(ours, expected, strict=True))


def test_gradcheck(device):
    problem = Problem(9, 3, device=device, references=5)
    rows, references = problem.embeddings.requires_grad_(), problem.references.requires_grad_()
    for reduction in REDUCTIONS:
        options = {"negative_margin": 1.3, "reduction": reduction}
        assert gradcheck(lambda x, o=options: ops.pair_ranking_loss(x, problem.labels, **o), rows)
        assert gradcheck(lambda x, o=options: ops.mined_pair_ranking_loss(x, problem.basis, **THRESHOLDS, **o), rows)
        assert gradcheck(
            lambda x, y, o=options: ops.pair_ranking_loss(x, problem.labels, references=y, reference_labels=problem.reference_labels, **o),
            (rows, references),
        )
    assert gradcheck(lambda x: tuple(ops.similarity_moments(x, problem.labels)), rows)
    many = Problem(20, 2, device=device)
    assert gradcheck(lambda x: tuple(ops.similarity_moments(x, many.labels)), many.embeddings.requires_grad_())


def test_only_first_derivatives_and_only_those_asked_for(device):
    problem = Problem(12, 4, device=device, references=7)
    references = problem.references.requires_grad_()
    ops.pair_ranking_loss(problem.embeddings, problem.labels, references=references, reference_labels=problem.reference_labels).backward()
    assert references.grad.any() and problem.embeddings.grad is None
    basis = problem.basis.requires_grad_()
    assert not ops.mined_pair_ranking_loss(problem.embeddings, basis, **THRESHOLDS).requires_grad
    rows = problem.embeddings.requires_grad_()
    (grad,) = torch.autograd.grad(ops.pair_ranking_loss(rows, problem.labels).square(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice|once_differentiable|does not require grad"):
        grad.sum().backward()


def _direct(problem):
    """Arguments of the operators below the checks: embeddings and references, in the order of their labels."""
    labels, order = problem.labels.sort(stable=True)
    reference_labels, reference_order = problem.reference_labels.sort(stable=True)
    return problem.embeddings, order, labels, problem.references, reference_order, reference_labels


def test_opcheck(device):
    library = torch.ops.ssmkernels
    problem = Problem(40, 6, torch.float32, device, references=70)
    rows, order, labels, references, *by_label = _direct(problem)
    rows.requires_grad_(), references.requires_grad_()
    thresholds = torch.tensor([0.3, -0.1], device=device)
    opcheck(library.pair_ranking_loss.default, (rows, order, labels, references, *by_label, 0.0, 1.2, 0))
    opcheck(library.pair_ranking_loss.default, (rows, order, labels, None, None, None, 0.0, 1.2, 1))
    opcheck(library.mined_pair_ranking_loss.default, (rows, problem.basis, thresholds, 0.0, 1.2, 0))
    opcheck(library.similarity_moments.default, (rows, order, labels))
    rows, references, grad = rows.detach(), references.detach(), torch.tensor(0.7, device=device)
    _, weights, active = library.pair_ranking_loss(rows, order, labels, references, *by_label, 0.0, 1.2, 0)
    opcheck(library.pair_ranking_loss_backward.default, (grad, rows, order, labels, references, *by_label, 0.0, 1.2, weights, active))
    _, weights, active = library.mined_pair_ranking_loss(rows, problem.basis, thresholds, 0.0, 1.2, 0)
    opcheck(library.mined_pair_ranking_loss_backward.default, (grad, rows, problem.basis, thresholds, 0.0, 1.2, weights, active))
    moments = library.similarity_moments(rows, order, labels)
    opcheck(library.similarity_moments_backward.default, (torch.ones_like(moments), rows, order, labels, moments))


def _step(embeddings, references, basis, labels, reference_labels):
    return (
        ops.pair_ranking_loss(embeddings, labels, negative_margin=1.2),
        ops.pair_ranking_loss(embeddings, labels, references=references, reference_labels=reference_labels, reduction="mean"),
        ops.mined_pair_ranking_loss(embeddings, basis, **THRESHOLDS),
        *ops.similarity_moments(embeddings, labels),
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile(dynamic, device):
    torch.compiler.reset()
    compiled = torch.compile(_step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, m in [(40, 21), (67, 35)]:
        results = []
        for function in (compiled, _step):
            problem = Problem(n, 6, torch.float32, device, references=m)
            rows, references = problem.embeddings.requires_grad_(), problem.references.requires_grad_()
            out = function(rows, references, problem.basis, problem.labels, problem.reference_labels)
            sum(out).backward()
            results.append((*out, rows.grad, references.grad))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)


def test_torch_compile_inductor(device):
    problem = Problem(40, 6, torch.float32, device, references=21)
    arguments = (problem.embeddings, problem.references, problem.basis, problem.labels, problem.reference_labels)
    for a, b in zip(torch.compile(_step, fullgraph=True)(*arguments), _step(*arguments), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_distances_alone(low, device):
    problem = Problem(50, 8, torch.float32, device)
    expected = (*problem.loss(ops), *problem.mined(ops), *problem.moments(ops))
    with torch.autocast(device, low):
        ours = (*problem.loss(ops), *problem.mined(ops), *problem.moments(ops))
    assert all(a.equal(b) for a, b in zip(ours, expected, strict=True))


def test_mixed_dtypes_are_promoted(device):
    """Such as a half embedding under autocast beside a float32 memory; each gradient has the dtype of its input."""
    problem = Problem(40, 8, torch.bfloat16, device, references=30)
    problem.references = problem.references.float()
    loss, grad, reference_grad = problem.loss(ops)
    assert (loss.dtype, grad.dtype, reference_grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    problem.basis = problem.basis.float()
    assert problem.mined(ops)[1].dtype == torch.bfloat16


def _everything(problem):
    values = [*problem.loss(ops, negative_margin=1.2), *problem.moments(ops)]
    return values if problem.references is not None else [*values, *problem.mined(ops, negative_margin=1.2, reduction="mean")]


def test_bits_do_not_depend_on_threads_or_run():
    threads = torch.get_num_threads()
    for rows, dim, references, classes in ((700, 50, None, 5), (700, 50, 210, 5), (700, 50, None, 1), (250, 100, None, 5)):
        problem = Problem(rows, dim, torch.float32, references=references, classes=classes)
        results = []
        try:
            for count in (1, 2, 3, 1):
                torch.set_num_threads(count)
                results.append(_everything(problem))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_bits_do_not_depend_on_the_run_on_a_gpu():
    for references in (None, 210):
        problem = Problem(700, 64, torch.float32, "cuda", references=references)
        first, second = _everything(problem), _everything(problem)
        assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_calls_from_several_threads():
    problem = Problem(150, 20, torch.float32)
    expected, seen = _everything(problem), []
    workers = [threading.Thread(target=lambda: seen.append(_everything(problem))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(seen) == 4 and all(a.equal(b) for out in seen for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    from ssmkernels import _C

    if isa not in _C.available_isas():
        pytest.skip(f"this processor has no {isa}")
    chosen = _C.current_isa()
    try:
        _C.set_isa(isa)
        for dtype in (torch.float64, torch.float32):
            for size in ((35, 70), (300, 33)):
                for margin in (0.6, 1.2):
                    options = {"negative_margin": margin}
                    compare(Problem(*size, dtype), dtype, lambda p, room, o=options: p.loss(room, **o))
                    compare(Problem(*size, dtype), dtype, lambda p, room, o=options: p.mined(room, **o))
                    compare(Problem(*size, dtype, references=50), dtype, lambda p, room, o=options: p.loss(room, **o))
                compare(Problem(*size, dtype), dtype, lambda p, room: p.moments(room))
    finally:
        _C.set_isa(chosen)


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


def test_inputs_are_not_written(device):
    problem = Problem(50, 16, torch.float32, device, references=30)
    names = ("embeddings", "references", "basis", "labels", "reference_labels")
    before = [getattr(problem, name).clone() for name in names]
    problem.loss(ops), problem.mined(ops), problem.moments(ops)
    assert all(getattr(problem, name).equal(b) for name, b in zip(names, before, strict=True))


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    problem = Problem(8192, 64, torch.float32, "cuda", classes=50)
    for call in (problem.loss, problem.mined, problem.moments):
        call(ops)
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(ops)
        extra = torch.cuda.max_memory_allocated() - base
        assert extra < 8192 * 8192 * 4 / 8, f"{extra} bytes: an eighth of an [n, n] matrix"


@pytest.mark.parametrize("op", ["loss", "mined", "moments"])
def test_peak_memory(op):
    """Peak resident memory of forward and backward stays far below an [n, n] matrix, of 256 MiB."""
    resource = pytest.importorskip("resource", reason="POSIX only")
    problem = Problem(8192, 64, torch.float32, classes=50)
    getattr(Problem(64, 64, torch.float32), op)(ops)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    getattr(problem, op)(ops)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert extra < 24 * 2**20, f"{extra / 2**20:.1f} MiB more"  # 2 MiB are one n·d


@pytest.mark.gpu
def test_cuda_graph():
    first, second = (Problem(100, 16, torch.float32, "cuda", seed=seed, references=70) for seed in (0, 1))
    rows, references = first.embeddings.requires_grad_(), first.references.requires_grad_()
    thresholds = {name: torch.tensor(value, device="cuda") for name, value in THRESHOLDS.items()}

    def step():
        loss = ops.pair_ranking_loss(rows, first.labels, references=references, reference_labels=first.reference_labels)
        loss = loss + ops.mined_pair_ranking_loss(rows, first.basis, **thresholds) + sum(ops.similarity_moments(rows, first.labels))
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    rows.grad = references.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        for name in ("embeddings", "references", "basis", "labels", "reference_labels"):
            getattr(first, name).copy_(getattr(second, name))
    rows.grad.zero_(), references.grad.zero_()
    graph.replay()
    got = loss.clone(), rows.grad.clone(), references.grad.clone()
    rows.grad = references.grad = None
    for ours, expected in zip(got, (step(), rows.grad, references.grad), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.gpu
def test_beyond_2_31_elements():
    """More than 2³¹ pairs, and as many elements of a float16 matrix."""
    rows = torch.zeros(65536, 3, device="cuda")
    rows[-1] = 1
    rows.requires_grad_()
    loss = ops.pair_ranking_loss(rows, torch.zeros(65536, dtype=torch.int64, device="cuda"), reduction="sum")
    loss.backward()
    torch.testing.assert_close(loss, 2 * 65535 * torch.tensor(3.0, device="cuda").sqrt(), rtol=1e-5, atol=0)
    assert rows.grad[-1].all() and rows.grad[0].all()
    long = torch.zeros(70_000, 32768, device="cuda", dtype=torch.float16)
    long[-1, -1] = long[0, -1] = 2
    labels = torch.arange(70_000, device="cuda")
    labels[-1] = 0
    assert ops.pair_ranking_loss(long, labels, negative_margin=0.0) == 0


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("references", [None, 40], ids=["alone", "references"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 5), (70, 33)], ids=str)
def test_small_set(size, dtype, references):
    """Every kernel once, at sizes that a sanitizer gets through."""
    cpu, gpu = (Problem(*size, dtype, device, references=references) for device in ("cpu", "cuda"))
    tolerance = 1e-10 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    for a, b in zip(_everything(cpu), _everything(gpu), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=tolerance, atol=tolerance * max(1, float(a.abs().max())))


@pytest.mark.gpu
@pytest.mark.parametrize("references", [None, 300], ids=["alone", "references"])
def test_device_parity(references):
    cpu, gpu = (Problem(1000, 100, device=device, references=references) for device in ("cpu", "cuda"))
    for a, b in zip(_everything(cpu), _everything(gpu), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-10, atol=1e-10 * max(1, float(a.abs().max())))


def _loss(problem, **changes):
    arguments = {"embeddings": problem.embeddings, "labels": problem.labels} | changes
    return ops.pair_ranking_loss(**arguments)


def _mined(problem, **changes):
    arguments = {"embeddings": problem.embeddings, "basis_features": problem.basis} | THRESHOLDS | changes
    return ops.mined_pair_ranking_loss(**arguments)


def _moments(problem, **changes):
    return ops.similarity_moments(**({"features": problem.embeddings, "labels": problem.labels} | changes))


BAD = [
    (_loss, lambda p: {"embeddings": p.embeddings[0]}, ValueError, r"embeddings must be \[n, d\], got shape \[6\]"),
    (_loss, lambda p: {"embeddings": [[1.0]]}, TypeError, r"embeddings must be a tensor \[n, d\], got list"),
    (_loss, lambda p: {"embeddings": p.labels[:, None]}, TypeError, r"embeddings must be float32, float64, bfloat16 or float16, got"),
    (_loss, lambda p: {"labels": p.labels[:4]}, ValueError, r"labels must have n of embeddings = 5 in dimension 0, got shape \[4\]"),
    (_loss, lambda p: {"labels": p.labels.int()}, TypeError, r"labels must be int64, got torch.int32"),
    (_loss, lambda p: {"labels": p.labels[None]}, ValueError, r"labels must be \[n\], got shape \[1, 5\]"),
    (_loss, lambda p: {"labels": [0] * 5}, TypeError, r"labels must be a tensor \[n\], got list"),
    (_loss, lambda p: {"labels": p.labels.to("meta")}, ValueError, r"labels is on meta but embeddings is on cpu"),
    (_loss, lambda p: {"reduction": "none"}, ValueError, r"reduction must be 'mean_nonzero', 'mean' or 'sum', got 'none'"),
    (_loss, lambda p: {"positive_margin": "0"}, TypeError, r"positive_margin must be a number, got str"),
    (_loss, lambda p: {"negative_margin": float("inf")}, ValueError, r"negative_margin must be finite and >= 0, got inf"),
    (_loss, lambda p: {"negative_margin": True}, TypeError, r"negative_margin must be a number, got bool"),
    (_loss, lambda p: {"references": p.embeddings}, ValueError, r"reference_labels must be given too"),
    (_loss, lambda p: {"reference_labels": p.labels}, ValueError, r"references must be given too"),
    (
        _loss,
        lambda p: {"references": p.embeddings[:, :3], "reference_labels": p.labels},
        ValueError,
        r"references must have d of embeddings = 6 in dimension 1, got shape \[5, 3\]",
    ),
    (
        _loss,
        lambda p: {"references": p.embeddings[:3], "reference_labels": p.labels},
        ValueError,
        r"reference_labels must have m of references = 3 in dimension 0, got shape \[5\]",
    ),
    (
        _loss,
        lambda p: {"references": p.embeddings.to("meta"), "reference_labels": p.labels},
        ValueError,
        r"references is on meta but embeddings is on cpu",
    ),
    (_mined, lambda p: {"embeddings": None}, TypeError, r"embeddings must be a tensor \[n, d\], got NoneType"),
    (_mined, lambda p: {"basis_features": p.basis[:2]}, ValueError, r"basis_features must have n of embeddings = 5 in dimension 0, got"),
    (_mined, lambda p: {"basis_features": p.basis[0]}, ValueError, r"basis_features must be \[n, k\], got shape \[3\]"),
    (_mined, lambda p: {"basis_features": p.basis.to("meta")}, ValueError, r"basis_features is on meta but embeddings is on cpu"),
    (_mined, lambda p: {"positive_threshold": None}, TypeError, r"positive_threshold must be a number or a scalar tensor, got NoneType"),
    (_mined, lambda p: {"negative_threshold": float("nan")}, ValueError, r"negative_threshold must not be NaN"),
    (_mined, lambda p: {"positive_threshold": p.basis[0]}, ValueError, r"positive_threshold must be \[\], got shape \[3\]"),
    (_mined, lambda p: {"positive_threshold": p.labels[0]}, TypeError, r"positive_threshold must be float32, float64"),
    (_mined, lambda p: {"positive_threshold": p.basis[0, 0].to("meta")}, ValueError, r"positive_threshold is on meta but embeddings"),
    (_mined, lambda p: {"reduction": "none"}, ValueError, r"reduction must be 'mean_nonzero', 'mean' or 'sum', got 'none'"),
    (_mined, lambda p: {"negative_margin": None}, TypeError, r"negative_margin must be a number, got NoneType"),
    (_moments, lambda p: {"features": p.embeddings.long()}, TypeError, r"features must be float32, float64, bfloat16 or float16, got"),
    (_moments, lambda p: {"features": p.embeddings[0]}, ValueError, r"features must be \[n, d\], got shape \[6\]"),
    (_moments, lambda p: {"labels": p.labels[:3]}, ValueError, r"labels must have n of features = 5 in dimension 0, got shape \[3\]"),
    (_moments, lambda p: {"labels": p.labels.float()}, TypeError, r"labels must be int64, got torch.float32"),
]


@pytest.mark.parametrize(("call", "change", "error", "message"), BAD, ids=[f"{b[0].__name__}-{b[3][:48]}" for b in BAD])
def test_bad_input(call, change, error, message):
    problem = Problem(5, 6, torch.float32)
    with pytest.raises(error, match=message):
        call(problem, **change(problem))


def test_operators_below_the_checks_do_not_read_out_of_bounds():
    problem = Problem(40, 6, torch.float32, references=20)
    rows, order, labels, references, reference_order, reference_labels = _direct(problem)
    with pytest.raises(RuntimeError, match=r"order must be in \[0, 40\)"):
        torch.ops.ssmkernels.pair_ranking_loss(rows, order + 1, labels, None, None, None, 0.0, 0.5, 0)
    with pytest.raises(RuntimeError, match=r"reference_order must be in \[0, 20\)"):
        torch.ops.ssmkernels.pair_ranking_loss(rows, order, labels, references, reference_order - 1, reference_labels, 0.0, 0.5, 0)
    with pytest.raises(RuntimeError, match=r"order must be in \[0, 40\)"):
        torch.ops.ssmkernels.similarity_moments(rows, order * 2, labels)
    weights, active = torch.ones(2), torch.ones(1, 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"active must be \[3, 3\]"):
        torch.ops.ssmkernels.pair_ranking_loss_backward(torch.tensor(1.0), rows, order, labels, *[None] * 3, 0.0, 0.5, weights, active)


def test_nan_input_gives_nan_output(device):
    for dtype in (torch.float64, torch.float32):
        for place in (0, 33):
            problem = Problem(50, 6, dtype, device)
            problem.embeddings[place, 2] = torch.nan
            for margin in (0.5, 1.2):
                assert problem.loss(ops, negative_margin=margin)[0].isnan()
                assert problem.mined(ops, negative_margin=margin, negative_threshold=1.0)[0].isnan()
            assert problem.moments(ops)[0].isnan().any()

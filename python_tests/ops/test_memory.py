# SPDX-License-Identifier: BSD-3-Clause
"""Every op of the memory family against its reference, and everything else an op must show."""

from __future__ import annotations

import gc
import itertools
import threading

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from ssmkernels import ops, reference

SIZES = [(1, 1, 1, 1), (3, 17, 17, 3), (17, 3, 123, 10), (33, 128, 507, 10), (70, 64, 1003, 300), (123, 507, 130, 7)]  # B, D, K, L
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Problem:
    """Random unit-norm inputs; values are drawn in float64 and rounded, so every dtype sees nearly the same problem."""

    def __init__(self, B, D, K, L, dtype=torch.float64, device="cpu", seed=0, sort=False):
        draw = torch.Generator().manual_seed(seed)

        def unit(rows):
            values = torch.nn.functional.normalize(torch.randn(rows, D, generator=draw, dtype=torch.float64), dim=1)
            return values.to(device, dtype)

        self.query_weak, self.query_strong, self.bank = unit(B), unit(B), unit(K)
        labels = torch.randint(0, L, (K,), generator=draw)
        self.labels = (labels.sort().values if sort else labels).to(device)
        probs = (2 * torch.randn(B, L, generator=draw, dtype=torch.float64)).softmax(dim=1)
        self.probs = probs.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        self.grad_loss = torch.randn(B, generator=draw, dtype=torch.float64).to(device)
        self.grad_classes = torch.randn(B, L, generator=draw, dtype=torch.float64).to(device)
        self.num_classes = L

    def double(self):
        other = object.__new__(Problem)
        other.__dict__ = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in self.__dict__.items()}
        return other

    def matching(self, room, **options):
        """pseudo_probs, loss and the gradient of query_strong."""
        query = self.query_strong.detach().clone().requires_grad_()
        out = room.instance_matching(self.query_weak, query, self.bank, self.labels, self.probs, **options)
        (grad,) = torch.autograd.grad(out.loss, query, self.grad_loss.to(out.loss.dtype))
        return out.pseudo_probs, out.loss.detach(), grad

    def aggregate(self, room, **options):
        query = self.query_weak.detach().clone().requires_grad_()
        out = room.aggregate(query, self.bank, self.labels, self.num_classes, **options)
        (grad,) = torch.autograd.grad(out, query, self.grad_classes.to(out.dtype))
        return out.detach(), grad

    def unfold(self, room, **options):
        return (room.unfold(self.query_weak, self.bank, self.labels, self.probs, **options),)


def assert_no_worse(ours, same_dtype, exact, dtype):
    """DESIGN: error against float64 at most twice that of the reference in the same dtype, plus rounding."""
    eps = 1e-10 if dtype == torch.float64 else torch.finfo(dtype).eps
    for a, b, x in zip(ours, same_dtype, exact, strict=True):
        assert a.dtype == b.dtype
        scale = max(1.0, x.abs().max().item()) if x.numel() else 1.0
        error, allowed = (a.double() - x).abs().max().item(), (b.double() - x).abs().max().item()
        assert error <= 2 * allowed + eps * scale, f"error {error:.2e}, the reference's {allowed:.2e}"


@pytest.mark.parametrize("sort", [False, True], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", ["matching", "aggregate", "unfold"])
def test_value_and_gradient(op, size, dtype, sort, device):
    problem = Problem(*size, dtype, device, sort=sort)
    ours, same, exact = (getattr(p, op)(room) for p, room in ((problem, ops), (problem, reference), (problem.double(), reference)))
    assert_no_worse(ours, same, exact, dtype)


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_temperatures_and_alpha(temperature, device):
    problem = Problem(9, 16, 57, 4, device=device)
    options = {"temperature_weak": temperature, "temperature_strong": 2 * temperature, "alpha": temperature}
    for ours, expected in zip(problem.matching(ops, **options), problem.matching(reference, **options), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for op in ("aggregate", "unfold"):
        for ours, expected in zip(
            getattr(problem, op)(ops, temperature=temperature), getattr(problem, op)(reference, temperature=temperature), strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_a_class_without_probability(device):
    """Rows whose p is 0 on the whole bank fall back to q^w; rows with a single possible slot put everything on it."""
    problem = Problem(6, 8, 40, 5, device=device)
    problem.labels[problem.labels == 4] = 3
    problem.labels[7] = 4
    problem.probs[0] = 0
    problem.probs[1] = torch.eye(5, dtype=torch.float64)[4]
    problem.probs[2, :3] = 0
    for ours, expected in zip(problem.matching(ops), problem.matching(reference), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    unfolded = ops.unfold(problem.query_weak, problem.bank, problem.labels, problem.probs)
    logits = problem.query_weak @ problem.bank.t() / 0.1
    torch.testing.assert_close(unfolded[0], logits[0].softmax(0), rtol=1e-10, atol=1e-12)
    assert unfolded[1, 7] == 1 and unfolded[1].sum() == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_saturated_logits(dtype, device):
    """±1e4: nothing overflows, and the winner takes all."""
    problem = Problem(5, 8, 30, 3, dtype, device)
    options = {"temperature_weak": 1e-4, "temperature_strong": 1e-4}
    ours, same, exact = (p.matching(room, **options) for p, room in ((problem, ops), (problem, reference), (problem.double(), reference)))
    assert all(torch.isfinite(x).all() for x in ours)
    assert_no_worse(ours, same, exact, dtype)
    weights = ops.unfold(problem.query_weak, problem.bank, problem.labels, problem.probs, temperature=1e-4)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))


def test_probabilities_far_below_float32_epsilon(device):
    """q̂ is formed in log-space: a slot may win although its probability is 1e-40."""
    problem = Problem(2, 4, 6, 2, torch.float32, device)
    problem.labels[:] = torch.tensor([0, 1, 1, 1, 1, 1])
    problem.query_weak[:] = problem.bank[0]
    problem.probs[:] = torch.tensor([1e-40, 1.0])
    ours, exact = (p.unfold(room, temperature=0.005)[0] for p, room in ((problem, ops), (problem.double(), reference)))
    torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=1e-6)  # 1e-40 itself has 16 bits


def test_duplicate_rows_agree(device):
    problem = Problem(8, 12, 30, 3, device=device)
    for tensor in (problem.query_weak, problem.query_strong, problem.probs):
        tensor[5] = tensor[2]
    out = ops.instance_matching(problem.query_weak, problem.query_strong, problem.bank, problem.labels, problem.probs)
    assert out.loss[5] == out.loss[2] and out.pseudo_probs[5].equal(out.pseudo_probs[2])


def test_one_slot_has_no_loss(device):
    problem = Problem(4, 8, 1, 3, torch.float32, device)
    out = ops.instance_matching(problem.query_weak, problem.query_strong, problem.bank, problem.labels, problem.probs)
    assert out.loss.abs().max() < 1e-6


def test_no_rows(device):
    problem = Problem(0, 8, 20, 3, torch.float32, device)
    pseudo_probs, loss, grad = problem.matching(ops)
    assert pseudo_probs.shape == (0, 3) and loss.shape == (0,) and grad.shape == (0, 8)
    assert problem.aggregate(ops)[0].shape == (0, 3) and problem.unfold(ops)[0].shape == (0, 20)
    partial = ops.instance_matching_partial(problem.query_weak, problem.query_strong, problem.bank, problem.labels, problem.probs)
    assert [tuple(x.shape) for x in partial] == [(0,), (0,), (0,), (0, 3), (0,), (0, 8), (0, 8)]
    before = problem.bank.clone()
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    ops.memory_update_(problem.bank, problem.labels, empty, problem.query_weak, empty)
    assert problem.bank.equal(before)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_non_contiguous(layout, dtype, device):
    problem = Problem(19, 24, 301, 5, dtype, device)
    contiguous = [*problem.matching(ops), *problem.aggregate(ops), *problem.unfold(ops)]
    if layout == "transposed":  # the official code keeps its bank as [D, K]
        for name in ("bank", "query_weak", "query_strong", "probs"):
            setattr(problem, name, getattr(problem, name).t().contiguous().t())
    elif layout == "strided":
        for name in ("bank", "query_weak", "query_strong", "labels", "probs"):
            tensor = getattr(problem, name)
            setattr(problem, name, torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0])
    else:
        problem.bank = torch.cat([problem.bank[:1], problem.bank])[1:]
        problem.query_weak = torch.cat([problem.query_weak[:, :1], problem.query_weak], dim=1)[:, 1:]
    assert layout == "offset" or not problem.bank.is_contiguous()
    for ours, expected in zip([*problem.matching(ops), *problem.aggregate(ops), *problem.unfold(ops)], contiguous, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [[0, 301], [0, 1, 300, 301], [0, 0, 150, 301], [0, 100, 200, 301]], ids=str)
def test_parts_of_a_bank_merge(parts, device):
    problem = Problem(19, 24, 301, 5, device=device, sort=True)  # sorted: parts lack classes, so some see probability 0 only
    problem.probs[0] = torch.eye(5, dtype=torch.float64, device=device)[2]
    problem.probs[1] = 0
    whole = problem.matching(ops)
    query = problem.query_strong.clone().requires_grad_()
    merged = None
    for begin, end in itertools.pairwise(parts):
        bank, labels = problem.bank[begin:end], problem.labels[begin:end]
        partial = ops.instance_matching_partial(problem.query_weak, query, bank, labels, problem.probs)
        if end > begin:
            for ours, expected in zip(
                partial, reference.instance_matching_partial(problem.query_weak, query, bank, labels, problem.probs), strict=True
            ):
                torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
        merged = partial if merged is None else ops.merge_instance_matching(merged, partial)
    out = ops.finish_instance_matching(merged, query, problem.probs)
    (grad,) = torch.autograd.grad(out.loss, query, problem.grad_loss)
    for ours, expected in zip((out.pseudo_probs, out.loss, grad), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_merging_does_not_depend_on_the_order(device):
    problem = Problem(5, 8, 60, 4, device=device)
    a, b = (
        ops.instance_matching_partial(problem.query_weak, problem.query_strong, problem.bank[s], problem.labels[s], problem.probs)
        for s in (slice(0, 20), slice(20, 60))
    )
    for ours, expected in zip(ops.merge_instance_matching(a, b), ops.merge_instance_matching(b, a), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.7, 1.0])
def test_memory_update(dtype, momentum, device):
    problem = Problem(50, 33, 20, 4, dtype, device, seed=3)  # 50 rows into 20 slots: duplicates
    index = torch.randint(0, 20, (50,), generator=torch.Generator().manual_seed(1)).to(device)
    fresh_labels = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(2)).to(device)
    bank, labels = problem.bank.clone(), problem.labels.clone()
    features = problem.query_weak.clone()
    reference.memory_update_(bank, labels, index, features, fresh_labels, momentum=momentum)
    version = problem.bank._version
    ops.memory_update_(problem.bank, problem.labels, index, problem.query_weak, fresh_labels, momentum=momentum)
    assert problem.labels.equal(labels)
    tolerance = 1e-10 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(problem.bank.double(), bank.double(), rtol=tolerance, atol=tolerance)
    assert problem.bank._version > version and problem.query_weak.equal(features)


def test_memory_update_in_batch_order(device):
    """The last of two equal indices wins at momentum 0, and with momentum the first counts less."""
    bank = torch.zeros(3, 2, device=device)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    index = torch.tensor([1, 1], device=device)
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    ops.memory_update_(bank, labels, index, features, torch.tensor([1, 2], device=device), momentum=0.0)
    assert bank.tolist() == [[0, 0], [0, 1], [0, 0]] and labels.tolist() == [0, 2, 0]


def test_a_bank_written_before_the_backward(device):
    """instance_matching keeps no bank for its backward; aggregate does, and says that it changed."""
    p = Problem(4, 5, 13, 3, device=device)
    query, index = p.query_strong.requires_grad_(), torch.arange(4, device=device)
    expected = torch.autograd.grad(ops.instance_matching(p.query_weak, query, p.bank, p.labels, p.probs).loss.sum(), query)[0]
    loss = ops.instance_matching(p.query_weak, query, p.bank, p.labels, p.probs).loss.sum()
    aggregated = ops.aggregate(query, p.bank, p.labels, 3)
    ops.memory_update_(p.bank, p.labels, index, p.query_weak, p.labels[:4].clone())
    assert torch.autograd.grad(loss, query)[0].equal(expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        aggregated[0, 0].backward()


def test_memory_update_normalises_each_slot_not_each_feature(device):
    problem = Problem(7, 5, 9, 2, torch.float32, device)
    index = torch.arange(7, device=device)
    ops.memory_update_(problem.bank, problem.labels, index, 3 * problem.query_weak, torch.ones_like(index))
    torch.testing.assert_close(problem.bank.norm(dim=1), torch.ones(9, device=device))


def test_memory_update_large_batch_and_strides():
    """Enough rows to be shared out over threads; a transposed bank and a strided label vector are written in place."""
    problem = Problem(3000, 64, 500, 4, torch.float32)
    index = torch.randint(0, 500, (3000,), generator=torch.Generator().manual_seed(1))
    fresh = torch.randint(0, 4, (3000,), generator=torch.Generator().manual_seed(2))
    expected, expected_labels = problem.bank.clone(), problem.labels.clone()
    reference.memory_update_(expected, expected_labels, index, problem.query_weak, fresh)
    official = problem.bank.t().contiguous()
    strided = torch.stack([problem.labels, problem.labels], dim=1)
    ops.memory_update_(official.t(), strided[:, 0], index, problem.query_weak, fresh)
    torch.testing.assert_close(official.t(), expected, rtol=1e-5, atol=1e-6)
    assert strided[:, 0].equal(expected_labels) and strided[:, 1].equal(problem.labels)


def test_gradcheck(device):
    problem = Problem(4, 5, 13, 3, device=device)
    query = problem.query_strong.requires_grad_()
    assert gradcheck(lambda q: ops.instance_matching(problem.query_weak, q, problem.bank, problem.labels, problem.probs).loss, (query,))
    assert gradcheck(lambda q: ops.aggregate(q, problem.bank, problem.labels, 3), (query,))


def test_gradient_of_the_bare_operator(device):
    """torch.ops.ssmkernels.instance_matching, called without its wrapper, is differentiable too."""
    problem = Problem(4, 5, 13, 3, device=device)
    query = problem.query_strong.clone().requires_grad_()
    arguments = (problem.query_weak, query, problem.bank, problem.labels, problem.probs, 0.1, 0.1, 0.9, True, False)
    loss = torch.ops.ssmkernels.instance_matching(*arguments)[1]
    torch.testing.assert_close(torch.autograd.grad(loss, query, problem.grad_loss)[0], problem.matching(reference)[2])


def test_only_the_right_gradients(device):
    problem = Problem(4, 5, 13, 3, device=device)
    for tensor in (problem.query_weak, problem.query_strong, problem.bank, problem.probs):
        tensor.requires_grad_()
    out = ops.instance_matching(problem.query_weak, problem.query_strong, problem.bank, problem.labels, problem.probs)
    assert not out.pseudo_probs.requires_grad
    out.loss.sum().backward()
    assert problem.query_strong.grad is not None
    assert problem.query_weak.grad is None and problem.bank.grad is None and problem.probs.grad is None
    assert not ops.unfold(problem.query_weak, problem.bank, problem.labels, problem.probs).requires_grad
    with torch.no_grad():
        assert not ops.instance_matching(
            problem.query_weak, problem.query_strong, problem.bank, problem.labels, problem.probs
        ).loss.requires_grad


def test_differentiable_once_says_so(device):
    problem = Problem(4, 5, 13, 3, device=device)
    query = problem.query_strong.requires_grad_()
    loss = ops.instance_matching(problem.query_weak, query, problem.bank, problem.labels, problem.probs).loss.sum()
    (grad,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, device):
    problem = Problem(5, 8, 33, 4, dtype, device)
    library = torch.ops.ssmkernels
    query = problem.query_strong.requires_grad_()
    matching = (problem.query_weak, query, problem.bank, problem.labels, problem.probs, 0.1, 0.1)
    opcheck(library.instance_matching.default, (*matching, 0.9, True, False))
    opcheck(library.instance_matching.default, (*(x.detach() if torch.is_tensor(x) else x for x in matching), 0.9, False, False))
    opcheck(library.instance_matching_partial.default, (*(x.detach() if torch.is_tensor(x) else x for x in matching), False))
    opcheck(library.aggregate.default, (query, problem.bank, problem.labels, 4, 0.1, False))
    opcheck(library.unfold.default, (problem.query_weak, problem.bank, problem.labels, problem.probs, 0.1, False))
    index, labels = torch.tensor([3, 1, 3, 0, 7], device=device), torch.tensor([0, 1, 2, 3, 0], device=device)
    opcheck(library.memory_update_.default, (problem.bank, problem.labels, index, problem.query_weak, labels, 0.7))
    normalizer, classes = (torch.rand(5, *s, device=device) for s in ((), (4,)))
    opcheck(
        library.aggregate_backward.default,
        (classes, problem.query_weak, problem.bank, problem.labels, classes, normalizer, 0.1, False),
    )


def _step(query_weak, query_strong, bank, labels, probs):
    out = ops.instance_matching(query_weak, query_strong, bank, labels, probs)
    extra = ops.aggregate(query_strong, bank.clone(), labels.clone(), probs.shape[1]) * ops.unfold(query_weak, bank, labels, probs).sum()
    ops.memory_update_(bank, labels, torch.arange(query_weak.shape[0], device=bank.device), query_weak, labels[: query_weak.shape[0]])
    return out.pseudo_probs, out.loss, extra


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile(dynamic, device):
    compiled = torch.compile(_step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in [(5, 8, 33, 4), (7, 8, 40, 4)]:
        a, b = (Problem(*size, torch.float32, device) for _ in range(2))
        results = []
        for problem, function in ((a, compiled), (b, _step)):
            query = problem.query_strong.requires_grad_()
            pseudo_probs, loss, extra = function(problem.query_weak, query, problem.bank, problem.labels, problem.probs)
            (loss.sum() + extra.sum() + (extra[:, 0] * loss).sum()).backward()
            results.append((pseudo_probs, loss, extra, query.grad, problem.bank))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)


def test_torch_compile_inductor(device):
    problem = Problem(5, 8, 33, 4, torch.float32, device)

    def mean_loss(p):
        return ops.instance_matching(p.query_weak, p.query_strong, p.bank, p.labels, p.probs).loss.mean()

    torch.testing.assert_close(torch.compile(mean_loss, fullgraph=True)(problem), mean_loss(problem))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(low, device):
    """Queries and bank go in autocast's dtype, probabilities and results stay float32, the gradient has the query's dtype."""
    problem = Problem(9, 16, 57, 4, torch.float32, device)
    rounded = Problem(9, 16, 57, 4, low, device)
    with torch.autocast(device, low):
        pseudo_probs, loss, grad = problem.matching(ops)
        aggregated, aggregate_grad = problem.aggregate(ops)
        (unfolded,) = problem.unfold(ops)
    assert {x.dtype for x in (pseudo_probs, loss, grad, aggregated, aggregate_grad, unfolded)} == {torch.float32}
    expected = (*rounded.matching(ops), *rounded.aggregate(ops), *rounded.unfold(ops))
    for ours, other in zip((pseudo_probs, loss, grad, aggregated, aggregate_grad, unfolded), expected, strict=True):
        tolerance = 1e-2 if other.dtype == low else 1e-6
        torch.testing.assert_close(ours, other.float(), rtol=tolerance, atol=tolerance)


def _everything(problem):
    out = [*problem.matching(ops), *problem.aggregate(ops), *problem.unfold(ops)]
    bank, labels = problem.bank.clone(), problem.labels.clone()
    index = torch.arange(problem.query_weak.shape[0], device=bank.device) % bank.shape[0]
    ops.memory_update_(bank, labels, index, problem.query_weak, labels[index])
    return [*out, bank]


@pytest.mark.parametrize("size", [(1, 128, 30_000, 10), (40, 16, 3001, 10), (700, 8, 300, 5)], ids=str)
def test_bits_do_not_depend_on_threads_or_run(size):
    """Enough work to be shared out over threads, as in the tests of this name of the other families."""
    problem = Problem(*size, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(_everything(problem))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_bits_do_not_depend_on_the_run_on_a_gpu():
    problem = Problem(70, 64, 5000, 100, torch.float32, "cuda")
    first, second = _everything(problem), _everything(problem)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_calls_from_several_threads():
    problem = Problem(40, 16, 1001, 10, torch.float32)
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
    problems = [Problem(35, 33, 507, 10, dtype) for dtype in DTYPES]
    try:
        _C.set_isa(isa)
        ours = [_everything(problem) for problem in problems]
    finally:
        _C.set_isa(chosen)
    for problem, out in zip(problems, ours, strict=True):
        exact = problem.double()
        expected = [*exact.matching(reference), *exact.aggregate(reference), *exact.unfold(reference)]
        tolerance = 1e-10 if problem.bank.dtype == torch.float64 else 1e-5
        for a, b in zip(out, expected, strict=False):
            loose = a.dtype in (torch.bfloat16, torch.float16)  # gradients come in the query's dtype
            torch.testing.assert_close(a.double(), b, rtol=1e-2 if loose else tolerance, atol=1e-2 if loose else tolerance)


def test_inputs_are_not_written(device):
    problem = Problem(9, 16, 57, 4, torch.float32, device)
    before = {name: value.clone() for name, value in problem.__dict__.items() if torch.is_tensor(value)}
    problem.matching(ops), problem.aggregate(ops), problem.unfold(ops)
    assert all(getattr(problem, name).equal(value) for name, value in before.items())


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    B, D, K, L = 256, 128, 65536, 100
    problem = Problem(B, D, K, L, torch.float32, "cuda")
    problem.matching(ops)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    problem.matching(ops)
    extra = torch.cuda.max_memory_allocated() - base
    assert extra < B * K * 4 / 2, f"{extra} bytes: as much as a [B, K] matrix"


def test_peak_memory():
    """Peak resident memory of forward and backward stays far below one [B, K] matrix, in a process of its own."""
    resource = pytest.importorskip("resource", reason="POSIX only")
    B, D, K, L = 256, 32, 131072, 100  # a [B, K] float32 matrix is 128 MiB; B·(L + D) is 0.13 MiB
    problem, wide = Problem(1, D, K, L, torch.float32), Problem(B, D, 1, L, torch.float32)
    for name in ("query_weak", "query_strong", "probs", "grad_loss", "grad_classes"):
        setattr(problem, name, getattr(wide, name))
    gc.collect()
    small = Problem(2, D, 64, L, torch.float32)
    small.matching(ops), small.aggregate(ops)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem.matching(ops), problem.aggregate(ops)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert extra < 24 * 2**20, f"{extra / 2**20:.1f} MiB more"


@pytest.mark.gpu
def test_cuda_graph():
    problem = Problem(40, 64, 3000, 10, torch.float32, "cuda")
    arguments = (problem.query_weak, problem.query_strong.requires_grad_(), problem.bank, problem.labels, problem.probs)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ops.instance_matching(*arguments).loss.sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    problem.query_strong.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.instance_matching(*arguments)
        out.loss.sum().backward()
    other = Problem(40, 64, 3000, 10, torch.float32, "cuda", seed=5)
    with torch.no_grad():
        for mine, theirs in zip(arguments, (other.query_weak, other.query_strong, other.bank, other.labels, other.probs), strict=True):
            mine.copy_(theirs)
    problem.query_strong.grad.zero_()
    graph.replay()
    other.grad_loss.fill_(1)
    for ours, expected in zip((out.pseudo_probs, out.loss, problem.query_strong.grad), other.matching(ops), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.gpu
def test_beyond_2_31_elements():
    """A bank of 2³¹ + elements: offsets are 64 bits wide."""
    D, K = 128, 2**24 + 77
    bank = torch.zeros(K, D, dtype=torch.bfloat16, device="cuda")
    bank[-1, 0] = 1
    labels = torch.zeros(K, dtype=torch.int64, device="cuda")
    labels[-1] = 1
    query = torch.zeros(2, D, dtype=torch.bfloat16, device="cuda")
    query[:, 0] = 1
    aggregated = ops.aggregate(query, bank, labels, 2, temperature=0.02)
    expected = torch.sigmoid(50.0 - torch.tensor(float(K - 1)).log())
    torch.testing.assert_close(aggregated[:, 1].cpu(), expected.expand(2), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 17, 17, 3), (33, 128, 300, 10)], ids=str)
def test_small_set(size, dtype):
    """Every kernel once, at sizes that a sanitizer gets through."""
    cpu, gpu = Problem(*size, dtype), Problem(*size, dtype, "cuda")
    tolerance = 1e-10 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    for a, b in zip(_everything(cpu), _everything(gpu), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_device_parity():
    cpu = Problem(70, 64, 1003, 300, torch.float64)
    gpu = Problem(70, 64, 1003, 300, torch.float64, "cuda")
    for a, b in zip(_everything(cpu), _everything(gpu), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-10, atol=1e-10)


def _call(problem, **changes):
    arguments = {
        "query_weak": problem.query_weak,
        "query_strong": problem.query_strong,
        "bank": problem.bank,
        "bank_labels": problem.labels,
        "probs_weak": problem.probs,
    } | changes
    return ops.instance_matching(**arguments)


BAD = [
    (lambda p: {"query_weak": p.query_weak[:, :7]}, ValueError, r"query_weak must have D of bank = 8 in dimension 1, got shape \[5, 7\]"),
    (lambda p: {"query_strong": p.query_strong[:4]}, ValueError, r"query_strong must have B of query_weak = 5"),
    (lambda p: {"query_weak": p.query_weak[0]}, ValueError, r"query_weak must be \[B, D\], got shape \[8\]"),
    (lambda p: {"query_weak": [[1.0]]}, TypeError, r"query_weak must be a tensor \[B, D\], got list"),
    (lambda p: {"bank": p.bank[:0], "bank_labels": p.labels[:0]}, ValueError, r"bank must have at least one slot, got shape \[0, 8\]"),
    (lambda p: {"bank": p.bank.long()}, TypeError, r"bank must be float32, float64, bfloat16 or float16, got torch.int64"),
    (lambda p: {"bank": p.bank.double()}, TypeError, r"query_weak is torch.float32 but bank is torch.float64"),
    (lambda p: {"bank_labels": p.labels.int()}, TypeError, r"bank_labels must be int64, got torch.int32"),
    (lambda p: {"bank_labels": p.labels[:-1]}, ValueError, r"bank_labels must have K of bank = 33"),
    (lambda p: {"bank_labels": p.labels + 1}, ValueError, r"bank_labels must be in \[0, 4\), .*; got values from 1 to 4"),
    (lambda p: {"bank_labels": p.labels - 1}, ValueError, r"bank_labels must be in \[0, 4\)"),
    (lambda p: {"probs_weak": p.probs[:, :0]}, ValueError, r"probs_weak must have at least one class"),
    (lambda p: {"probs_weak": p.probs[:2]}, ValueError, r"probs_weak must have B of the query = 5"),
    (lambda p: {"probs_weak": p.probs - 1}, ValueError, r"probs_weak must be finite and >= 0"),
    (lambda p: {"probs_weak": p.probs / 0}, ValueError, r"probs_weak must be finite and >= 0"),
    (lambda p: {"probs_weak": p.probs * torch.nan}, ValueError, r"probs_weak must be finite and >= 0"),
    (lambda p: {"temperature_weak": float("nan")}, ValueError, r"temperature_weak must be finite and > 0, got nan"),
    (lambda p: {"temperature_strong": 0.0}, ValueError, r"temperature_strong must be finite and > 0, got 0.0"),
    (lambda p: {"temperature_strong": -0.1}, ValueError, r"temperature_strong must be finite and > 0, got -0.1"),
    (lambda p: {"temperature_weak": float("inf")}, ValueError, r"temperature_weak must be finite and > 0, got inf"),
    (lambda p: {"temperature_weak": torch.ones(2)}, TypeError, r"temperature_weak must be a number, got a tensor of"),
    (lambda p: {"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
    (lambda p: {"alpha": float("nan")}, ValueError, r"alpha must be in \[0, 1\], got nan"),
    (lambda p: {"query_weak": p.query_weak.to("meta")}, ValueError, r"query_weak is on meta but bank is on cpu"),
    (lambda p: {"bank_labels": p.labels.to("meta")}, ValueError, r"bank_labels is on meta but bank is on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:48] for b in BAD])
def test_bad_input(change, error, message):
    problem = Problem(5, 8, 33, 4, torch.float32)
    with pytest.raises(error, match=message):
        _call(problem, **change(problem))


def test_bad_input_of_the_other_ops():
    p = Problem(5, 8, 33, 4, torch.float32)
    with pytest.raises(ValueError, match=r"num_classes must be at least 1, got 0"):
        ops.aggregate(p.query_weak, p.bank, p.labels, 0)
    with pytest.raises(TypeError, match=r"num_classes must be an int, got float"):
        ops.aggregate(p.query_weak, p.bank, p.labels, 4.0)
    with pytest.raises(ValueError, match=r"bank_labels must be in \[0, 2\)"):
        ops.aggregate(p.query_weak, p.bank, p.labels, 2)
    with pytest.raises(ValueError, match=r"temperature must be finite and > 0, got nan"):
        ops.aggregate(p.query_weak, p.bank, p.labels, 4, temperature=float("nan"))
    with pytest.raises(ValueError, match=r"bank must have at least one slot"):
        ops.unfold(p.query_weak, p.bank[:0], p.labels[:0], p.probs)
    with pytest.raises(ValueError, match=r"query must have D of bank = 8"):
        ops.unfold(p.query_weak[:, :3], p.bank, p.labels, p.probs)


def test_bad_update_writes_nothing():
    p = Problem(5, 8, 33, 4, torch.float32)
    bank, labels = p.bank.clone(), p.labels.clone()
    index, fresh = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    for changes, error, message in [
        ({"index": index + 30}, ValueError, r"index must be in \[0, 33\), the slots of bank; got values from 30 to 34"),
        ({"index": index - 1}, ValueError, r"index must be in \[0, 33\)"),
        ({"index": index.int()}, TypeError, r"index must be int64, got torch.int32"),
        ({"labels": fresh - 1}, ValueError, r"labels must be >= 0, got -1"),
        ({"labels": fresh[:3]}, ValueError, r"labels must have B of index = 5"),
        ({"features": p.query_weak.double()}, TypeError, r"features is torch.float64 but bank is torch.float32"),
        ({"features": p.query_weak[:, :2]}, ValueError, r"features must have D of bank = 8"),
        ({"momentum": 1.1}, ValueError, r"momentum must be in \[0, 1\], got 1.1"),
    ]:
        arguments = {"index": index, "features": p.query_weak, "labels": fresh} | changes
        with pytest.raises(error, match=message):
            ops.memory_update_(p.bank, p.labels, **arguments)
    assert p.bank.equal(bank) and p.labels.equal(labels)


def test_nan_input_gives_nan_output(device):
    """A NaN is passed on to its own row, never turned into a number."""
    problem = Problem(5, 8, 33, 4, torch.float32, device)
    problem.query_weak[2] = torch.nan
    out = ops.instance_matching(problem.query_weak, problem.query_strong, problem.bank, problem.labels, problem.probs)
    assert out.loss.isnan().tolist() == [False, False, True, False, False]
    assert out.pseudo_probs.isnan().any(dim=1).tolist() == [False, False, True, False, False]

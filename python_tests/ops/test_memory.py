# SPDX-License-Identifier: BSD-3-Clause
"""What is particular to the ops of the memory family; what every op must show is in test_contract.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from ssmkernels import ops, reference

# B, D, K, L
SIZES = [(1, 1, 1, 1), (3, 17, 17, 3), (17, 3, 123, 10), (33, 128, 507, 10), (70, 64, 1003, 300), (123, 507, 130, 7)]
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
        other.__dict__ = {
            k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in self.__dict__.items()
        }
        return other

    def matching(self, package, **options):
        """pseudo_probs, loss and the gradient of query_strong."""
        query = self.query_strong.detach().clone().requires_grad_()
        out = package.instance_matching(self.query_weak, query, self.bank, self.labels, self.probs, **options)
        (grad,) = torch.autograd.grad(out.loss, query, self.grad_loss.to(out.loss.dtype))
        return out.pseudo_probs, out.loss.detach(), grad

    def aggregate(self, package, **options):
        query = self.query_weak.detach().clone().requires_grad_()
        out = package.aggregate(query, self.bank, self.labels, self.num_classes, **options)
        (grad,) = torch.autograd.grad(out, query, self.grad_classes.to(out.dtype))
        return out.detach(), grad

    def unfold(self, package, **options):
        return (package.unfold(self.query_weak, self.bank, self.labels, self.probs, **options),)


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


def test_probabilities_far_below_float32_epsilon(device):
    """q̂ is formed in log-space: a slot may win although its probability is 1e-40."""
    problem = Problem(2, 4, 6, 2, torch.float32, device)
    problem.labels[:] = torch.tensor([0, 1, 1, 1, 1, 1])
    problem.query_weak[:] = problem.bank[0]
    problem.probs[:] = torch.tensor([1e-40, 1.0])
    ours, exact = (
        p.unfold(package, temperature=0.005)[0] for p, package in ((problem, ops), (problem.double(), reference))
    )
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


@pytest.mark.parametrize("parts", [[0, 301], [0, 1, 300, 301], [0, 0, 150, 301], [0, 100, 200, 301]], ids=str)
def test_parts_of_a_bank_merge(parts, device):
    # Sorted: parts lack classes, so some see probability 0 only
    problem = Problem(19, 24, 301, 5, device=device, sort=True)
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
                partial,
                reference.instance_matching_partial(problem.query_weak, query, bank, labels, problem.probs),
                strict=True,
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
        ops.instance_matching_partial(
            problem.query_weak, problem.query_strong, problem.bank[s], problem.labels[s], problem.probs
        )
        for s in (slice(0, 20), slice(20, 60))
    )
    for ours, expected in zip(ops.merge_instance_matching(a, b), ops.merge_instance_matching(b, a), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


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
    expected = torch.autograd.grad(
        ops.instance_matching(p.query_weak, query, p.bank, p.labels, p.probs).loss.sum(), query
    )[0]
    loss = ops.instance_matching(p.query_weak, query, p.bank, p.labels, p.probs).loss.sum()
    aggregated = ops.aggregate(query, p.bank, p.labels, 3)
    ops.memory_update_(p.bank, p.labels, index, p.query_weak, p.labels[:4].clone())
    assert torch.autograd.grad(loss, query)[0].equal(expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        aggregated[0, 0].backward()


def write_by_index(problem):
    problem.labels[3:40] = 0


def write_data(problem):
    problem.labels.data.fill_(2)  # no version counter sees it


def write_through_view(problem):
    problem.labels.view(-1, 8)[:, 1] += 1
    problem.labels %= problem.num_classes


def write_by_update(problem):
    index = torch.arange(7, 4000, 13, device=problem.labels.device)
    ops.memory_update_(problem.bank, problem.labels, index, problem.bank[index], index % problem.num_classes)


def write_by_compiled_update(problem):
    @torch.compile(fullgraph=True)
    def swap(labels):
        labels.copy_(labels.flip(0))

    swap(problem.labels)


def write_by_graph(problem):
    if problem.labels.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            problem.labels.copy_(problem.labels.flip(0))
        graph.replay()


WRITES = [write_by_index, write_data, write_through_view, write_by_update, write_by_compiled_update, write_by_graph]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__.removeprefix("write_"))
def test_labels_written_between_calls(write, device):
    """A GPU keeps the class order of a bank that is not small between calls; it is that of the labels as they are."""
    problem = Problem(3, 8, 5000, 7, torch.float32, device)
    problem.matching(ops)
    for _ in range(2):
        write(problem)
        fresh = Problem(3, 8, 5000, 7, torch.float32, device)
        fresh.bank, fresh.labels = problem.bank.clone(), problem.labels.clone()
        for kept, anew in zip(problem.matching(ops), fresh.matching(ops), strict=True):
            assert torch.equal(kept, anew)
        assert torch.equal(problem.aggregate(ops)[0], fresh.aggregate(ops)[0])
        expected = problem.double().matching(reference)[0]
        torch.testing.assert_close(problem.matching(ops)[0].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
def test_a_captured_call_finds_the_labels_of_its_replay():
    problem = Problem(3, 8, 5000, 7, torch.float32, "cuda")
    problem.matching(ops)
    arguments = (problem.query_weak, problem.query_strong, problem.bank, problem.labels, problem.probs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.instance_matching(*arguments)
    for _ in range(2):
        problem.labels.copy_(problem.labels.flip(0))
        graph.replay()
        assert torch.equal(out.pseudo_probs, ops.instance_matching(*arguments).pseudo_probs)


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

# SPDX-License-Identifier: BSD-3-Clause
"""Every op of the pairs family against its reference, and everything else an op must show."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.library import opcheck

from ssmkernels import ops, reference

SIZES = [(1, 1, 1, 1), (3, 5, 7, 2), (17, 130, 16, 33), (123, 64, 24, 17), (65, 200, 3, 40), (5, 1000, 40, 8)]  # n, m, d, h
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTERACTIONS = ["concat", "absdiff", "product"]
NETWORK = ("x", "y", "w1", "b1", "w2", "b2")


class Problem:
    """A random network with labelled rows; values are drawn in float64 and rounded."""

    def __init__(self, n, m, d, h, dtype=torch.float64, device="cpu", seed=0, interaction="concat", listed=None, scale=1.0):
        draw = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(size, generator=draw, dtype=torch.float64)

        wide = 2 * d if interaction == "concat" else d
        values = (normal(n, d), normal(m, d), normal(h, wide) * scale / wide**0.5, normal(h) / 4, normal(h) / h**0.5, normal())
        self.network = [value.to(device, dtype) for value in values]
        self.x_labels, self.y_labels = (torch.randint(-1, 4, (size,), generator=draw).to(device) for size in (n, m))
        self.interaction, self.pairs = interaction, None
        if listed is not None:
            self.pairs = torch.stack([torch.randint(0, size, (listed,), generator=draw) for size in (n, m)], dim=1).to(device)
        self.grad = normal(*((n, m) if listed is None else (listed,))).to(device)

    def double(self):
        other = object.__new__(Problem)
        other.__dict__ = self.__dict__ | {"network": [value.double() for value in self.network]}
        return other

    def logits(self, room):
        """The logits, and the gradients of the network."""
        network = [value.detach().clone().requires_grad_() for value in self.network]
        out = room.pair_logits(*network, interaction=self.interaction, pairs=self.pairs)
        return out.detach(), *torch.autograd.grad(out, network, self.grad.to(out.dtype))

    def loss(self, room, **options):
        """The focal loss, and the gradients of the network."""
        network = [value.detach().clone().requires_grad_() for value in self.network]
        x, y, *weights = network
        settings = {"interaction": self.interaction, "pairs": self.pairs} | options
        out = room.pair_focal_loss(x, y, self.x_labels, self.y_labels, *weights, **settings)
        grad = self.grad if out.ndim else self.grad.new_ones(())
        return out.detach(), *torch.autograd.grad(out, network, grad.to(out.dtype))


def assert_no_worse(ours, same_dtype, exact, dtype):
    """The error against float64 is at most twice that of the reference in the same dtype, plus rounding."""
    eps = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    for a, b, x in zip(ours, same_dtype, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == x.shape
        scale = max(1.0, x.abs().max().item()) if x.numel() else 1.0
        error, allowed = ((y.double() - x).abs().max().item() if x.numel() else 0.0 for y in (a, b))
        assert error <= 2 * allowed + 4 * eps * scale, f"error {error:.2e}, the reference's {allowed:.2e}"


def compare(problem, dtype, call):
    assert_no_worse(call(problem, ops), call(problem, reference), call(problem.double(), reference), dtype)


@pytest.mark.parametrize("listed", [None, 1, 777], ids=["all", "one listed", "listed"])
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_value_and_gradient(size, dtype, interaction, listed, device):
    problem = Problem(*size, dtype, device, interaction=interaction, listed=listed)
    compare(problem, dtype, lambda p, room: p.logits(room))
    compare(problem, dtype, lambda p, room: p.loss(room))


@pytest.mark.parametrize("listed", [None, 300], ids=["all", "listed"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.25, 1.0])
def test_settings_of_the_loss(alpha, gamma, reduction, listed, device):
    for interaction in INTERACTIONS:
        problem = Problem(17, 21, 5, 9, device=device, interaction=interaction, listed=listed)
        options = {"alpha": alpha, "gamma": gamma, "reduction": reduction, "ignore_index": 2}
        compare(problem, torch.float64, lambda p, room, options=options: p.loss(room, **options))


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_agrees_with_torchvision(alpha, gamma, device):
    sigmoid_focal_loss = pytest.importorskip("torchvision.ops").sigmoid_focal_loss
    problem = Problem(30, 40, 8, 16, device=device)
    problem.x_labels, problem.y_labels = problem.x_labels.abs(), problem.y_labels.abs()
    x, y, *weights = problem.network
    targets = (problem.x_labels[:, None] == problem.y_labels).double()
    logits = ops.pair_logits(x, y, *weights)
    for reduction in ("mean", "sum", "none"):
        ours = ops.pair_focal_loss(x, y, problem.x_labels, problem.y_labels, *weights, alpha=alpha, gamma=gamma, reduction=reduction)
        theirs = sigmoid_focal_loss(logits, targets, alpha=-1 if alpha is None else alpha, gamma=gamma, reduction=reduction)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_saturated_logits(dtype, interaction, device):
    """Logits of ±1e4 and more: p_t rounds to 0 or 1, the loss does not."""
    problem = Problem(20, 30, 6, 12, dtype, device, interaction=interaction)
    problem.network[4] *= 1e4
    assert problem.logits(ops)[0].abs().max() > 1e4
    for gamma in (0.0, 0.5, 2.0):
        ours = problem.loss(ops, gamma=gamma)
        assert all(each.isfinite().all() for each in ours)
        compare(problem, dtype, lambda p, room, gamma=gamma: p.loss(room, gamma=gamma))


def test_small_losses_keep_their_digits(device):
    """p_t close to 1: the loss is p² e^{−3s}-small, and still right to rounding."""
    x = torch.tensor([[5.0], [10.0], [20.0]], device=device)
    one, none = torch.ones(1, device=device), torch.zeros(1, device=device)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    arguments = (labels, labels[:1], torch.ones(1, 2, device=device), none, one, none[0])
    for gamma, power in ((2.0, 3), (1.5, 2.5), (0.0, 1)):
        ours = ops.pair_focal_loss(x, none[None], *arguments, alpha=None, gamma=gamma, reduction="none")[:, 0]
        q = torch.sigmoid(-x[:, 0].double())
        torch.testing.assert_close(ours.double(), q ** (power - 1) * -torch.log1p(-q), rtol=3e-6, atol=0)


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_ignored_labels_count_nowhere(interaction, device):
    problem = Problem(40, 50, 6, 12, device=device, interaction=interaction)
    rows, columns = (problem.x_labels >= 0).nonzero()[:, 0], (problem.y_labels >= 0).nonzero()[:, 0]
    inside = Problem(40, 50, 6, 12, device=device, interaction=interaction)
    inside.network[0], inside.network[1] = inside.network[0][rows], inside.network[1][columns]
    inside.x_labels, inside.y_labels = inside.x_labels[rows], inside.y_labels[columns]
    loss, x_grad, y_grad, *weights = problem.loss(ops)
    expected, x_expected, y_expected, *weights_expected = inside.loss(ops)
    ours, theirs = (loss, x_grad[rows], y_grad[columns], *weights), (expected, x_expected, y_expected, *weights_expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    problem.y_labels.fill_(-1)
    assert not any(each.any() for each in problem.loss(ops))  # none counts: 0, and no NaN
    problem.pairs = torch.tensor([[3, 4], [5, 6]], device=device)
    assert not any(each.any() for each in problem.loss(ops))


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_no_rows(sizes, interaction, device):
    problem = Problem(*sizes, 4, 6, device=device, interaction=interaction)
    logits, *grads = problem.logits(ops)
    assert logits.shape == sizes and [g.shape for g in grads] == [v.shape for v in problem.network] and not any(g.any() for g in grads)
    assert problem.loss(ops)[0] == 0 and problem.loss(ops, reduction="none")[0].shape == sizes
    listed = Problem(5, 7, 4, 6, device=device, interaction=interaction, listed=0)
    assert listed.logits(ops)[0].shape == (0,) and not any(each.any() for each in listed.loss(ops))


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_listing_all_pairs_is_the_same(interaction, device):
    problem = Problem(33, 70, 5, 20, device=device, interaction=interaction)
    listed = Problem(33, 70, 5, 20, device=device, interaction=interaction)
    listed.pairs = torch.cartesian_prod(torch.arange(33), torch.arange(70)).to(device)
    listed.grad = problem.grad.flatten()
    for a, b in zip((*problem.logits(ops), *problem.loss(ops)), (*listed.logits(ops), *listed.loss(ops)), strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-11, atol=1e-13)


def test_duplicate_rows_agree(device):
    for interaction in INTERACTIONS:
        problem = Problem(40, 100, 6, 12, torch.float32, device, interaction=interaction)
        problem.network[0][1] = problem.network[0][39] = problem.network[0][0]
        problem.network[1][99] = problem.network[1][0]
        logits = ops.pair_logits(*problem.network, interaction=interaction)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits[:, 99], logits[:, 0], rtol=1e-5, atol=1e-6)


def test_the_same_rows_on_both_sides(device):
    """x is y: both gradients are added."""
    for interaction in INTERACTIONS:
        problem = Problem(30, 30, 6, 12, device=device, interaction=interaction)
        grads = []
        for room in (ops, reference):
            x = problem.network[0].clone().requires_grad_()
            labels = problem.x_labels
            loss = room.pair_focal_loss(x, x, labels, labels, *problem.network[2:], interaction=interaction)
            grads += torch.autograd.grad(loss, x)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_non_contiguous(interaction, device):
    problem = Problem(17, 23, 6, 12, device=device, interaction=interaction, listed=50)
    expected = problem.loss(ops)
    apart = [torch.stack([value, value], dim=-1)[..., 0] for value in problem.network]
    apart[2] = problem.network[2].t().contiguous().t()
    problem.network = apart
    problem.pairs = problem.pairs.t().contiguous().t()
    problem.x_labels = torch.stack([problem.x_labels] * 2, dim=1)[:, 0]
    for a, b in zip(problem.loss(ops), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("listed", [None, 9], ids=["all", "listed"])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_gradcheck(interaction, listed, device):
    problem = Problem(4, 5, 3, 6, device=device, interaction=interaction, listed=listed)
    network = [value.requires_grad_() for value in problem.network]

    def logits(*network):
        return ops.pair_logits(*network, interaction=interaction, pairs=problem.pairs)

    def loss(reduction):
        def call(x, y, *weights):
            labels = (problem.x_labels, problem.y_labels)
            return ops.pair_focal_loss(x, y, *labels, *weights, interaction=interaction, pairs=problem.pairs, reduction=reduction)

        return call

    for function in (logits, loss("mean"), loss("sum"), loss("none")):
        assert gradcheck(function, network)


def test_only_the_gradients_asked_for(device):
    problem = Problem(7, 8, 3, 6, device=device)
    x, y, *weights = problem.network
    y.requires_grad_()
    loss = ops.pair_focal_loss(x, y, problem.x_labels, problem.y_labels, *weights)
    loss.backward()
    assert y.grad is not None and x.grad is None and all(w.grad is None for w in weights)
    with torch.no_grad():
        assert not ops.pair_focal_loss(x, y, problem.x_labels, problem.y_labels, *weights).requires_grad
    (grad,) = torch.autograd.grad(ops.pair_logits(x, y, *weights).square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice|once_differentiable|does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("listed", [None, 9], ids=["all", "listed"])
@pytest.mark.parametrize("interaction", [0, 1, 2], ids=INTERACTIONS)
def test_opcheck(interaction, listed, device):
    library = torch.ops.ssmkernels
    problem = Problem(4, 5, 6, 6, torch.float32, device, interaction=INTERACTIONS[interaction], listed=listed)
    x, y, *weights = (value.requires_grad_() for value in problem.network)
    focal = (0.25, 2.0, -1)
    labels = (problem.x_labels, problem.y_labels)
    opcheck(library.pair_logits.default, (x, y, *weights, problem.pairs, interaction))
    opcheck(library.pair_focal_loss.default, (x, y, *labels, *weights, problem.pairs, interaction, *focal))
    opcheck(library.pair_focal_loss_sum.default, (x, y, *labels, *weights, problem.pairs, interaction, *focal, True, True))
    apart = [value.detach() for value in (x, y, *weights)]
    opcheck(library.pair_focal_loss_sum.default, (*apart[:2], *labels, *apart[2:], problem.pairs, interaction, *focal, False, False))
    grad = problem.grad.float()
    opcheck(library.pair_logits_backward.default, (grad, *apart, problem.pairs, interaction))
    opcheck(library.pair_focal_loss_backward.default, (grad, *apart[:2], *labels, *apart[2:], problem.pairs, interaction, *focal))


def _step(x, y, x_labels, y_labels, weights, interaction, pairs):
    loss = ops.pair_focal_loss(x, y, x_labels, y_labels, *weights, interaction=interaction, pairs=pairs)
    some = ops.pair_focal_loss(x, y, x_labels, y_labels, *weights, interaction=interaction, reduction="none")
    return loss, some, ops.pair_logits(x, y, *weights, interaction=interaction)


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile(dynamic, interaction, device):
    torch.compiler.reset()  # every case is another specialisation of the same function
    compiled = torch.compile(_step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in [(5, 8, 6, 12), (7, 9, 6, 12)]:
        results = []
        for function in (compiled, _step):
            problem = Problem(*size, torch.float32, device, interaction=interaction, listed=11)
            x, y, *weights = (value.requires_grad_() for value in problem.network)
            out = function(x, y, problem.x_labels, problem.y_labels, weights, interaction, problem.pairs)
            sum(each.sum() for each in out).backward()
            results.append((*out, x.grad, y.grad, *(w.grad for w in weights)))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)


def test_torch_compile_inductor(device):
    problem = Problem(5, 8, 6, 12, torch.float32, device)

    def loss(network, x_labels, y_labels):
        return ops.pair_focal_loss(*network[:2], x_labels, y_labels, *network[2:])

    arguments = (problem.network, problem.x_labels, problem.y_labels)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(*arguments), loss(*arguments))


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(low, interaction, device):
    """x, y and w1 go in autocast's dtype; the loss stays float32 and gradients have the dtype of what they belong to."""
    problem = Problem(9, 16, 8, 12, torch.float32, device, interaction=interaction)
    with torch.autocast(device, low):
        logits, loss = problem.logits(ops), problem.loss(ops)
        no_grad = ops.pair_logits(*problem.network, interaction=interaction)
    assert {x.dtype for x in (*logits, *loss, no_grad)} == {torch.float32}
    rounded = Problem(9, 16, 8, 12, torch.float32, device, interaction=interaction)
    rounded.network[:3] = [value.to(low).float() for value in rounded.network[:3]]
    for ours, expected in ((logits, rounded.logits(reference)), (loss, rounded.loss(reference))):
        for index, (a, b) in enumerate(zip(ours, expected, strict=True)):
            tolerance = torch.finfo(low).eps if index in (1, 2, 3) else 1e-5  # those gradients come back through the rounding
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1, float(b.abs().max())))


def _everything(problem):
    return [*problem.logits(ops), *problem.loss(ops), *problem.loss(ops, reduction="none", gamma=0.5)]


CASES = [(i, listed) for i in INTERACTIONS for listed in (None, 30_000)]


@pytest.mark.parametrize(("interaction", "listed"), CASES, ids=str)
def test_bits_do_not_depend_on_threads_or_run(interaction, listed):
    problem = Problem(130, 300, 17, 40, torch.float32, interaction=interaction, listed=listed)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            x, y, w1, b1, w2, b2 = problem.network
            if interaction == "concat":  # products with ones and zeros, as the bits of torch's products are its own business
                x, y = (torch.linspace(-1, 1, 130 * 40).view(130, 40), torch.linspace(1, -1, 300 * 40).view(300, 40).sin())
                w1, b1 = torch.eye(40).repeat(1, 2), torch.zeros(40)
            arguments = (x, y, problem.x_labels, problem.y_labels, w1, b1, w2, b2, problem.pairs, INTERACTIONS.index(interaction))
            loss, grad_x, grad_y, grad_w1, grad_b1, *rest = torch.ops.ssmkernels.pair_focal_loss_sum(*arguments, 0.25, 2.0, -1, True, True)
            results.append((loss, grad_x, grad_y, *rest, *(() if interaction == "concat" else (grad_w1, grad_b1))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_bits_do_not_depend_on_the_run_on_a_gpu():
    for interaction, listed in CASES:
        problem = Problem(130, 300, 32, 64, torch.float32, "cuda", interaction=interaction, listed=listed)
        first, second = _everything(problem), _everything(problem)
        assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_calls_from_several_threads():
    problem = Problem(40, 70, 8, 20, torch.float32)
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
            for interaction, listed in CASES:
                problem = Problem(35, 70, 33, 50, dtype, interaction=interaction, listed=listed)
                compare(problem, dtype, lambda p, room: p.loss(room, gamma=0.5))
    finally:
        _C.set_isa(chosen)


def test_inputs_are_not_written(device):
    problem = Problem(9, 16, 8, 12, torch.float32, device, listed=30)
    before = [value.clone() for value in (*problem.network, problem.x_labels, problem.y_labels, problem.pairs)]
    problem.logits(ops), problem.loss(ops)
    after = (*problem.network, problem.x_labels, problem.y_labels, problem.pairs)
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))


def _peak_case(interaction, device="cpu"):
    return Problem(1024, 1024, 32, 64, torch.float32, device, interaction=interaction)


@pytest.mark.gpu
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_peak_memory_on_a_gpu(interaction):
    problem = _peak_case(interaction, "cuda")
    problem.loss(ops)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    problem.loss(ops)
    extra = torch.cuda.max_memory_allocated() - base
    assert extra < 1024 * 1024 * 32 * 4 / 4, f"{extra} bytes: a quarter of an [n, m, d] tensor"


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_peak_memory(interaction):
    """Peak resident memory of forward and backward stays far below an [n, m, d] tensor, of 128 MiB."""
    resource = pytest.importorskip("resource", reason="POSIX only")
    problem = _peak_case(interaction)
    Problem(8, 8, 32, 64, torch.float32, interaction=interaction).loss(ops)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem.loss(ops)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert extra < 24 * 2**20, f"{extra / 2**20:.1f} MiB more"


@pytest.mark.gpu
def test_cuda_graph():
    first, second = (Problem(40, 60, 16, 32, torch.float32, "cuda", seed=seed, listed=100) for seed in (0, 1))
    network = [value.requires_grad_() for value in first.network]

    def step():
        x, y, *weights = network
        loss = ops.pair_focal_loss(x, y, first.x_labels, first.y_labels, *weights, pairs=first.pairs)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    for value in network:
        value.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        for mine, theirs in zip((*network, first.pairs), (*second.network, second.pairs), strict=True):
            mine.copy_(theirs)
    first.x_labels.copy_(second.x_labels), first.y_labels.copy_(second.y_labels)
    for value in network:
        value.grad.zero_()
    graph.replay()
    for ours, expected in zip((loss, *(value.grad for value in network)), second.loss(ops), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.gpu
def test_beyond_2_31_elements():
    """More than 2³¹ logits: offsets are 64 bits wide."""
    n, m = 65536, 32771
    x = torch.zeros(n, 1, device="cuda")
    x[-1] = 3
    ones, none = torch.ones(1, 2, device="cuda"), torch.zeros(1, device="cuda")
    logits = ops.pair_logits(x, torch.ones(m, 1, device="cuda"), ones, none, ones[0, :1], none[0])
    assert (logits[-1] == 4).all() and (logits[-2] == 1).all() and (logits[0] == 1).all()


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize(("interaction", "listed"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 17, 5, 3), (33, 70, 32, 40)], ids=str)
def test_small_set(size, dtype, interaction, listed):
    """Every kernel once, at sizes that a sanitizer gets through."""
    cpu, gpu = (Problem(*size, dtype, device, interaction=interaction, listed=listed) for device in ("cpu", "cuda"))
    tolerance = 1e-10 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    for a, b in zip(_everything(cpu), _everything(gpu), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=tolerance, atol=tolerance * max(1, float(a.abs().max())))


@pytest.mark.gpu
@pytest.mark.parametrize(("interaction", "listed"), CASES, ids=str)
def test_device_parity(interaction, listed):
    cpu, gpu = (Problem(507, 300, 64, 128, device=device, interaction=interaction, listed=listed) for device in ("cpu", "cuda"))
    for a, b in zip(_everything(cpu), _everything(gpu), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-10, atol=1e-10 * max(1, float(a.abs().max())))


def _call(problem, **changes):
    arguments = dict(zip(NETWORK, problem.network, strict=True))
    arguments |= {"x_labels": problem.x_labels, "y_labels": problem.y_labels, "pairs": problem.pairs} | changes
    return ops.pair_focal_loss(**arguments)


BAD = [
    (lambda p: {"x": p.network[0][0]}, ValueError, r"x must be \[n, d\], got shape \[6\]"),
    (lambda p: {"x": [[1.0]]}, TypeError, r"x must be a tensor \[n, d\], got list"),
    (lambda p: {"y": p.network[1][:, :3]}, ValueError, r"y must have d of x = 6 in dimension 1, got shape \[5, 3\]"),
    (lambda p: {"y": p.network[1].double()}, TypeError, r"y is torch.float64 but x is torch.float32"),
    (lambda p: {"w1": p.network[2][:, :6]}, ValueError, r"w1 must have 2d of x = 12 in dimension 1, got shape \[8, 6\]"),
    (lambda p: {"interaction": "absdiff"}, ValueError, r"w1 must have d of x = 6 in dimension 1, got shape \[8, 12\]"),
    (lambda p: {"interaction": "sum"}, ValueError, r"interaction must be 'concat', 'absdiff' or 'product', got 'sum'"),
    (lambda p: {"w1": p.network[2].long()}, TypeError, r"w1 must be float32, float64, bfloat16 or float16, got torch.int64"),
    (lambda p: {"b1": p.network[3][:3]}, ValueError, r"b1 must have h of w1 = 8 in dimension 0, got shape \[3\]"),
    (lambda p: {"w2": p.network[4][None]}, ValueError, r"w2 must be \[h\], got shape \[1, 8\]"),
    (lambda p: {"w2": p.network[4][:3]}, ValueError, r"w2 must have h of w1 = 8 in dimension 0, got shape \[3\]"),
    (lambda p: {"b2": p.network[5][None]}, ValueError, r"b2 must be \[\], got shape \[1\]"),
    (lambda p: {"b2": 0.0}, TypeError, r"b2 must be a tensor \[\], got float"),
    (lambda p: {"x_labels": p.x_labels.int()}, TypeError, r"x_labels must be int64, got torch.int32"),
    (lambda p: {"x_labels": p.x_labels[:2]}, ValueError, r"x_labels must have n of x = 4 in dimension 0, got shape \[2\]"),
    (lambda p: {"y_labels": p.y_labels[:2]}, ValueError, r"y_labels must have m of y = 5 in dimension 0, got shape \[2\]"),
    (lambda p: {"y_labels": None}, TypeError, r"y_labels must be a tensor \[m\], got NoneType"),
    (lambda p: {"pairs": p.pairs.t()}, ValueError, r"pairs must have two rows = 2 in dimension 1, got shape \[2, 9\]"),
    (lambda p: {"pairs": p.pairs[0]}, ValueError, r"pairs must be \[p, 2\], got shape \[2\]"),
    (lambda p: {"pairs": p.pairs.int()}, TypeError, r"pairs must be int64, got torch.int32"),
    (lambda p: {"pairs": p.pairs * 0 + torch.tensor([4, 0])}, ValueError, r"pairs\[:, 0\] must be in \[0, 4\), the rows of x; got values"),
    (lambda p: {"pairs": p.pairs * 0 - torch.tensor([0, 1])}, ValueError, r"pairs\[:, 1\] must be in \[0, 5\), the rows of y; got values"),
    (lambda p: {"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
    (lambda p: {"alpha": "0.5"}, TypeError, r"alpha must be a number, got str"),
    (lambda p: {"gamma": -1.0}, ValueError, r"gamma must be finite and >= 0, got -1.0"),
    (lambda p: {"gamma": float("nan")}, ValueError, r"gamma must be finite and >= 0, got nan"),
    (lambda p: {"gamma": None}, TypeError, r"gamma must be a number, got NoneType"),
    (lambda p: {"ignore_index": 0.5}, TypeError, r"ignore_index must be an int, got float"),
    (lambda p: {"reduction": "average"}, ValueError, r"reduction must be 'mean', 'sum' or 'none', got 'average'"),
    (lambda p: {"y": p.network[1].to("meta")}, ValueError, r"y is on meta but x is on cpu"),
    (lambda p: {"x_labels": p.x_labels.to("meta")}, ValueError, r"x_labels is on meta but x is on cpu"),
    (lambda p: {"pairs": p.pairs.to("meta")}, ValueError, r"pairs is on meta but x is on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:48] for b in BAD])
def test_bad_input(change, error, message):
    problem = Problem(4, 5, 6, 8, torch.float32, listed=9)
    with pytest.raises(error, match=message):
        _call(problem, **change(problem))


def test_pairs_out_of_range_are_never_followed(device):
    """The operators below the checks skip them: logit and loss 0, no gradient."""
    library = torch.ops.ssmkernels
    for interaction in (0, 1, 2):
        problem = Problem(4, 5, 6, 6, torch.float32, device, interaction=INTERACTIONS[interaction])
        x, y, *weights = problem.network
        labels = (problem.x_labels.abs(), problem.y_labels.abs())
        good = torch.tensor([[1, 2], [3, 4]], device=device)
        mixed = torch.tensor([[1, 2], [4, 0], [-1, 3], [2, 5], [3, 4], [0, -(2**40)]], device=device)
        logits = library.pair_logits(x, y, *weights, mixed, interaction)
        assert logits[[0, 4]].equal(library.pair_logits(x, y, *weights, good, interaction)) and not logits[[1, 2, 3, 5]].any()
        ours, expected = (
            library.pair_focal_loss_sum(x, y, *labels, *weights, each, interaction, 0.25, 2.0, -1, True, True) for each in (mixed, good)
        )
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_nan_input_gives_nan_output(device):
    for interaction in INTERACTIONS:
        problem = Problem(4, 5, 6, 8, torch.float32, device, interaction=interaction)
        problem.network[0][2, 0] = torch.nan
        logits = ops.pair_logits(*problem.network, interaction=interaction)
        assert F.one_hot(torch.tensor(2), 4).bool().equal(logits.isnan().all(dim=1).cpu())

# SPDX-License-Identifier: BSD-3-Clause
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from ssmkernels.nn import MultiSimilarityLoss

SETTINGS = [(2.0, 50.0, 0.5), (0.01, 50.6, 0.56), (17.97, 75.66, 0.77)]
LABELS = ["several", "one class", "all distinct"]


def make(n=17, dim=5, kind="several", seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, dim, generator=generator, dtype=torch.float64) * 3
    labels = {
        "several": torch.randint(0, 4, (n,), generator=generator),
        "one class": torch.full((n,), 7),
        "all distinct": torch.arange(n),
    }[kind]
    return embeddings.to(dtype).requires_grad_(), labels


def assert_same(ours, theirs, *leaves):
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad(theirs, leaves, allow_unused=True, materialize_grads=True)
    actual = torch.autograd.grad(ours, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.fixture
def peer():
    return pytest.importorskip("pytorch_metric_learning")


def their_loss(*settings):
    from pytorch_metric_learning import losses

    return losses.MultiSimilarityLoss(*settings)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_is_the_literal_loop(kind, settings):
    alpha, beta, base = settings
    embeddings, labels = make(9, 4, kind)
    units = F.normalize(embeddings.detach()).tolist()
    total = 0.0
    for i, x in enumerate(units):
        sums = {True: 1.0, False: 1.0}
        for j, y in enumerate(units):
            if i != j:
                cosine, same = sum(a * b for a, b in zip(x, y, strict=True)), bool(labels[i] == labels[j])
                sums[same] += math.exp(-alpha * (cosine - base) if same else beta * (cosine - base))
        total += math.log(sums[True]) / alpha + math.log(sums[False]) / beta
    assert MultiSimilarityLoss(*settings)(embeddings, labels).item() == pytest.approx(total / len(units), rel=1e-10)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("size", [(1, 3), (2, 3), (17, 5), (123, 8)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_agrees_with_pytorch_metric_learning(peer, kind, size, settings):
    embeddings, labels = make(*size, kind)
    assert_same(MultiSimilarityLoss(*settings)(embeddings, labels), their_loss(*settings)(embeddings, labels), embeddings)


def test_the_defaults_are_theirs(peer):
    embeddings, labels = make()
    theirs, ours = their_loss(), MultiSimilarityLoss()
    assert (ours.alpha, ours.beta, ours.base) == (theirs.alpha, theirs.beta, theirs.base)
    assert_same(ours(embeddings, labels), theirs(embeddings, labels), embeddings)


@pytest.mark.parametrize("miner", ["BatchHardMiner", "MultiSimilarityMiner", "PairMarginMiner", "TripletMarginMiner"])
@pytest.mark.parametrize("kind", LABELS)
def test_takes_what_miners_give(peer, miner, kind):
    from pytorch_metric_learning import miners

    embeddings, labels = make(24, 6, kind)
    mined = getattr(miners, miner)()(embeddings, labels)
    assert_same(MultiSimilarityLoss()(embeddings, labels, mined), their_loss()(embeddings, labels, mined), embeddings)
    assert_same(MultiSimilarityLoss()(embeddings, indices_tuple=mined), their_loss()(embeddings, indices_tuple=mined), embeddings)


@pytest.mark.parametrize("columns", [1, 5, 40])
def test_references(peer, columns):
    embeddings, labels = make(12)
    references, reference_labels = make(columns, seed=1)
    arguments = {"ref_emb": references, "ref_labels": reference_labels}
    ours, theirs = MultiSimilarityLoss()(embeddings, labels, **arguments), their_loss()(embeddings, labels, **arguments)
    assert_same(ours, theirs, embeddings, references)


def test_which_pairs_of_two_views_count(peer):
    """pytorch-metric-learning leaves (i, i) out where ref_labels is the tensor labels, and only there."""
    embeddings, labels = make(20)
    for references in (embeddings, make(20, seed=1)[0]):
        values = []
        for reference_labels in (labels, labels.clone()):
            arguments = {"ref_emb": references, "ref_labels": reference_labels}
            values.append(MultiSimilarityLoss()(embeddings, labels, **arguments))
            assert_same(values[-1], their_loss()(embeddings, labels, **arguments), embeddings, references)
        assert values[0] != values[1]


@pytest.mark.parametrize("with_miner", [False, True])
def test_inside_their_cross_batch_memory(peer, with_miner):
    from pytorch_metric_learning import losses, miners

    memories = [
        losses.CrossBatchMemory(loss, 5, memory_size=40, miner=miners.MultiSimilarityMiner() if with_miner else None)
        for loss in (MultiSimilarityLoss(), their_loss())
    ]
    for step in range(5):  # 5 · 12 rows: round the memory once
        embeddings, labels = make(12, seed=step)
        assert_same(*(memory(embeddings, labels) for memory in memories), embeddings)


@pytest.mark.parametrize("listed", [(), (0,)])
def test_lists_of_one_pair_at_most_are_zero_as_there(peer, listed):
    embeddings, labels = make()
    index = torch.tensor(listed, dtype=torch.int64)
    for pairs in ((index, index + 1, index + 2), (index, index + 1, index, index + 2)):
        ours = MultiSimilarityLoss()(embeddings, labels, pairs)
        assert ours == 0
        assert_same(ours, their_loss()(embeddings, labels, pairs), embeddings)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_for_a_pair(rows):
    embeddings, labels = make(rows)
    loss = MultiSimilarityLoss()(embeddings, labels)
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()


def test_sharp_exponents_stay_finite():
    embeddings, labels = make(dtype=torch.float32)
    loss = MultiSimilarityLoss(1e4, 1e4, 0.0)(embeddings, labels)
    loss.backward()
    hardest = F.normalize(embeddings.detach()) @ F.normalize(embeddings.detach()).t()
    same = labels[:, None] == labels
    positive = (-hardest.masked_fill(~same, 1).min(dim=1).values).relu()
    negative = hardest.masked_fill(same, -1).max(dim=1).values.relu()
    torch.testing.assert_close(loss, (positive + negative).mean(), rtol=1e-3, atol=1e-3)  # log-sum-exp near its maximum
    assert embeddings.grad.isfinite().all()


def test_gradients():
    embeddings, labels = make(7, 3)
    assert torch.autograd.gradcheck(lambda x: MultiSimilarityLoss(2.0, 5.0)(x, labels), embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_and_autocast_are_computed_in_float32(dtype):
    embeddings, labels = make(30, dtype=dtype)
    expected = MultiSimilarityLoss()(embeddings.detach().double(), labels)
    loss = MultiSimilarityLoss()(embeddings, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = MultiSimilarityLoss()(embeddings, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cast)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert embeddings.grad.dtype == dtype


def test_compiles_in_one_graph():
    embeddings, labels = make(dtype=torch.float32)
    loss = MultiSimilarityLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(embeddings, labels), loss(embeddings, labels))


@pytest.mark.gpu
def test_agrees_with_the_cpu():
    embeddings, labels = make()
    here = embeddings.detach().cuda().requires_grad_()
    for listed in (None, tuple(torch.arange(6) + shift for shift in (0, 2, 9))):  # labels and indices may stay on the CPU
        expected, actual = MultiSimilarityLoss()(embeddings, labels, listed), MultiSimilarityLoss()(here, labels, listed)
        torch.testing.assert_close(actual.cpu(), expected)
        (expected,), (actual,) = torch.autograd.grad(expected, embeddings), torch.autograd.grad(actual, here)
        torch.testing.assert_close(actual.cpu(), expected)


def test_is_a_module_without_state():
    loss = copy.deepcopy(MultiSimilarityLoss(1, 20, 0.25))
    assert repr(loss) == "MultiSimilarityLoss(alpha=1.0, beta=20.0, base=0.25)"
    assert not loss.state_dict()


def test_bad_input():
    embeddings, labels = make()
    index = torch.arange(3)
    with pytest.raises(ValueError, match="indices_tuple lists a pair both as positive and as negative"):
        MultiSimilarityLoss()(embeddings, labels, (index, index + 1, index + 1))
    with pytest.raises(ValueError, match="labels and indices_tuple are both None"):
        MultiSimilarityLoss()(embeddings)
    with pytest.raises(TypeError, match="labels must be integers"):
        MultiSimilarityLoss()(embeddings, labels.float())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": 0.0}, ValueError, "alpha must be finite and > 0, got 0.0"),
        ({"beta": "50"}, TypeError, "beta must be a number, got str"),
        ({"base": float("inf")}, ValueError, "base must be finite, got inf"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        MultiSimilarityLoss(**settings)

# SPDX-License-Identifier: BSD-3-Clause
import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from pair_batches import LABELS, assert_same, make

from ssmkernels.nn import ContrastiveLoss, contrastive_loss

MARGINS = [(0.0, 1.0), (0.2652, 0.5409), (-0.2, 0.3841), (0.5, 1.7)]


def literal(embeddings, labels, positive_margin, negative_margin):
    """The sum over ordered pairs, each part divided by the number of its terms that are not 0."""
    units = F.normalize(embeddings)
    parts = {True: [], False: []}
    for i in range(len(units)):
        for j in range(len(units)):
            if i != j:
                distance = (units[i] - units[j]).norm()
                same = bool(labels[i] == labels[j])
                parts[same].append(F.relu(distance - positive_margin if same else negative_margin - distance))
    total = embeddings.new_zeros(())
    for losses in parts.values():
        total = total + sum(losses) / max(sum(bool(loss > 0) for loss in losses), 1)
    return total


def their_losses(**settings):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    return losses.ContrastiveLoss(**settings)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize(("positive_margin", "negative_margin"), MARGINS)
def test_is_the_literal_loop(kind, positive_margin, negative_margin):
    embeddings, labels = make(9, 4, kind)
    ours = ContrastiveLoss(positive_margin, negative_margin)(embeddings, labels)
    assert_same(ours, literal(embeddings, labels, positive_margin, negative_margin), embeddings)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("size", [(1, 3), (2, 3), (17, 5), (64, 16), (123, 8)])
@pytest.mark.parametrize(("positive_margin", "negative_margin"), MARGINS)
def test_agrees_with_pytorch_metric_learning(kind, size, positive_margin, negative_margin):
    embeddings, labels = make(*size, kind)
    theirs = their_losses(pos_margin=positive_margin, neg_margin=negative_margin)(embeddings, labels)
    assert_same(ContrastiveLoss(positive_margin, negative_margin)(embeddings, labels), theirs, embeddings)


@pytest.mark.parametrize("kind", ["several", "one pair"])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("reduction", "reducer"),
    [("mean", "MeanReducer"), ("sum", "SumReducer"), ("mean_nonzero", "AvgNonZeroReducer")],
)
def test_reductions_are_their_reducers(kind, listed, reduction, reducer):
    from pytorch_metric_learning import reducers
    from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices

    embeddings, labels = make(kind=kind)
    pairs = get_all_pairs_indices(labels) if listed else None
    theirs = their_losses(pos_margin=0.3, reducer=getattr(reducers, reducer)())(embeddings, labels, pairs)
    assert_same(ContrastiveLoss(0.3, reduction=reduction)(embeddings, labels, pairs), theirs, embeddings)


@pytest.mark.parametrize("count", [3, 4])
def test_listed_pairs_of_references(count):
    embeddings, labels = make(12)
    references, reference_labels = make(30, seed=1)
    generator = torch.Generator().manual_seed(2)
    rows, columns = ([torch.randint(0, size, (50,), generator=generator) for _ in range(2)] for size in (12, 30))
    listed = (rows[0], *columns) if count == 3 else (rows[0], columns[0], rows[1][:31], columns[1][:31])
    arguments = {"indices_tuple": listed, "ref_emb": references, "ref_labels": reference_labels}
    assert_same(
        ContrastiveLoss(0.2)(embeddings, labels, **arguments),
        their_losses(pos_margin=0.2)(embeddings, labels, **arguments),
        embeddings,
        references,
    )
    assert_same(
        ContrastiveLoss()(embeddings, indices_tuple=listed, ref_emb=references),
        their_losses()(embeddings, None, listed, references),
        embeddings,
    )


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("listed", [False, True])
def test_where_no_pair_costs_the_gradient_is_zero(kind, listed):
    embeddings, labels = make(kind=kind)
    pairs = tuple(torch.arange(1, 8) - shift for shift in (0, 1, 1)) if listed else None
    loss = ContrastiveLoss(2.0, 0.0)(embeddings, labels, pairs)
    loss.backward()
    assert loss == 0
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


@pytest.mark.parametrize("dense", [0, 10**6])
@pytest.mark.parametrize("listed", [False, True])
def test_equal_rows_have_no_gradient_towards_each_other(monkeypatch, listed, dense):
    monkeypatch.setattr(contrastive_loss, "DENSE_LIST", dense)
    embeddings = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    pairs = [torch.tensor(index) for index in ([0, 1], [1, 0], [0, 1, 2, 2], [2, 2, 0, 1])] if listed else None
    loss = ContrastiveLoss(0.0, 3.0)(embeddings, labels, pairs)
    expected = literal(embeddings, labels, 0.0, 3.0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert embeddings.grad.isfinite().all()
    torch.testing.assert_close(embeddings.grad[0], embeddings.grad[1])
    units = F.normalize(embeddings)
    (towards_the_third,) = torch.autograd.grad(-(units[0] - units[2]).norm() / 2, embeddings)
    torch.testing.assert_close(embeddings.grad[0], towards_the_third[0])


@pytest.mark.parametrize("dense", [0, 10**6])
@pytest.mark.parametrize("chunk", [100, 1000, 10**6])
def test_how_listed_pairs_are_cut_changes_nothing(monkeypatch, dense, chunk):
    embeddings, labels = make(40, 6)
    references, _ = make(31, 6, seed=1)
    generator = torch.Generator().manual_seed(3)
    listed = tuple(torch.randint(0, 31, (500,), generator=generator) for _ in range(4))
    whole = ContrastiveLoss(0.2)(embeddings, labels, listed, references)
    monkeypatch.setattr(contrastive_loss, "DENSE_LIST", dense)
    monkeypatch.setattr(contrastive_loss, "CHUNK_ELEMENTS", chunk)
    assert_same(ContrastiveLoss(0.2)(embeddings, labels, listed, references), whole, embeddings, references)


@pytest.mark.parametrize(("rows", "count"), [(200, 3000), (50, 3000)])
def test_memory_of_listed_pairs_is_that_of_the_list(monkeypatch, rows, count):
    embeddings, labels = make(rows, 64)
    listed = tuple(torch.randint(0, rows, (count,)) for _ in range(4))
    monkeypatch.setattr(contrastive_loss, "CHUNK_ELEMENTS", embeddings.numel())
    with LargestTensor() as largest:
        ContrastiveLoss()(embeddings, labels, listed).backward()
    assert largest.elements <= max(embeddings.numel(), 2 * count)  # of 2 · count · 64 differences


def test_all_pairs_need_no_matrix():
    embeddings, labels = make(300, 4)
    with LargestTensor() as largest:
        ContrastiveLoss()(embeddings, labels).backward()
    assert largest.elements == embeddings.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_listed_pairs_of_half_types_and_under_autocast_are_computed_in_float32(dtype):
    embeddings, labels = make(30, dtype=dtype)
    pairs = tuple(torch.randint(0, 30, (99,)) for _ in range(3))
    expected = ContrastiveLoss(0.1)(embeddings.detach().double(), labels, pairs)
    loss = ContrastiveLoss(0.1)(embeddings, labels, pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ContrastiveLoss(0.1)(embeddings, labels, pairs)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cast)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert embeddings.grad.dtype == dtype


@pytest.mark.gpu
@pytest.mark.sanitizer
def test_agrees_with_the_cpu():
    embeddings, labels = make()
    references, reference_labels = make(9, seed=1)
    listed = tuple(torch.arange(6) + shift for shift in (0, 2, 3))
    here, there = embeddings.detach().cuda().requires_grad_(), references.detach().cuda().requires_grad_()
    calls = [({}, {}), ({"indices_tuple": listed}, {"indices_tuple": listed})]  # labels and indices may stay on the CPU
    calls += [
        (
            {"ref_emb": references, "ref_labels": reference_labels},
            {"ref_emb": there, "ref_labels": reference_labels},
        )
    ]
    for on_cpu, on_gpu in calls:
        expected, actual = (
            ContrastiveLoss(0.1)(embeddings, labels, **on_cpu),
            ContrastiveLoss(0.1)(here, labels, **on_gpu),
        )
        torch.testing.assert_close(actual.cpu(), expected)
        (expected,), (actual,) = torch.autograd.grad(expected, embeddings), torch.autograd.grad(actual, here)
        torch.testing.assert_close(actual.cpu(), expected)


INDEX = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"embeddings": torch.zeros(17)}, ValueError, r"embeddings must be \[n, d\], got shape \[17\]"),
        ({"embeddings": torch.zeros(17, 5, dtype=torch.int64)}, TypeError, "embeddings must be float32"),
        ({"labels": torch.zeros(17)}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": INDEX}, ValueError, "labels must have the rows of embeddings = 17 in dimension 0, got shape"),
        ({"labels": None}, ValueError, "labels and indices_tuple are both None"),
        ({"indices_tuple": (INDEX, INDEX)}, ValueError, r"indices_tuple must be 3 tensors .* or 4 .*, got 2 elements"),
        ({"indices_tuple": INDEX}, ValueError, "got Tensor"),
        (
            {"indices_tuple": (INDEX, INDEX, INDEX[:2])},
            ValueError,
            "the negative pairs of indices_tuple must be two lists of one length, got 3 and 2",
        ),
        (
            {"indices_tuple": (INDEX, INDEX, INDEX + 17)},
            ValueError,
            r"the second of the negative pairs of indices_tuple must be in \[0, 17\)",
        ),
        ({"indices_tuple": (INDEX.double(), INDEX, INDEX)}, TypeError, r"indices_tuple\[0\] must be integers"),
        ({"ref_labels": torch.zeros(17, dtype=torch.int64)}, ValueError, "ref_labels was given without ref_emb"),
        ({"ref_emb": torch.zeros(4, 5)}, ValueError, "ref_labels must be given with ref_emb"),
        (
            {"ref_emb": torch.zeros(4, 6), "ref_labels": INDEX},
            ValueError,
            "ref_emb must have d of embeddings = 5 in dimension 1",
        ),
        (
            {"ref_emb": torch.zeros(4, 5), "ref_labels": INDEX},
            ValueError,
            "ref_labels must have the rows of ref_emb = 4",
        ),
    ],
)
def test_bad_input(changed, error, message):
    embeddings, labels = make()
    with pytest.raises(error, match=message):
        ContrastiveLoss()(**{"embeddings": embeddings, "labels": labels, **changed})

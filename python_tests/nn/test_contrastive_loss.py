# SPDX-License-Identifier: BSD-3-Clause
import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ssmkernels.nn import ContrastiveLoss, contrastive_loss

MARGINS = [(0.0, 1.0), (0.2652, 0.5409), (-0.2, 0.3841), (0.5, 1.7)]
LABELS = ["several", "one class", "all distinct", "one pair"]


def make(n=17, dim=5, kind="several", seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, dim, generator=generator, dtype=torch.float64) * 3
    labels = {
        "several": torch.randint(0, 4, (n,), generator=generator),
        "one class": torch.full((n,), 7),
        "all distinct": torch.arange(n),
        "one pair": torch.arange(n).clamp_max(max(n - 2, 0)),
    }[kind]
    return embeddings.to(dtype).requires_grad_(), labels


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


def assert_same(ours, theirs, *leaves):
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad(theirs, leaves, allow_unused=True, materialize_grads=True)
    actual = torch.autograd.grad(ours, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.fixture
def peer():
    return pytest.importorskip("pytorch_metric_learning")


def their_losses(**settings):
    from pytorch_metric_learning import losses

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
def test_agrees_with_pytorch_metric_learning(peer, kind, size, positive_margin, negative_margin):
    embeddings, labels = make(*size, kind)
    theirs = their_losses(pos_margin=positive_margin, neg_margin=negative_margin)(embeddings, labels)
    assert_same(ContrastiveLoss(positive_margin, negative_margin)(embeddings, labels), theirs, embeddings)


def test_the_defaults_are_theirs(peer):
    embeddings, labels = make()
    theirs, ours = their_losses(), ContrastiveLoss()
    assert (ours.pos_margin, ours.neg_margin) == (theirs.pos_margin, theirs.neg_margin)
    assert_same(ours(embeddings, labels), theirs(embeddings, labels), embeddings)


@pytest.mark.parametrize("kind", ["several", "one pair"])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("reduction", "reducer"), [("mean", "MeanReducer"), ("sum", "SumReducer"), ("mean_nonzero", "AvgNonZeroReducer")])
def test_reductions_are_their_reducers(peer, kind, listed, reduction, reducer):
    from pytorch_metric_learning import reducers
    from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices

    embeddings, labels = make(kind=kind)
    pairs = get_all_pairs_indices(labels) if listed else None
    theirs = their_losses(pos_margin=0.3, reducer=getattr(reducers, reducer)())(embeddings, labels, pairs)
    assert_same(ContrastiveLoss(0.3, reduction=reduction)(embeddings, labels, pairs), theirs, embeddings)


@pytest.mark.parametrize(
    "miner",
    ["BatchEasyHardMiner", "BatchHardMiner", "MultiSimilarityMiner", "PairMarginMiner", "TripletMarginMiner", "UniformHistogramMiner"],
)
@pytest.mark.parametrize("kind", LABELS)
def test_takes_what_miners_give(peer, miner, kind):
    from pytorch_metric_learning import miners

    embeddings, labels = make(24, 6, kind)
    mined = getattr(miners, miner)()(embeddings, labels)
    assert_same(
        ContrastiveLoss(0.1, 0.9)(embeddings, labels, mined),
        their_losses(pos_margin=0.1, neg_margin=0.9)(embeddings, labels, mined),
        embeddings,
    )
    assert_same(ContrastiveLoss()(embeddings, indices_tuple=mined), their_losses()(embeddings, indices_tuple=mined), embeddings)


@pytest.mark.parametrize("columns", [1, 5, 40])
def test_references(peer, columns):
    embeddings, labels = make(12)
    references, reference_labels = make(columns, seed=1)
    arguments = {"ref_emb": references, "ref_labels": reference_labels}
    assert_same(
        ContrastiveLoss(0.2)(embeddings, labels, **arguments),
        their_losses(pos_margin=0.2)(embeddings, labels, **arguments),
        embeddings,
        references,
    )


def test_which_pairs_of_two_views_count(peer):
    """pytorch-metric-learning leaves (i, i) out where ref_labels is the tensor labels, and only there."""
    embeddings, labels = make(20)
    view, _ = make(20, seed=1)
    ours, theirs = ContrastiveLoss(0.1), their_losses(pos_margin=0.1)
    for references in (embeddings, view):
        values = []
        for reference_labels in (labels, labels.clone()):
            arguments = {"ref_emb": references, "ref_labels": reference_labels}
            values.append(ours(embeddings, labels, **arguments))
            assert_same(values[-1], theirs(embeddings, labels, **arguments), embeddings, references)
        assert torch.isclose(*values, rtol=1e-10) == (references is embeddings)  # a point is no farther from itself than the margin
    assert torch.equal(ours(embeddings, labels, ref_emb=embeddings, ref_labels=labels), ours(embeddings, labels))


@pytest.mark.parametrize("count", [3, 4])
def test_listed_pairs_of_references(peer, count):
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


@pytest.mark.parametrize("with_miner", [False, True])
def test_inside_their_cross_batch_memory(peer, with_miner):
    from pytorch_metric_learning import losses, miners

    memories = [
        losses.CrossBatchMemory(loss, 5, memory_size=40, miner=miners.MultiSimilarityMiner() if with_miner else None)
        for loss in (ContrastiveLoss(0.1, 0.8), their_losses(pos_margin=0.1, neg_margin=0.8))
    ]
    for step in range(5):  # 5 · 12 rows: round the memory once
        embeddings, labels = make(12, seed=step)
        assert_same(*(memory(embeddings, labels) for memory in memories), embeddings)


@pytest.mark.parametrize("symmetric", [False, True])
def test_inside_their_self_supervised_loss(peer, symmetric):
    from pytorch_metric_learning import losses

    embeddings, view = make(12)[0], make(12, seed=1)[0]
    wrapped = (losses.SelfSupervisedLoss(loss, symmetric=symmetric) for loss in (ContrastiveLoss(), their_losses()))
    assert_same(*(loss(embeddings, view) for loss in wrapped), embeddings, view)


@pytest.mark.parametrize("listed", [(), (0,)])
def test_lists_of_one_pair_at_most_are_zero_as_there(peer, listed):
    embeddings, labels = make()
    index = torch.tensor(listed, dtype=torch.int64)
    for pairs in ((index, index + 1, index + 2), (index, index + 1, index, index + 2)):
        ours = ContrastiveLoss()(embeddings, labels, pairs)
        assert ours == 0
        assert_same(ours, their_losses()(embeddings, labels, pairs), embeddings)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("listed", [False, True])
def test_where_no_pair_costs_the_gradient_is_zero(kind, listed):
    embeddings, labels = make(kind=kind)
    pairs = tuple(torch.arange(1, 8) - shift for shift in (0, 1, 1)) if listed else None
    loss = ContrastiveLoss(2.0, -1.0)(embeddings, labels, pairs)
    loss.backward()
    assert loss == 0
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_for_a_pair(rows):
    embeddings, labels = make(rows)
    loss = ContrastiveLoss()(embeddings, labels)
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()


@pytest.mark.parametrize("dense", [0, 10**6])
@pytest.mark.parametrize("listed", [False, True])
def test_equal_rows_have_no_gradient_towards_each_other(monkeypatch, listed, dense):
    monkeypatch.setattr(contrastive_loss, "DENSE_LIST", dense)
    embeddings = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    pairs = (torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0, 1, 2, 2]), torch.tensor([2, 2, 0, 1])) if listed else None
    loss = ContrastiveLoss(0.0, 3.0)(embeddings, labels, pairs)
    expected = literal(embeddings, labels, 0.0, 3.0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert embeddings.grad.isfinite().all()
    torch.testing.assert_close(embeddings.grad[0], embeddings.grad[1])
    (towards_the_third,) = torch.autograd.grad(-(F.normalize(embeddings)[0] - F.normalize(embeddings)[2]).norm() / 2, embeddings)
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


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


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


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_and_autocast_are_computed_in_float32(listed, dtype):
    embeddings, labels = make(30, dtype=dtype)
    pairs = tuple(torch.randint(0, 30, (99,)) for _ in range(3)) if listed else None
    expected = ContrastiveLoss(0.1)(embeddings.detach().double(), labels, pairs)
    loss = ContrastiveLoss(0.1)(embeddings, labels, pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ContrastiveLoss(0.1)(embeddings, labels, pairs)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cast)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert embeddings.grad.dtype == dtype


def test_labels_of_any_integer_type():
    embeddings, labels = make()
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(ContrastiveLoss()(embeddings, labels.to(dtype)), ContrastiveLoss()(embeddings, labels))


def test_compiles_in_one_graph():
    embeddings, labels = make(dtype=torch.float32)
    loss = ContrastiveLoss(0.1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(embeddings, labels), loss(embeddings, labels))
    references, reference_labels = make(9, seed=1, dtype=torch.float32)
    arguments = {"ref_emb": references, "ref_labels": reference_labels}
    torch.testing.assert_close(compiled(embeddings, labels, **arguments), loss(embeddings, labels, **arguments))


@pytest.mark.gpu
@pytest.mark.sanitizer
def test_agrees_with_the_cpu():
    embeddings, labels = make()
    references, reference_labels = make(9, seed=1)
    listed = tuple(torch.arange(6) + shift for shift in (0, 2, 3))
    here, there = embeddings.detach().cuda().requires_grad_(), references.detach().cuda().requires_grad_()
    calls = [({}, {}), ({"indices_tuple": listed}, {"indices_tuple": listed})]  # labels and indices may stay on the CPU
    calls += [({"ref_emb": references, "ref_labels": reference_labels}, {"ref_emb": there, "ref_labels": reference_labels})]
    for on_cpu, on_gpu in calls:
        expected, actual = ContrastiveLoss(0.1)(embeddings, labels, **on_cpu), ContrastiveLoss(0.1)(here, labels, **on_gpu)
        torch.testing.assert_close(actual.cpu(), expected)
        (expected,), (actual,) = torch.autograd.grad(expected, embeddings), torch.autograd.grad(actual, here)
        torch.testing.assert_close(actual.cpu(), expected)


def test_is_a_module_without_state():
    loss = copy.deepcopy(ContrastiveLoss(0.1, 0.7, reduction="mean"))
    assert repr(loss) == "ContrastiveLoss(pos_margin=0.1, neg_margin=0.7, reduction='mean')"
    assert not loss.state_dict()


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
        ({"ref_emb": torch.zeros(4, 5)}, ValueError, "ref_labels is None; with ref_emb"),
        ({"ref_emb": torch.zeros(4, 6), "ref_labels": INDEX}, ValueError, "ref_emb must have d of embeddings = 5 in dimension 1"),
        ({"ref_emb": torch.zeros(4, 5), "ref_labels": INDEX}, ValueError, "ref_labels must have the rows of ref_emb = 4"),
    ],
)
def test_bad_input(changed, error, message):
    embeddings, labels = make()
    with pytest.raises(error, match=message):
        ContrastiveLoss()(**{"embeddings": embeddings, "labels": labels, **changed})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"pos_margin": "0"}, TypeError, "pos_margin must be a number, got str"),
        ({"neg_margin": float("nan")}, ValueError, "neg_margin must be finite, got nan"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean_nonzero', 'mean' or 'sum', got 'none'"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        ContrastiveLoss(**settings)

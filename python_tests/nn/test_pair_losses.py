# SPDX-License-Identifier: BSD-3-Clause
"""What the losses over pairs share: pytorch-metric-learning's calling convention, its wrappers, and labels to
ignore.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from largest_tensor import LargestTensor
from pair_batches import LABELS, assert_same, make

from ssmkernels.nn import ContrastiveLoss, MultiSimilarityLoss, SimilarityDistributionLoss

BOTH = pytest.mark.parametrize("ours", [ContrastiveLoss, MultiSimilarityLoss], ids=lambda loss: loss.__name__)
MINERS = [
    "BatchEasyHardMiner",
    "BatchHardMiner",
    "MultiSimilarityMiner",
    "PairMarginMiner",
    "TripletMarginMiner",
    "UniformHistogramMiner",
]


@pytest.fixture
def losses():
    return pytest.importorskip("pytorch_metric_learning.losses")


def theirs_of(losses, ours):
    return getattr(losses, ours.__name__)


@BOTH
def test_the_defaults_are_theirs(losses, ours):
    embeddings, labels = make()
    mine, theirs = ours(), theirs_of(losses, ours)()
    for name in ("pos_margin", "neg_margin", "alpha", "beta", "base"):
        assert getattr(mine, name, None) == getattr(theirs, name, None)
    assert_same(mine(embeddings, labels), theirs(embeddings, labels), embeddings)


@BOTH
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("kind", LABELS)
def test_takes_what_miners_give(losses, ours, miner, kind):
    from pytorch_metric_learning import miners

    embeddings, labels = make(24, 6, kind)
    mined = getattr(miners, miner)()(embeddings, labels)
    mine, theirs = ours(), theirs_of(losses, ours)()
    assert_same(mine(embeddings, labels, mined), theirs(embeddings, labels, mined), embeddings)
    assert_same(mine(embeddings, indices_tuple=mined), theirs(embeddings, indices_tuple=mined), embeddings)


@BOTH
@pytest.mark.parametrize("columns", [1, 5, 40])
def test_references(losses, ours, columns):
    embeddings, labels = make(12)
    references, reference_labels = make(columns, seed=1)
    arguments = (embeddings, labels, None, references, reference_labels)
    assert_same(ours()(*arguments), theirs_of(losses, ours)()(*arguments), embeddings, references)


@BOTH
def test_which_pairs_of_two_views_count(losses, ours):
    """(i, i) is left out where ref_labels is the tensor labels or is not given, and only there."""
    embeddings, labels = make(20)
    mine, theirs = ours(), theirs_of(losses, ours)()
    for references in (embeddings, make(20, seed=1)[0]):
        values = []
        for reference_labels in (labels, None, labels.clone()):
            arguments = (embeddings, labels, None, references, reference_labels)
            values.append(mine(*arguments))
            assert_same(values[-1], theirs(*arguments), embeddings, references)
        assert torch.equal(values[0], values[1])
        # To the contrastive loss, a point is no farther from itself than the margin.
        assert torch.isclose(values[0], values[2]) == (references is embeddings and ours is ContrastiveLoss)


@BOTH
@pytest.mark.parametrize("listed", [(), (0,)])
def test_lists_of_one_pair_at_most_are_zero_as_there(losses, ours, listed):
    embeddings, labels = make()
    index = torch.tensor(listed, dtype=torch.int64)
    for pairs in ((index, index + 1, index + 2), (index, index + 1, index, index + 2)):
        value = ours()(embeddings, labels, pairs)
        assert value == 0
        assert_same(value, theirs_of(losses, ours)()(embeddings, labels, pairs), embeddings)


@BOTH
@pytest.mark.parametrize(
    ("labels", "reference_labels"), [([0], [0]), ([0], [1]), ([0], [0, 1]), ([0], [1, 1]), ([0, 0], [0]), ([1, 0], [0])]
)
def test_labels_that_make_one_pair_at_most_are_zero_as_there(losses, ours, labels, reference_labels):
    embeddings, references = make(len(labels))[0], make(len(reference_labels), seed=1)[0]
    arguments = (embeddings, torch.tensor(labels), None, references, torch.tensor(reference_labels))
    assert_same(ours()(*arguments), theirs_of(losses, ours)()(*arguments), embeddings, references)


@BOTH
@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_for_a_pair(ours, rows):
    embeddings, labels = make(rows)
    loss = ours()(embeddings, labels)
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()


@BOTH
def test_labels_of_any_integer_type(ours):
    embeddings, labels = make()
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(ours()(embeddings, labels.to(dtype)), ours()(embeddings, labels))


# Their wrappers.


@BOTH
@pytest.mark.parametrize("with_miner", [False, True])
def test_inside_their_cross_batch_memory(losses, ours, with_miner):
    from pytorch_metric_learning import miners

    miner = miners.MultiSimilarityMiner() if with_miner else None
    both = ours(), theirs_of(losses, ours)()
    memories = [losses.CrossBatchMemory(loss, 5, memory_size=40, miner=miner) for loss in both]
    for step in range(5):  # 5 · 12 rows: round the memory once
        embeddings, labels = make(12, seed=step)
        assert_same(*(memory(embeddings, labels) for memory in memories), embeddings)


@BOTH
@pytest.mark.parametrize("symmetric", [False, True])
def test_inside_their_self_supervised_loss(losses, ours, symmetric):
    embeddings, view = make(12)[0], make(12, seed=1)[0]
    wrapped = (losses.SelfSupervisedLoss(loss, symmetric=symmetric) for loss in (ours(), theirs_of(losses, ours)()))
    assert_same(*(loss(embeddings, view) for loss in wrapped), embeddings, view)


WRAPPED = """
import os, sys
import torch
from pair_batches import results_of_this_rank
from ssmkernels.nn import ContrastiveLoss, MultiSimilarityLoss

torch.distributed.init_process_group("gloo")
torch.save(results_of_this_rank((ContrastiveLoss, MultiSimilarityLoss)), f"{sys.argv[1]}/rank{os.environ['RANK']}.pt")
"""


def test_inside_their_distributed_loss_wrapper(losses, ranks, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{WRAPPED}")
    statuses, output = ranks(2, script, tmp_path)
    assert statuses == [0, 0], output
    results = {}
    for rank in range(2):
        results |= torch.load(tmp_path / f"rank{rank}.pt")
    assert len(results) == 2 * 2 * 2 * 2  # ranks, losses, efficient or not, ours or theirs
    for (*place, _), (value, gradient) in results.items():
        expected, expected_gradient = results[(*place, False)]
        assert value == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-11)


@BOTH
def test_is_an_instance_of_their_base_class_in_name_only(losses, ours):
    loss = ours()
    assert isinstance(loss, losses.BaseMetricLossFunction)
    assert isinstance(loss, ours)
    assert type(loss).__name__ == ours.__name__
    assert type(ours()) is type(loss)
    assert not [*loss.children()]
    for duplicate in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(duplicate) is type(loss)
        assert repr(duplicate) == repr(loss)


def test_their_package_is_not_imported_and_a_pickle_does_without_it(losses, tmp_path):
    file = tmp_path / "loss.pickle"
    file.write_bytes(pickle.dumps(ContrastiveLoss(0.1)))
    program = f"""
import pickle, sys
loss = pickle.load(open({str(file)!r}, "rb"))
from ssmkernels.nn import ContrastiveLoss
assert type(loss) is ContrastiveLoss and loss.pos_margin == 0.1
assert not any(name.startswith("pytorch_metric_learning") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# Their distances, reducers and regularizers.

DISTANCES = {
    "LpDistance()": lambda distances: distances.LpDistance(),
    "LpDistance(normalize_embeddings=False)": lambda distances: distances.LpDistance(normalize_embeddings=False),
    "LpDistance(power=2)": lambda distances: distances.LpDistance(power=2),
    "LpDistance(p=1)": lambda distances: distances.LpDistance(p=1),
    "CosineSimilarity()": lambda distances: distances.CosineSimilarity(),
    "CosineSimilarity(power=2)": lambda distances: distances.CosineSimilarity(power=2),
    "DotProductSimilarity()": lambda distances: distances.DotProductSimilarity(),
    "DotProductSimilarity(normalize_embeddings=False)": lambda distances: distances.DotProductSimilarity(
        normalize_embeddings=False
    ),
    "SNRDistance()": lambda distances: distances.SNRDistance(),
}
REDUCERS = {
    "mean": lambda reducers: reducers.MeanReducer(),
    "sum": lambda reducers: reducers.SumReducer(),
    "nonzero": lambda reducers: reducers.AvgNonZeroReducer(),
    "threshold": lambda reducers: reducers.ThresholdReducer(low=0.1),
    "weighted": lambda reducers: reducers.ClassWeightedReducer(torch.arange(1.0, 5).double()),
    "multiple": lambda reducers: reducers.MultipleReducers({"pos_loss": reducers.SumReducer()}),
}


@BOTH
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", DISTANCES)
def test_their_distances(losses, ours, name, listed):
    from pytorch_metric_learning import distances, miners

    embeddings, labels = make(20)
    embeddings = (embeddings.detach() / 4).requires_grad_()
    pairs = miners.PairMarginMiner()(embeddings, labels) if listed else None
    settings = {"distance": DISTANCES[name](distances)}
    mine, theirs = ours(**settings), theirs_of(losses, ours)(**settings)
    assert_same(mine(embeddings, labels, pairs), theirs(embeddings, labels, pairs), embeddings)
    references, reference_labels = make(9, seed=1)
    arguments = (embeddings, labels, None, references, reference_labels)
    assert_same(mine(*arguments), theirs(*arguments), embeddings, references)


@BOTH
@pytest.mark.parametrize("name", REDUCERS)
def test_their_reducers(losses, ours, name):
    from pytorch_metric_learning import reducers

    embeddings, labels = make(20)
    mine, theirs = (loss(reducer=REDUCERS[name](reducers)) for loss in (ours, theirs_of(losses, ours)))
    assert_same(mine(embeddings, labels), theirs(embeddings, labels), embeddings)


@BOTH
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("name", REDUCERS)
def test_their_regularizers(losses, ours, name, rows):
    from pytorch_metric_learning import reducers, regularizers

    embeddings, labels = make(rows)
    settings = {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.25}
    settings["reducer"] = REDUCERS[name](reducers)
    mine, theirs = (loss(**settings) for loss in (ours, theirs_of(losses, ours)))
    assert_same(mine(embeddings, labels), theirs(embeddings, labels), embeddings)


def test_what_needs_no_matrix_with_their_objects(losses):
    from pytorch_metric_learning import distances, reducers, regularizers

    embeddings, labels = make(300, 4)
    given = {"distance": distances.LpDistance(), "embedding_regularizer": regularizers.LpRegularizer()}
    for reducer in (reducers.MeanReducer(), reducers.SumReducer(), reducers.AvgNonZeroReducer()):
        with LargestTensor() as largest:
            ContrastiveLoss(reducer=reducer, **given)(embeddings, labels).backward()
        assert largest.elements == embeddings.numel()


@BOTH
def test_a_subclass_under_another_name_takes_their_objects(losses, ours):
    from pytorch_metric_learning import distances

    embeddings, labels = make()
    settings = {"distance": distances.SNRDistance()}
    subclass = type("Mine", (ours,), {})
    assert_same(subclass(**settings)(embeddings, labels), ours(**settings)(embeddings, labels), embeddings)


@BOTH
def test_losses_with_their_objects_are_copied_and_pickled(losses, ours):
    from pytorch_metric_learning import distances

    embeddings, labels = make()
    loss = ours(distance=distances.LpDistance(power=2))
    for duplicate in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(duplicate(embeddings, labels), loss(embeddings, labels))


@BOTH
@pytest.mark.parametrize("name", ["distance", "reducer", "embedding_regularizer"])
def test_what_is_none_of_theirs_is_named(ours, name):
    with pytest.raises(TypeError, match=rf"{name} must be a pytorch_metric_learning\.\S+ or None, got str"):
        ours(**{name: "cosine"})


def test_settings_that_exclude_each_other_are_named(losses):
    from pytorch_metric_learning import distances, reducers

    with pytest.raises(ValueError, match="reducer and reduction='sum' were both given"):
        ContrastiveLoss(reduction="sum", reducer=reducers.MeanReducer())
    with pytest.raises(ValueError, match=r"ignore_index needs a distance and a reducer .*got distance=LpDistance"):
        MultiSimilarityLoss(ignore_index=-1, distance=distances.LpDistance())


# Labels to ignore.


@BOTH
def test_every_label_is_a_class_by_default(ours):
    embeddings, labels = make()
    assert torch.equal(ours()(embeddings, labels - 1), ours()(embeddings, labels))


@BOTH
@pytest.mark.parametrize("ignored", [-1, 2])
def test_rows_with_the_label_to_ignore_are_as_if_they_were_not_there(ours, ignored):
    embeddings, labels = make(20)
    references, reference_labels = make(9, seed=1)
    for of_rows in (labels, reference_labels):
        of_rows[of_rows == 2] = ignored
    kept, kept_references = labels != ignored, reference_labels != ignored
    loss = ours(ignore_index=ignored)
    assert_same(loss(embeddings, labels), ours()(embeddings[kept], labels[kept]), embeddings)
    others = references[kept_references], reference_labels[kept_references]
    expected = ours()(embeddings[kept], labels[kept], None, *others)
    assert_same(loss(embeddings, labels, None, references, reference_labels), expected, embeddings, references)


@BOTH
def test_listed_pairs_with_a_label_to_ignore_are_left_out(ours):
    embeddings, labels = make(20)
    labels[labels == 2] = -1
    first, second = torch.triu_indices(20, 20, 1)
    same, known = labels[first] == labels[second], (labels[first] >= 0) & (labels[second] >= 0)

    def listed(taken):
        return (first[taken & same], second[taken & same], first[taken & ~same], second[taken & ~same])

    value = ours(ignore_index=-1)(embeddings, labels, listed(torch.ones_like(same)))
    expected = ours()(embeddings, labels, listed(known))
    if ours is MultiSimilarityLoss:
        expected = expected * 20 / (labels >= 0).sum()  # the mean is over the rows that are left
    assert_same(value, expected, embeddings)


@BOTH
def test_nothing_but_labels_to_ignore_is_zero(ours):
    embeddings, labels = make(5)
    loss = ours(ignore_index=-1)(embeddings, torch.full_like(labels, -1))
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()


def test_moments_without_the_label_to_ignore():
    features, labels = make(20)
    labels[labels == 2] = -1
    loss, expected = SimilarityDistributionLoss(ignore_index=-1).double(), SimilarityDistributionLoss().double()
    kept = labels >= 0
    assert_same(loss(features, labels), expected(features[kept], labels[kept]), features)
    for name, value in expected.state_dict().items():
        assert torch.equal(loss.state_dict()[name], value)
    assert loss(features, torch.full_like(labels, -1)).isfinite()


@pytest.mark.parametrize("module", [ContrastiveLoss, MultiSimilarityLoss, SimilarityDistributionLoss])
def test_a_label_to_ignore_that_is_no_integer_is_named(module):
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        module(ignore_index=0.5)

# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssmkernels import metrics
from ssmkernels.metrics import search

KEYS_OF_PEER = {"precision_at_1": "P@1", "r_precision": "RP", "mean_average_precision_at_r": "MAP@R"}


def by_hand(embeddings, labels, references=None, reference_labels=None, ranks=(1, 2, 4, 8)):
    """Every metric from one full ranking per query, a loop at a time."""
    within = references is None
    keys, key_labels = (embeddings, labels) if within else (references, reference_labels)
    rows = {}
    for i, query in enumerate(embeddings):
        distances = ((keys - query) ** 2).sum(axis=1)
        ranking = [j for j in np.argsort(distances, kind="stable") if not (within and i == j)]
        same = [int(key_labels[j] == labels[i]) for j in ranking]
        for k in ranks:
            rows.setdefault(f"R@{k}", []).append(float(any(same[:k])))
            rows.setdefault(f"P@{k}", []).append(sum(same[:k]) / k)
        if r := sum(same):
            rows.setdefault("RP", []).append(sum(same[:r]) / r)
            rows.setdefault("MAP@R", []).append(sum(same[j] * sum(same[: j + 1]) / (j + 1) for j in range(r)) / r)
            rows.setdefault("P@1 of those with R", []).append(same[0])
    figures = {name: float(np.mean(values)) for name, values in rows.items()}
    figures["P@1"] = figures.pop("P@1 of those with R", math.nan)
    return figures


def random_set(rows, dim, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    return F.normalize(centres[labels] + 1.5 * torch.randn(rows, dim, generator=generator)), labels


@pytest.fixture(scope="module")
def digits():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    return sklearn_datasets.load_digits(return_X_y=True)


@pytest.mark.parametrize(("rows", "classes"), [(3, 2), (17, 12), (123, 5), (507, 40)])
def test_within_agrees_with_a_full_ranking(rows, classes):
    embeddings, labels = random_set(rows, 7, classes, seed=rows)
    figures = metrics.retrieval(embeddings, labels)
    assert list(figures) == ["P@1", "R@1", "R@2", "R@4", "R@8", "P@2", "P@4", "P@8", "RP", "MAP@R"]
    assert figures == pytest.approx(by_hand(embeddings.double().numpy(), labels.numpy()))


def test_separate_references_agree_with_a_full_ranking():
    embeddings, labels = random_set(61, 5, 9, seed=0)
    references, reference_labels = random_set(203, 5, 7, seed=1)  # classes 7 and 8 have no reference
    figures = metrics.retrieval(embeddings, labels, references=references, reference_labels=reference_labels)
    expected = by_hand(
        embeddings.double().numpy(), labels.numpy(), references.double().numpy(), reference_labels.numpy()
    )
    assert figures == pytest.approx(expected)
    assert figures["P@1"] > figures["R@1"]  # the queries without a reference of their class count in R@1 only


@pytest.mark.parametrize("k", ["max_bin_count", None])
@pytest.mark.parametrize("separate", [False, True, "references include the query"])
@pytest.mark.parametrize("source", ["random", "digits"])
def test_agrees_with_pytorch_metric_learning(k, separate, source, request):
    peer = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    pytest.importorskip("faiss")
    if source == "random":
        embeddings, labels = random_set(507, 16, 20, seed=3)
        labels[:3] = torch.tensor([97, 98, 99])  # classes of one image
    else:
        pixels, digit = request.getfixturevalue("digits")
        embeddings, labels = torch.from_numpy(pixels).float(), torch.from_numpy(digit).long()
    calculator = peer.AccuracyCalculator(include=tuple(KEYS_OF_PEER), k=k, device=torch.device("cpu"))
    if separate == "references include the query":
        cut = len(labels) // 3
        theirs = calculator.get_accuracy(embeddings[:cut], labels[:cut], embeddings, labels, ref_includes_query=True)
        ours = metrics.retrieval(
            embeddings[:cut], labels[:cut], references=embeddings, reference_labels=labels, ref_includes_query=True
        )
    elif separate:
        cut = len(labels) // 3
        theirs = calculator.get_accuracy(embeddings[:cut], labels[:cut], embeddings[cut:], labels[cut:])
        ours = metrics.retrieval(
            embeddings[:cut], labels[:cut], references=embeddings[cut:], reference_labels=labels[cut:]
        )
    else:
        theirs = calculator.get_accuracy(embeddings, labels)
        ours = metrics.retrieval(embeddings, labels)
    assert {name: ours[key] for name, key in KEYS_OF_PEER.items()} == pytest.approx(theirs, abs=1e-6)


def test_equal_distances_rank_by_index():
    """Copies of one reference, enough for the edge of a matrix product to round them differently, and equal
    distances in pairs.
    """
    generator = torch.Generator().manual_seed(5)
    prototypes = torch.randn(3, 33, generator=generator)
    references = prototypes[torch.arange(1003) % 3]
    reference_labels = torch.randint(0, 4, (1003,), generator=generator)
    queries, labels = torch.randn(29, 33, generator=generator), torch.randint(0, 4, (29,), generator=generator)
    figures = metrics.retrieval(queries, labels, references=references, reference_labels=reference_labels)
    arrays = [value.double().numpy() if value.is_floating_point() else value.numpy() for value in (queries, labels)]
    assert figures == pytest.approx(by_hand(*arrays, references.double().numpy(), reference_labels.numpy()))

    whole = torch.randint(
        0, 3, (203, 4), generator=generator
    ).float()  # whole numbers: their distances are exact, and many are equal
    labels = torch.randint(0, 5, (203,), generator=generator)
    assert metrics.retrieval(whole, labels) == pytest.approx(by_hand(whole.double().numpy(), labels.numpy()))


def test_chunks_change_nothing(monkeypatch):
    embeddings, labels = random_set(203, 8, 6, seed=8)
    whole = metrics.retrieval(embeddings, labels)
    monkeypatch.setattr(search, "_CHUNK_ENTRIES", 7 * 203)
    assert metrics.retrieval(embeddings, labels) == whole
    monkeypatch.setattr(search, "_CHUNK_ENTRIES", 1)
    assert metrics.retrieval(embeddings, labels) == whole


def test_lists_are_made_of_few_queries_at_a_time(monkeypatch):
    monkeypatch.setattr(search, "_CHUNK_ENTRIES", 4 * 7 * (120 + 8))
    sizes = []
    nearest = search.FusedSearch.nearest

    def counted(self, queries, k, itself):
        sizes.append((len(queries), k))
        return nearest(self, queries, k, itself)

    monkeypatch.setattr(search.FusedSearch, "nearest", counted)
    embeddings, _ = random_set(1003, 4, 10, seed=0)
    metrics.retrieval(embeddings, torch.arange(1003) % 10, recall_at=120)
    assert set(sizes) == {(7, 120), (2, 120)}


@pytest.mark.parametrize("within", [False, True])
def test_other_devices_search_by_stored_distances(within, monkeypatch):
    """Of some queries at a time, with the lists of the kernel of the CPU: copies and equal distances too."""
    draw = torch.Generator().manual_seed(3)
    references = torch.randint(0, 3, (203, 4), generator=draw).double()
    queries = references if within else torch.randint(0, 3, (61, 4), generator=draw).double()
    itself = torch.arange(203) if within else None
    stored, fused = search.Distances(references), search.FusedSearch(references)
    for k in (1, 50, 203 - within):
        assert stored.nearest(queries, k, itself).equal(fused.nearest(queries, k, itself))
    monkeypatch.setattr(search, "_CHUNK_ENTRIES", 7 * 203)
    assert stored.rows_at_once(50) == 7


def test_order_of_distances_and_scale_of_embeddings():
    """Euclidean on the embeddings as given: lengths matter."""
    references, reference_labels = torch.tensor([[10.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    figures = metrics.retrieval(
        torch.tensor([[1.0, 0.1]]),
        torch.tensor([0]),
        references=references,
        reference_labels=reference_labels,
        recall_at=(1, 2),
    )
    assert (figures["R@1"], figures["R@2"]) == (0.0, 1.0)


def test_ranks_asked_for_and_lists_that_are_too_short():
    embeddings, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([4, 4, 4])
    figures = metrics.retrieval(embeddings, labels, recall_at=(5,), precision_at=[4])
    assert figures == {"P@1": 1.0, "R@5": 1.0, "P@4": 0.5, "RP": 1.0, "MAP@R": 1.0}


@pytest.mark.parametrize(
    "scalar", [int, np.int64, np.uint8, np.array, torch.tensor], ids=lambda scalar: scalar.__name__
)
def test_kinds_of_ranks(scalar):
    embeddings, labels = random_set(17, 3, 4, seed=0)
    expected = metrics.retrieval(embeddings, labels, recall_at=(2,), precision_at=(3, 1))
    assert metrics.retrieval(embeddings, labels, recall_at=scalar(2), precision_at=[scalar(3), scalar(1)]) == expected
    assert metrics.retrieval(embeddings, labels, recall_at=np.array([2]), precision_at={1, 3}) == expected
    first, second = (metrics.nmi(embeddings, labels, num_clusters=kind(4), seed=kind(1)) for kind in (int, scalar))
    assert first == second


def test_references_that_are_the_queries():
    """A query is not its own first hit where ref_includes_query says that it is there."""
    embeddings, labels = random_set(61, 5, 4, seed=0)
    within = metrics.retrieval(embeddings, labels)
    assert metrics.retrieval(embeddings, labels, ref_includes_query=True) == within
    same = {"references": embeddings, "reference_labels": labels}
    assert metrics.retrieval(embeddings, labels, **same, ref_includes_query=True) == within
    assert metrics.retrieval(embeddings, labels, **same)["P@1"] == 1.0  # every query finds itself


def test_every_label_is_a_class():
    """−1 too, unlike in the graphs and the pair network."""
    embeddings, labels = random_set(61, 5, 4, seed=1)
    assert metrics.retrieval(embeddings, labels - 1) == metrics.retrieval(embeddings, labels)
    assert metrics.nmi(embeddings, labels - 1) == metrics.nmi(embeddings, labels)


def test_no_query_has_a_reference_of_its_class():
    figures = metrics.retrieval(torch.randn(5, 3), torch.arange(5), recall_at=(1,), precision_at=(2,))
    assert (figures["R@1"], figures["P@2"]) == (0.0, 0.0)
    assert all(math.isnan(figures[name]) for name in ("P@1", "RP", "MAP@R"))


def test_arrays_half_types_strides_and_gradients():
    embeddings, labels = random_set(123, 6, 5, seed=2)
    expected = metrics.retrieval(embeddings, labels)
    assert metrics.retrieval(embeddings.numpy(), labels.to(torch.int32).numpy()) == expected
    assert metrics.retrieval(embeddings.numpy()[::-1].copy()[::-1], labels.numpy()) == expected
    assert metrics.retrieval(embeddings.t().contiguous().t().requires_grad_(), labels) == expected
    rounded = embeddings.bfloat16()
    assert metrics.retrieval(rounded, labels) == metrics.retrieval(rounded.float(), labels)


@pytest.mark.gpu
def test_retrieval_on_a_gpu():
    embeddings, labels = random_set(1003, 16, 20, seed=4)
    assert metrics.retrieval(embeddings.cuda(), labels.cuda()) == pytest.approx(metrics.retrieval(embeddings, labels))
    with pytest.raises(ValueError, match="labels should be on cuda:0, the device of embeddings; got cpu"):
        metrics.retrieval(embeddings.cuda(), labels)


@pytest.mark.parametrize(("groups", "clusters"), [(1, 1), (1, 4), (4, 1), (2, 3), (10, 10), (200, 3)])
def test_nmi_of_clusters_agrees_with_scikit_learn(groups, clusters):
    peer = pytest.importorskip("sklearn.metrics").normalized_mutual_info_score
    generator = np.random.default_rng(groups)
    labels = generator.integers(0, groups, 507)
    guess = np.where(generator.random(507) < 0.5, labels, generator.integers(0, clusters, 507)) % clusters
    assert metrics.nmi_of_clusters(labels, guess) == pytest.approx(peer(labels, guess), abs=1e-12)
    assert metrics.nmi_of_clusters(torch.from_numpy(labels), torch.from_numpy(guess - 7)) == pytest.approx(
        peer(labels, guess), abs=1e-12
    )


def test_nmi_of_equal_and_of_unrelated_groups():
    labels = np.arange(12) % 3
    assert metrics.nmi_of_clusters(labels, 5 - labels) == pytest.approx(1.0)
    assert metrics.nmi_of_clusters(labels, np.arange(12) // 3 % 2) == pytest.approx(0.0, abs=1e-12)
    assert metrics.nmi_of_clusters(labels, np.zeros(12, int)) == 0.0
    assert metrics.nmi_of_clusters(np.zeros(5, int), np.ones(5, int)) == 1.0


def test_nmi_agrees_with_pytorch_metric_learning(digits):
    """Of the same clusters the same figure; of k-means from another seeding about the same."""
    peer = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    cluster = pytest.importorskip("sklearn.cluster")
    pixels, labels = digits
    clusters = cluster.KMeans(10, n_init=1, random_state=0).fit_predict(pixels)
    calculator = peer.AccuracyCalculator(
        include=("NMI",), device=torch.device("cpu"), kmeans_func=lambda points, count: torch.from_numpy(clusters)
    )
    theirs = calculator.get_accuracy(pixels, labels)["NMI"]
    assert metrics.nmi_of_clusters(labels, clusters) == pytest.approx(theirs)
    assert metrics.nmi(pixels, labels) == pytest.approx(theirs)  # seed 0, as many clusters as classes
    assert metrics.nmi(pixels, labels, seed=1) == pytest.approx(theirs, abs=0.1)


def test_nmi_counts_of_clusters_and_seeds(digits):
    pixels, labels = digits
    assert metrics.nmi(pixels, labels, num_clusters=1) == 0.0
    assert metrics.nmi(pixels, labels, seed=3) == metrics.nmi(
        torch.from_numpy(pixels), torch.from_numpy(labels), seed=3
    )
    assert metrics.nmi(pixels, labels, num_clusters=30) != metrics.nmi(pixels, labels)


E2, L2 = torch.eye(3, 2), torch.tensor([0, 1, 0])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "embeddings should be a tensor or an array, got list", {"embeddings": [[1.0]]}),
        (TypeError, "embeddings should be floating point, got torch.int64", {"embeddings": L2[:, None]}),
        (ValueError, r"embeddings should be \[N, d\], got shape \[3\]", {"embeddings": torch.ones(3)}),
        (ValueError, "embeddings should have at least 1 row, got none", {"embeddings": E2[:0], "labels": L2[:0]}),
        (
            ValueError,
            "embeddings should have at least 2 rows, or references should be given; got 1",
            {"embeddings": E2[:1], "labels": L2[:1]},
        ),
        (ValueError, "embeddings should be finite", {"embeddings": E2 * torch.nan}),
        (TypeError, "labels should be integers, got torch.float32", {"labels": L2.float()}),
        (ValueError, r"labels should be \[N\], got shape \[3, 1\]", {"labels": L2[:, None]}),
        (ValueError, "labels should have 3 entries, one for each row of embeddings; got 2", {"labels": L2[:2]}),
        (ValueError, "labels should be on cpu, the device of embeddings; got meta", {"labels": L2.to("meta")}),
        (ValueError, "references and reference_labels should be given together", {"references": E2}),
        (ValueError, "references and reference_labels should be given together", {"reference_labels": L2}),
        (
            ValueError,
            "references should have at least 1 row, got none",
            {"references": E2[:0], "reference_labels": L2[:0]},
        ),
        (
            ValueError,
            "references should be of dimension 2, that of embeddings; got 3",
            {"references": torch.eye(3), "reference_labels": L2},
        ),
        (
            ValueError,
            "reference_labels should have 3 entries, one for each row of references",
            {"references": E2, "reference_labels": L2[:1]},
        ),
        (ValueError, r"embeddings should be \[N, d\] with d ≥ 1, got shape \[3, 0\]", {"embeddings": E2[:, :0]}),
        (ValueError, "recall_at should be integers ≥ 1, got 0", {"recall_at": (1, 0)}),
        (ValueError, "recall_at should be integers ≥ 1, got -1", {"recall_at": -1}),
        (TypeError, "recall_at should be an integer, got None", {"recall_at": None}),
        (TypeError, "recall_at should be an integer, got '12'", {"recall_at": "12"}),
        (TypeError, "precision_at should be an integer, got 1.0", {"precision_at": (1.0,)}),
        (TypeError, "precision_at should be an integer, got True", {"precision_at": True}),
        (
            ValueError,
            (
                "references and reference_labels should begin with the 3 rows of embeddings and labels, as"
                " ref_includes_query says"
            ),
            {
                "references": torch.cat([E2.flip(0), E2]),
                "reference_labels": torch.cat([L2, L2]),
                "ref_includes_query": True,
            },
        ),
        (
            ValueError,
            "references should have at least 2 rows where they include the query; got 1",
            {
                "embeddings": E2[:1],
                "labels": L2[:1],
                "references": E2[:1],
                "reference_labels": L2[:1],
                "ref_includes_query": True,
            },
        ),
    ],
)
def test_retrieval_refuses(error, message, arguments):
    with pytest.raises(error, match=message):
        metrics.retrieval(**{"embeddings": E2, "labels": L2, **arguments})


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "num_clusters should be an integer, got 2.0", {"num_clusters": 2.0}),
        (TypeError, "seed should be an integer, got None", {"seed": None}),
        (ValueError, "seed should be from 0 to 2³² − 1, got -1", {"seed": -1}),
        (ValueError, r"embeddings should be \[N, d\] with d ≥ 1", {"embeddings": E2[:, :0]}),
        (ValueError, "num_clusters should be from 1 to 3, the number of embeddings; got 4", {"num_clusters": 4}),
        (ValueError, "num_clusters should be from 1 to 3, the number of embeddings; got 0", {"num_clusters": 0}),
        (ValueError, "embeddings should have at least 1 row, got none", {"embeddings": E2[:0], "labels": L2[:0]}),
    ],
)
def test_nmi_refuses(error, message, arguments):
    pytest.importorskip("sklearn")
    with pytest.raises(error, match=message):
        metrics.nmi(**{"embeddings": E2, "labels": L2, **arguments})


def test_nmi_of_clusters_refuses():
    with pytest.raises(ValueError, match="clusters should have 3 entries, as many as labels; got 2"):
        metrics.nmi_of_clusters(L2, L2[:2])
    with pytest.raises(ValueError, match="labels should have at least 1 entry, got none"):
        metrics.nmi_of_clusters(L2[:0], L2[:0])
    with pytest.raises(TypeError, match=r"clusters should be integers, got torch\.float32"):
        metrics.nmi_of_clusters(L2, L2.float())
    with pytest.raises(ValueError, match="clusters should be on cpu, the device of labels; got meta"):
        metrics.nmi_of_clusters(L2, L2.to("meta"))

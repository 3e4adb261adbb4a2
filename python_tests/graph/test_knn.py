# SPDX-License-Identifier: BSD-3-Clause
import importlib.util
import logging
import re
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peak_memory import peak_bytes
from scipy import sparse

from ssmkernels.graph import Graph, candidates, knn, knn_graph

WITH_FAISS = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="no faiss")
BY_CANDIDATES = ["torch", pytest.param("faiss", marks=WITH_FAISS)]
BACKENDS = ["native", *BY_CANDIDATES]


def brute_force(features, k, gamma=3.0):
    """W and the mutual pairs by sorting everything, dense."""
    unit = F.normalize(features.double(), dim=1)
    nodes = len(unit)
    similarity = (unit[:, None] * unit[None]).sum(-1)
    affinity = torch.zeros(nodes, nodes, dtype=torch.float64)
    for i in range(nodes):
        others = sorted((j for j in range(nodes) if j != i), key=lambda j: (-float(similarity[i, j]), j))[:k]
        affinity[i, others] = similarity[i, others].clamp_min(0) ** gamma
    return affinity + affinity.t(), (affinity > 0) & (affinity.t() > 0)


def features_of(nodes, dim, seed=0):
    return torch.randn(nodes, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("nodes", "dim", "k"), [(2, 3, 1), (5, 2, 4), (60, 4, 7), (123, 33, 50)])
def test_against_brute_force(nodes, dim, k, backend):
    features = features_of(nodes, dim)
    graph = knn_graph(features, k, backend=backend)
    expected, mutual = brute_force(features, k)
    dense = torch.from_numpy(graph.to_scipy().toarray())
    torch.testing.assert_close(dense, expected, rtol=1e-12, atol=1e-14)
    assert graph.mutual.equal(mutual[graph.rows, graph.col.long()]) and graph.dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicates_take_the_lowest_indices(backend):
    """Hundreds of equal points: a point is never its own neighbour, and ties go to the lowest index."""
    features = features_of(4, 5).repeat_interleave(100, dim=0)
    ids, similarities = knn.nearest_neighbours(features, 10, backend=backend)
    for i in (0, 5, 99, 100, 250, 399):
        group = i // 100 * 100
        assert ids[i].tolist() == [j for j in range(group, group + 11) if j != i][:10]
    torch.testing.assert_close(similarities, torch.ones_like(similarities))


@pytest.mark.parametrize("backend", BY_CANDIDATES)
@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2])
def test_tight_clusters_are_searched_together(backend, noise, monkeypatch):
    """Of rows with more near others than are fetched, the neighbours are exact, and many rows are searched at once."""
    nodes, k = 600, 20
    features = features_of(2, 16).repeat_interleave(nodes // 2, dim=0) + noise * features_of(nodes, 16, seed=1)
    tiles = []
    products = candidates._products

    def counted(rows, unit):
        tiles.append(len(rows))
        return products(rows, unit)

    monkeypatch.setattr(candidates, "_products", counted)
    ids, similarities = knn.nearest_neighbours(features.float(), k, backend=backend)
    unit = knn._normalized(features.float())
    everyone = torch.arange(nodes)
    exact = candidates.pairwise(unit, everyone, everyone.expand(nodes, nodes))
    exact.fill_diagonal_(-torch.inf)
    expected = exact.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert ids.equal(expected) and similarities.equal(exact.gather(1, expected))
    assert len(tiles) <= 2 + nodes // 256  # not a search for each row


def test_similarities_differ_from_a_search_by_less_than_is_allowed_for():
    """Vectors whose products all have one sign and size round the worst."""
    for dim in (1, 64, 500, 3000):
        rows = knn._normalized(torch.rand(200, dim, generator=torch.Generator().manual_seed(0)) + 1)
        everyone = torch.arange(200)
        exact = candidates.pairwise(rows, everyone, everyone.expand(200, 200))
        tiles = torch.cat([products for _, products in candidates._products(rows, rows)], dim=1)
        assert (tiles - exact).abs().max() <= candidates._rounding(dim)
        assert (exact.double() - rows.double() @ rows.double().t()).abs().max() <= candidates._rounding(dim)


@pytest.mark.parametrize("backend", BY_CANDIDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["many ties", "random", "groups"])
def test_backends_agree_bit_for_bit(kind, dtype, backend):
    features = features_of(700, 6)
    if kind == "many ties":
        features = features[:, :4].round()
    elif kind == "groups":
        features = features[torch.arange(700) // 300]
    features = features.to(dtype)
    first, second = knn_graph(features, 9), knn_graph(features, 9, backend=backend)
    assert all(
        getattr(first, name).equal(getattr(second, name)) for name in ("crow", "col", "weight", "reverse", "mutual")
    )


def test_the_graph_is_one_that_its_constructor_takes():
    """knn_graph leaves out the checks of Graph, whose arrays a kernel makes."""
    graph = knn_graph(features_of(300, 4).round(), 20)
    checked = Graph(graph.crow, graph.col, graph.weight, graph.reverse, mutual=graph.mutual)
    assert checked.num_edges == graph.num_edges > 0 and graph.mutual.any() and not graph.mutual.all()


SETUP = """
import torch
from ssmkernels.graph import knn, knn_graph
knn_graph(torch.randn(50, 3), 4)
features = torch.randn(40_000, 16, generator=torch.Generator().manual_seed(0))
"""
MALLOC = 4 * 2**20  # what the allocators of two threads hold beside


def test_memory_of_a_search_is_of_the_neighbours():
    """A copy of the features twice, normalised and in panels; 2k + 32 candidates a row, and the k best of them."""
    nodes, dim, k = 40_000, 16, 20
    grown, _ = peak_bytes(SETUP, "ids, similarities = knn._nearest(features, 20, 'auto')")
    assert grown < nodes * (2 * dim * 4 + 3 * dim * 4 + (2 * k + 32 + k) * 8 + 20) + MALLOC


def test_memory_of_the_assembly():
    """17 bytes an entry of the result, and 8 of each neighbour's."""
    setup = """
import torch
from ssmkernels.ops import _neighbours as kernels
kernels.symmetric_graph(torch.tensor([[1], [0]]).int(), torch.ones(2, 1))
steps = torch.randperm(59_999, generator=torch.Generator().manual_seed(0))[:50] + 1
ids = ((torch.arange(60_000)[:, None] + steps) % 60_000).int()
weights = torch.ones(60_000, 50)
"""
    grown, edges = peak_bytes(setup, "graph = kernels.symmetric_graph(ids, weights)", "len(graph[1])")
    assert edges > 3_000_000 and grown < 30 * edges


@WITH_FAISS
def test_an_inverted_file_reports_its_recall(caplog):
    centers = features_of(40, 16, seed=1)
    features = centers[torch.arange(4000) % 40] + 0.2 * features_of(4000, 16)
    with caplog.at_level(logging.INFO, logger="ssmkernels.graph"):
        ids, similarities = knn.nearest_neighbours(features, 10, backend="ivf")
    recall = float(re.search(r"recall (0\.\d+|1\.0+) on a sample of 1000 points", caplog.text)[1])
    exact, values = knn.nearest_neighbours(features, 10)
    matched = (ids[:, :, None] == exact[:, None]).any(dim=2)
    # Of 40,000 neighbours, whose recall is estimated from a quarter: four standard errors
    assert recall >= 0.99 and abs(float(matched.double().mean()) - recall) < 4 * 0.1 / 100
    assert not (ids == torch.arange(4000)[:, None]).any()
    assert similarities[ids == exact].equal(values[ids == exact])
    assert ids.equal(knn.nearest_neighbours(features, 10, backend="ivf")[0])


@WITH_FAISS
def test_an_inverted_file_finds_k_others_in_cells_that_have_fewer():
    features = torch.eye(30).repeat_interleave(2, dim=0)
    exact = knn.nearest_neighbours(features, 50)
    ids, similarities = knn.nearest_neighbours(features, 50, backend="ivf")
    assert bool((ids >= 0).all()) and ids[:, 0].equal(exact[0][:, 0]) and similarities.equal(exact[1])


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for backend in ("faiss", "ivf"):
        with pytest.raises(ImportError, match=rf"backend is '{backend}', which needs faiss: pip install faiss-cpu"):
            knn_graph(features_of(10, 3), 3, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_and_opposite_points_have_no_edges(backend):
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 0.0], [-1.0, 0.0]])
    graph = knn_graph(features, 3, backend=backend)
    assert graph.to_edge_index()[0].tolist() == [[0, 1], [1, 0]] and graph.mutual.all()
    torch.testing.assert_close(graph.weight, torch.full((2,), 2 * 1.01**-1.5))


def test_chunks_do_not_matter(monkeypatch):
    features = features_of(200, 6)
    whole = knn_graph(features, 12, backend="torch")
    monkeypatch.setattr(candidates, "CHUNK_BYTES", 5000)
    pieces = knn_graph(features, 12, backend="torch")
    assert whole.col.equal(pieces.col) and whole.weight.equal(pieces.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_arrays(dtype):
    features = features_of(50, 8).to(dtype)
    graph = knn_graph(features, 5, gamma=1.5)
    assert graph.dtype == torch.float32
    if dtype == torch.float32:
        assert knn_graph(features.numpy(), 5, gamma=1.5).weight.equal(graph.weight)
        expected, _ = brute_force(features, 5, 1.5)
        torch.testing.assert_close(
            torch.from_numpy(graph.to_scipy().toarray()).double(), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("scalar", [np.int64, np.uint8, torch.tensor], ids=lambda scalar: scalar.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy_scalars(scalar, backend):
    features = features_of(50, 8)
    graph = knn_graph(features, scalar(5), gamma=np.float32(2), backend=backend)
    assert graph.weight.equal(knn_graph(features, 5, gamma=2.0, backend=backend).weight)


@pytest.mark.parametrize("make", ["csr_array", "coo_matrix"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sparse_features(dtype, make, monkeypatch):
    """The graph of the dense features; with ties between equal rows, and a row without entries."""
    draw = np.random.default_rng(0)
    dense = (draw.standard_normal((123, 7)) * draw.integers(0, 2, (123, 7))).astype(dtype)
    dense[5] = 0
    dense[40:80] = dense[:40]
    features = getattr(sparse, make)(dense)
    before = features.data.copy()
    expected = knn_graph(dense, 9)
    monkeypatch.setattr(candidates, "CHUNK_BYTES", 8 * 123 * 50)  # 50 rows at a time
    graph = knn_graph(features, 9)
    assert graph.dtype == expected.dtype and np.array_equal(features.data, before)
    torch.testing.assert_close(
        torch.from_numpy(graph.to_scipy().toarray()), torch.from_numpy(expected.to_scipy().toarray())
    )
    assert graph.mutual.equal(expected.mutual)


@pytest.mark.parametrize("backend", BY_CANDIDATES)
def test_an_interrupt_is_taken_after_a_bounded_search(backend, monkeypatch):
    searches = []
    name = f"_{backend}_search"
    original = getattr(candidates, name)

    def interrupted(unit, count):
        search = original(unit, count)

        def one(rows):
            searches.append(len(rows))
            signal.raise_signal(signal.SIGINT)
            return search(rows)

        return one

    monkeypatch.setattr(candidates, name, interrupted)
    monkeypatch.setattr(candidates, "CHUNK_PRODUCTS", 40 * 300 * 8)
    with pytest.raises(KeyboardInterrupt):
        knn_graph(features_of(300, 8), 5, backend=backend)
    assert searches == [40]


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-15, 1e30])
def test_the_length_of_features_does_not_matter(scale):
    """Squares of these overflow or vanish in float32."""
    features = torch.randint(-8, 9, (60, 5), generator=torch.Generator().manual_seed(0)).float()
    features[3] = 0
    plain, scaled = knn_graph(features, 7), knn_graph(features * scale, 7)
    assert scaled.num_edges == plain.num_edges
    torch.testing.assert_close(scaled.weight.sort().values, plain.weight.sort().values, rtol=1e-3, atol=1e-6)


def test_arrays_of_any_layout():
    features = features_of(40, 6).numpy()
    read_only = features.copy()
    read_only.flags.writeable = False
    expected = knn_graph(features, 5)
    assert knn_graph(read_only, 5).weight.equal(expected.weight)
    assert knn_graph(features[::-1], 5).to_scipy().toarray()[::-1, ::-1] == pytest.approx(expected.to_scipy().toarray())


def test_exact_under_autocast_and_reduced_precision():
    """Features close together, as they are after a ReLU: bfloat16 does not tell the neighbours apart."""
    features = 1 + 0.1 * features_of(500, 16).float()
    expected = knn_graph(features, 10, backend="torch")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            graph = knn_graph(features, 10, backend="torch")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert graph.col.equal(expected.col) and graph.weight.equal(expected.weight)


@pytest.mark.gpu
def test_exact_on_a_gpu_that_may_use_tf32():
    features = 1 + 0.1 * features_of(500, 64).float()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        graph = knn_graph(features.cuda(), 10)
    finally:
        torch.set_float32_matmul_precision(before)
    expected, _ = brute_force(features, 10)
    torch.testing.assert_close(torch.from_numpy(graph.to_scipy().toarray()).double(), expected, rtol=1e-4, atol=1e-5)


def test_neighbours_check_their_input():
    with pytest.raises(ValueError, match=r"k must be in \[1, N\)"):
        knn.nearest_neighbours(features_of(5, 3), 5)


@pytest.mark.gpu
def test_on_a_gpu():
    features = features_of(300, 16)
    here, there = knn_graph(features, 20, backend="torch"), knn_graph(features.cuda(), 20)
    assert there.device.type == "cuda" and there.col.cpu().equal(here.col)
    torch.testing.assert_close(there.weight.cpu(), here.weight)


BAD = [
    ({"k": 10}, ValueError, r"k must be in \[1, N\), N = 10 being the number of features; got 10"),
    ({"k": 0}, ValueError, r"k must be in \[1, N\)"),
    ({"k": 2.0}, TypeError, r"k must be an int, got float"),
    ({"k": True}, TypeError, r"k must be an int, got bool"),
    ({"k": np.float64(2)}, TypeError, r"k must be an int, got float64"),
    ({"gamma": 0.0}, ValueError, r"gamma must be finite and > 0, got 0.0"),
    ({"gamma": True}, TypeError, r"gamma must be a number, got bool"),
    ({"gamma": None}, TypeError, r"gamma must be a number, got NoneType"),
    ({"gamma": "x"}, TypeError, r"gamma must be a number, got str"),
    ({"gamma": float("nan")}, ValueError, r"gamma must be finite and > 0, got nan"),
    (
        {"backend": "annoy"},
        ValueError,
        r"backend must be 'auto', 'native', 'faiss', 'torch', 'ivf', 'ring' or 'cuvs', got 'annoy'",
    ),
    (
        {"backend": None},
        ValueError,
        r"backend must be 'auto', 'native', 'faiss', 'torch', 'ivf', 'ring' or 'cuvs', got None",
    ),
    (
        {"features": sparse.eye_array(10, dtype=np.int64)},
        TypeError,
        r"features must be floating point, got int64",
    ),
    ({"features": sparse.eye_array(10) * np.nan}, ValueError, r"features must be finite"),
    (
        {"features": sparse.eye_array(10), "backend": "torch"},
        ValueError,
        r"backend must be 'auto' for sparse features",
    ),
    (
        {"features": sparse.eye_array(3)},
        ValueError,
        r"k must be in \[1, N\), N = 3 being the number of features; got 3",
    ),
    ({"features": torch.ones(10, 3, 1)}, ValueError, r"features must be \[N, d\], got shape \[10, 3, 1\]"),
    ({"features": torch.ones(10, 3).long()}, TypeError, r"features must be floating point, got torch.int64"),
    ({"features": torch.full((10, 3), torch.nan)}, ValueError, r"features must be finite"),
    ({"features": [[1.0]]}, TypeError, r"features must be a tensor or an array"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        knn_graph(**({"features": features_of(10, 3), "k": 3} | change))


def test_tiny_gamma_joins_no_points_of_negative_cosine():
    points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])
    graph = knn_graph(points, 2, gamma=1e-300)
    assert graph.to_scipy().toarray().tolist() == [[0, 2, 0], [2, 0, 0], [0, 0, 0]]

# SPDX-License-Identifier: BSD-3-Clause
import copy
import pickle

import numpy as np
import pytest
import torch
from scipy import sparse

from ssmkernels.graph import Graph


def random_matrix(nodes, density=0.2, seed=0, dtype=np.float64):
    draw = np.random.default_rng(seed)
    upper = sparse.random_array((nodes, nodes), density=density, rng=draw, dtype=np.float64)
    return sparse.csr_array((upper + upper.T).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("nodes", [1, 2, 17, 300])
def test_round_trips_are_exact(nodes, dtype):
    matrix = random_matrix(nodes, dtype=dtype)
    graph = Graph.from_scipy(matrix)
    assert (graph.to_scipy() != matrix).nnz == 0 and graph.to_scipy().dtype == dtype
    for other in (
        Graph.from_edge_index(*graph.to_edge_index(), num_nodes=nodes),
        Graph.from_torch_sparse(graph.to_torch_sparse()),
    ):
        assert all(getattr(other, name).equal(getattr(graph, name)) for name in ("crow", "col", "weight", "reverse"))


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_array", "coo_array", "dok_array", "lil_matrix"])
def test_every_scipy_format(kind):
    matrix = random_matrix(30)
    assert (Graph.from_scipy(getattr(sparse, kind)(matrix)).to_scipy() != matrix).nnz == 0


def test_from_scipy_adds_duplicates_and_writes_nothing():
    matrix = sparse.coo_array(([1.0, 2.0, 3.0], ([0, 1, 0], [1, 0, 1])), shape=(2, 2))
    matrix = sparse.coo_array(
        (np.append(matrix.data, 2.0), (np.append(matrix.row, 1), np.append(matrix.col, 0))), shape=(2, 2)
    )
    assert Graph.from_scipy(matrix).weight.tolist() == [4.0, 4.0] and matrix.nnz == 4


def test_from_edge_index_adds_duplicates_in_any_order():
    index = torch.tensor([[2, 0, 1, 0, 0, 1], [0, 1, 0, 2, 1, 0]])
    graph = Graph.from_edge_index(index, torch.tensor([8.0, 1.0, 1.0, 8.0, 4.0, 4.0]))
    assert graph.to_scipy().toarray().tolist() == [[0, 5, 8], [5, 0, 0], [8, 0, 0]]


def test_reverse_and_degree():
    graph = Graph.from_scipy(random_matrix(100))
    rows, col = graph.rows, graph.col.long()
    assert (
        rows[graph.reverse].equal(col)
        and col[graph.reverse].equal(rows)
        and graph.weight[graph.reverse].equal(graph.weight)
    )
    torch.testing.assert_close(graph.degree, torch.from_numpy(graph.to_scipy().sum(axis=1)))
    assert (graph.crow.dtype, graph.col.dtype, graph.reverse.dtype) == (torch.int64, torch.int32, torch.int64)


def test_loops_are_their_own_reverse():
    graph = Graph.from_edge_index(torch.tensor([[0, 0, 1], [0, 1, 0]]))
    assert graph.reverse.tolist() == [0, 2, 1]


def test_components_see_positive_weights_only():
    index = torch.tensor([[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]])
    graph = Graph.from_edge_index(index, torch.tensor([1.0, 1.0, 0.0, 0.0, 2.0, 2.0]), num_nodes=6)
    labels, count = graph.components
    assert (
        count == 4
        and labels[0] == labels[1]
        and labels[3] == labels[4]
        and len({int(labels[i]) for i in (0, 2, 3, 5)}) == 4
    )
    assert graph.components[0] is labels and graph.to(torch.float64)._components[0].equal(labels)


def test_dtype_and_weights_change_on_copies():
    graph = Graph.from_scipy(random_matrix(20, dtype=np.float32))
    assert graph.to(torch.float64).dtype == torch.float64 and graph.dtype == torch.float32
    doubled = graph.with_weight(2 * graph.weight)
    assert doubled.weight.equal(2 * graph.weight) and doubled.col is graph.col
    with pytest.raises(TypeError, match="weights are float32 or float64"):
        graph.to(torch.float16)


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1.0, 1e300])
def test_normalized(scale):
    """To positive weights of mean 1; weights of 0 stay, and do not count."""
    index = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    graph = Graph.from_edge_index(index, scale * torch.tensor([1.0, 1.0, 0.0, 0.0, 4.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(
        graph.normalized().weight, torch.tensor([0.4, 0.4, 0.0, 0.0, 1.6, 1.6], dtype=torch.float64)
    )
    assert graph.normalized().components[0].equal(graph.components[0])
    none = graph.with_weight(torch.zeros(6, dtype=torch.float64))
    assert none.normalized() is none


def test_mutual_neighbours():
    index = torch.tensor([[0, 0, 1, 1, 2, 2, 3], [1, 2, 0, 2, 0, 1, 3]])
    graph = Graph.from_edge_index(index)
    kept = torch.tensor([True, False, True, True, False, True, True])
    graph = Graph(graph.crow, graph.col, graph.weight, graph.reverse, mutual=kept)
    mutual = graph.mutual_neighbours()
    rebuilt = Graph(mutual.crow, mutual.col, mutual.weight, mutual.reverse)  # checks all of it
    assert rebuilt.to_scipy().toarray().tolist() == [[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    with pytest.raises(ValueError, match="mutual is None"):
        rebuilt.mutual_neighbours()


def test_empty():
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), num_nodes=3)
    assert (
        graph.num_nodes == 3
        and graph.num_edges == 0
        and graph.degree.tolist() == [0, 0, 0]
        and graph.components[1] == 3
    )
    assert "num_nodes=3" in repr(graph)


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("keep", ["torch", "pickle", "copy", "deepcopy"])
def test_saved_and_loaded(keep, mutual, tmp_path):
    """By the defaults of torch.load, which take no class that is not known to be safe."""
    graph = Graph.from_scipy(random_matrix(30, dtype=np.float32))
    if mutual:
        graph = Graph(graph.crow, graph.col, graph.weight, graph.reverse, mutual=graph.weight > 0.5)
    components = graph.components
    if keep == "torch":
        torch.save({"graph": graph}, tmp_path / "graph.pt")
        again = torch.load(tmp_path / "graph.pt")["graph"]
    else:
        again = {"pickle": lambda g: pickle.loads(pickle.dumps(g)), "copy": copy.copy, "deepcopy": copy.deepcopy}[keep](
            graph
        )
    assert type(again) is Graph and again.components[0].equal(components[0])
    for name in ("crow", "col", "weight", "reverse"):
        assert (
            getattr(again, name).equal(getattr(graph, name))
            and getattr(again, name).dtype == getattr(graph, name).dtype
        )
    assert again.mutual.equal(graph.mutual) if mutual else again.mutual is None
    if keep in ("torch", "pickle", "deepcopy"):
        assert again.weight.data_ptr() != graph.weight.data_ptr()


def test_a_file_with_a_wrong_graph_is_refused(tmp_path):
    graph = Graph.from_scipy(random_matrix(30))
    graph.col[0] = 31
    torch.save(graph, tmp_path / "graph.pt")
    with pytest.raises(ValueError, match=r"col must be in \[0, 30\)"):
        torch.load(tmp_path / "graph.pt")


@pytest.mark.gpu
def test_moves_between_devices():
    graph = Graph.from_scipy(random_matrix(50))
    moved = graph.to("cuda")
    again = Graph(moved.crow, moved.col, moved.weight)  # the reverse is found on the device
    assert again.reverse.cpu().equal(graph.reverse) and again.to("cpu").degree.equal(graph.degree)


GOOD = {
    "crow": torch.tensor([0, 2, 3, 4]),
    "col": torch.tensor([1, 2, 0, 0]),
    "weight": torch.tensor([1.0, 2.0, 1.0, 2.0]),
    "reverse": torch.tensor([2, 3, 0, 1]),
}
BAD = [
    (
        {"crow": torch.tensor([0, 3, 2, 4])},
        ValueError,
        r"crow must ascend from 0 to E = 4; crow\[1\] is 3 and crow\[2\] is 2",
    ),
    (
        {"crow": torch.tensor([0, 2, 3])},
        ValueError,
        r"crow must ascend from 0 to E = 4, the size of col; it goes from 0 to 3",
    ),
    ({"crow": torch.zeros(0, dtype=torch.int64)}, ValueError, r"crow must be \[N \+ 1\], got an empty tensor"),
    ({"crow": [0, 1]}, TypeError, r"crow must be a tensor, got list"),
    ({"col": torch.tensor([1, 3, 0, 0])}, ValueError, r"col must be in \[0, 3\), the nodes of crow; col\[1\] is 3"),
    (
        {"col": torch.tensor([2, 1, 0, 0])},
        ValueError,
        r"col must ascend within a row, none twice; row 0 has 2 and then 1 at entry 0",
    ),
    ({"col": torch.tensor([1, 1, 0, 0])}, ValueError, r"col must ascend within a row, none twice"),
    (
        {"col": torch.tensor([1, 2, 2, 0])},
        ValueError,
        r"the graph must be symmetric: it has the entry \(0, 1\) but not \(1, 0\)",
    ),
    ({"col": torch.tensor([1.0, 2.0, 0.0, 0.0])}, TypeError, r"col must be int32 or int64, got torch.float32"),
    (
        {"weight": torch.tensor([1.0, 2.0, 1.5, 2.0])},
        ValueError,
        r"weight must be symmetric; the entry \(0, 1\) is 1 and its mirror is 1.5",
    ),
    (
        {"weight": torch.tensor([-1.0, 2.0, -1.0, 2.0])},
        ValueError,
        r"weight must be finite and >= 0; the entry \(0, 1\) is -1",
    ),
    (
        {"weight": torch.tensor([1.0, torch.nan, 1.0, torch.nan])},
        ValueError,
        r"weight must be finite and >= 0; the entry \(0, 2\) is nan",
    ),
    ({"weight": torch.tensor([1.0, torch.inf, 1.0, torch.inf])}, ValueError, r"weight must be finite and >= 0"),
    ({"weight": torch.ones(3)}, ValueError, r"weight must have E = 4 elements like col, got 3"),
    ({"weight": torch.ones(4).half()}, TypeError, r"weight must be float32 or float64, got torch.float16"),
    (
        {"reverse": torch.tensor([3, 2, 0, 1])},
        ValueError,
        r"reverse\[0\] is 3; it should be 2, the position of \(j, i\)",
    ),
    ({"mutual": torch.ones(4)}, TypeError, r"mutual must be bool, got torch.float32"),
    (
        {"mutual": torch.tensor([True, True, False, True])},
        ValueError,
        r"mutual must be symmetric; the entry \(0, 1\) differs from its mirror",
    ),
    ({"weight": torch.ones(4, device="meta")}, ValueError, r"weight is on meta but crow is on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_arrays(change, error, message):
    Graph(**GOOD)
    with pytest.raises(error, match=message):
        Graph(**(GOOD | change))


def test_bad_sources():
    with pytest.raises(ValueError, match=r"the graph must be symmetric.*W \+ W.T makes it so"):
        Graph.from_scipy(sparse.csr_array(np.triu(np.ones((3, 3)), 1)))
    with pytest.raises(ValueError, match=r"edge_index must be symmetric: it has the entry \(0, 1\) but not \(1, 0\)"):
        Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 1]]))
    with pytest.raises(ValueError, match=r"matrix must be square, got shape \(2, 3\)"):
        Graph.from_scipy(sparse.csr_array(np.ones((2, 3))))
    with pytest.raises(TypeError, match=r"matrix must be a scipy\.sparse matrix"):
        Graph.from_scipy(np.ones((2, 2)))
    with pytest.raises(TypeError, match=r"matrix must be real, got complex128"):
        Graph.from_scipy(sparse.csr_array(np.eye(2) * 1j))
    with pytest.raises(TypeError, match=r"matrix must be a tensor of layout torch\.sparse_csr, got torch\.strided"):
        Graph.from_torch_sparse(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"matrix must be a tensor of layout torch\.sparse_csr, got NoneType"):
        Graph.from_torch_sparse(None)
    edges = torch.tensor([[0, 1], [1, 0]])
    with pytest.raises(TypeError, match=r"weight must be a tensor \[E\], got list"):
        Graph.from_edge_index(edges, [1.0, 1.0])
    for value, error in ((2.0, TypeError), (True, TypeError), (-1, ValueError)):
        with pytest.raises(error, match="num_nodes must be"):
            Graph.from_edge_index(edges, num_nodes=value)
    assert Graph.from_edge_index(edges, num_nodes=np.int64(3)).num_nodes == 3
    with pytest.raises(TypeError, match="target must be a device or a dtype, got NoneType"):
        Graph.from_edge_index(edges).to(None)
    with pytest.raises(TypeError, match=r"edge_index must be a tensor \[2, E\], got list"):
        Graph.from_edge_index([[0, 1], [1, 0]])
    with pytest.raises(TypeError, match=r"weight must be float32 or float64, got torch.int64"):
        Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"edge_index must be \[2, E\] int32 or int64"):
        Graph.from_edge_index(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"edge_index must be in \[0, 2\), got values from 0 to 2"):
        Graph.from_edge_index(torch.tensor([[0, 2], [2, 0]]), num_nodes=2)
    with pytest.raises(ValueError, match=r"weight must be \[E\], E = 2 of edge_index, got \[3\]"):
        Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), torch.ones(3))

# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of the graph family, on kNN graphs (k = 50) of clustered points: our ops, the references, and the
solvers users have.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import ops, reference
from ssmkernels.bench.case import Case
from ssmkernels.bench.measure import Function
from ssmkernels.graph import Graph, knn_graph, label_propagation
from ssmkernels.graph.propagation import LabelSystem

EDGE_SIZES = [(10_000, 10), (10_000, 100), (10_000, 200), (60_000, 10), (60_000, 100), (250_000, 10)]  # N, C
SOLVE_SIZES = [(10_000, 10), (10_000, 100), (60_000, 10), (60_000, 100), (250_000, 10)]
QUICK_EDGE_SIZES, QUICK_SOLVE_SIZES = [(2_000, 10), (2_000, 100)], [(2_000, 10)]
CUDA_SIZES = [(10_000, 10), (60_000, 100)]
# Of the [E, C] tensors that the reference stores: about 3 and 20 GB
DENSE_ELEMENTS = {"cpu": 150_000_000, "cuda": 1_000_000_000}
RTOL = 1e-6
SCIPY_COLUMNS = 2  # of a call; its time is scaled to all of them


class Points(NamedTuple):
    graph: Graph
    labels: Tensor
    """[N] five labels per class, −1 elsewhere."""


@functools.cache
def clustered(nodes: int, classes: int, device: str = "cpu") -> Points:
    """Points around ``classes`` centres in 16 dimensions, in no order; their graph in float64, on the CPU, searched
    for on a device.
    """
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 16, generator=draw)
    member = torch.randint(classes, (nodes,), generator=draw)
    points = F.normalize(centres[member] + 0.6 * torch.randn(nodes, 16, generator=draw), dim=1)
    labels = torch.full((nodes,), -1)
    for c in range(classes):
        labels[(member == c).nonzero()[:5, 0]] = c
    return Points(knn_graph(points.to(device), 50).to("cpu").to(torch.float64), labels)


def random_graph(entries: int) -> Graph:
    """A ring whose nodes also know 24 more on either side: 50 entries a row, built without a search."""
    nodes = entries // 50
    steps = torch.cat([torch.arange(-25, 0), torch.arange(1, 26)])
    col = ((torch.arange(nodes)[:, None] + steps) % nodes).sort(dim=1).values.flatten()
    return Graph(torch.arange(nodes + 1) * 50, col, torch.ones(nodes * 50))


def pyamg_cg(graph: Graph, diagonal: Tensor, rhs: Tensor) -> Function | None:
    """CG with pyamg's smoothed aggregation as preconditioner, column by column in float64, where it is installed; the
    time holds the set-up of the hierarchy, once for all columns.
    """
    if importlib.util.find_spec("pyamg") is None:
        return None
    aggregation = importlib.import_module("pyamg").smoothed_aggregation_solver
    matrix, columns = _system(graph, diagonal), rhs.double().cpu().numpy()

    def solve() -> list[Any]:
        hierarchy = aggregation(matrix, symmetry="symmetric")
        return [hierarchy.solve(column, tol=RTOL, accel="cg") for column in columns.T]

    return solve


def scipy_all_columns(graph: Graph, diagonal: Tensor, rhs: Tensor) -> Function:
    """The same conjugate gradients in float64 by scipy's sparse product with all columns at once."""
    matrix, right = _system(graph, diagonal), rhs.double().cpu()
    whole = torch.from_numpy(matrix.diagonal())[:, None]
    return lambda: _cg(lambda p: torch.from_numpy(matrix @ p.numpy()), whole, right, RTOL, 1000)


def _system(graph: Graph, diagonal: Tensor) -> Any:
    """L + diag(diagonal) as scipy's CSR matrix in float64."""
    from scipy import sparse

    whole = (graph.degree.double() + diagonal.double()).cpu().numpy()
    return (sparse.diags_array(whole) - graph.to(torch.float64).to_scipy()).tocsr()


def torch_sparse_cg(
    crow: Tensor, col: Tensor, weight: Tensor, diagonal: Tensor, rhs: Tensor, rtol: float = RTOL, max_iter: int = 1000
) -> Tensor:
    """The same conjugate gradients as torch code on a sparse CSR matrix."""
    nodes = len(diagonal)
    rows = torch.repeat_interleave(torch.arange(nodes, device=crow.device), crow.diff())
    whole = diagonal.index_add(0, rows, weight)[:, None]
    adjacency = torch.sparse_csr_tensor(crow, col.long(), weight, (nodes, nodes), check_invariants=False)
    return _cg(lambda p: whole * p - adjacency @ p, whole, rhs, rtol, max_iter)


def _cg(multiply: Callable[[Tensor], Tensor], whole: Tensor, rhs: Tensor, rtol: float, max_iter: int) -> Tensor:
    """Jacobi, all columns at once, converged columns frozen; ``whole`` [N, 1] is the diagonal."""
    x, r = torch.zeros_like(rhs), rhs.clone()
    z = r / whole
    p, rz, limit = z.clone(), (r * z).sum(0), rtol * rhs.norm(dim=0)
    for _ in range(max_iter):
        active = r.norm(dim=0) > limit
        if not bool(active.any()):
            break
        product = multiply(p)
        alpha = torch.where(active, rz / (p * product).sum(0), 0)
        x += alpha * p
        r -= alpha * product
        z = r / whole
        following = (r * z).sum(0)
        p = z + torch.where(active, following / rz, 0) * p
        rz = following
    return x


def scipy_cg(graph: Graph, diagonal: Tensor, rhs: Tensor) -> Function:
    """scipy.sparse.linalg.cg with Jacobi, column by column in float64, as LP-DeepSSL solves (which stops it after 20
    iterations).
    """
    from scipy import sparse
    from scipy.sparse.linalg import cg

    matrix = _system(graph, diagonal)
    inverse = sparse.diags_array(1 / matrix.diagonal())
    columns = rhs.double().cpu().numpy()[:, :SCIPY_COLUMNS]
    return lambda: [cg(matrix, columns[:, c], rtol=RTOL, atol=0, M=inverse)[0] for c in range(columns.shape[1])]


def graphlearning_cg(graph: Graph, diagonal: Tensor, rhs: Tensor) -> Function | None:
    """GraphLearning's conjgrad (no preconditioner, absolute tolerance over all columns), where it is installed."""
    if importlib.util.find_spec("graphlearning") is None:
        return None
    conjgrad = importlib.import_module("graphlearning.utils").conjgrad
    matrix, columns = _system(graph, diagonal), rhs.double().numpy()
    return lambda: conjgrad(matrix, columns, tol=RTOL * float(rhs.double().norm()))


def cases(*, device: str = "cpu", dtype: torch.dtype = torch.float32, quick: bool = False) -> Iterator[Case]:
    """One case per op and size; the labels that are propagated are five of each class."""
    dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32  # half types are computed in it
    edge_sizes, solve_sizes = (QUICK_EDGE_SIZES, QUICK_SOLVE_SIZES) if quick else (EDGE_SIZES, SOLVE_SIZES)
    if device == "cuda" and not quick:
        edge_sizes = solve_sizes = CUDA_SIZES
    for nodes, classes in edge_sizes:
        points = clustered(nodes, classes)
        graph = points.graph.to(dtype)
        # float32 does not reach its tolerance on separate clusters
        propagated = label_propagation(points.graph, points.labels).to(dtype)
        yield edges_case(graph.to(device), propagated.to(device), backward=False)
        if nodes <= 10_000 and classes <= 100:
            yield edges_case(graph.to(device), propagated.to(device), backward=True)
    for nodes, classes in solve_sizes:
        for real in (torch.float32, torch.float64):
            yield solve_case(clustered(nodes, classes), real, device)
    clustered.cache_clear()


def growth_cases(entries: int) -> Iterator[Case]:
    """Both ops on a ring of so many entries, ten classes, without peers; thirty iterations."""
    graph = random_graph(entries)
    draw = torch.Generator().manual_seed(0)
    yield edges_case(graph, torch.randn(graph.num_nodes, 10, generator=draw) / 500, backward=False, peers=False)
    labels = torch.full((graph.num_nodes,), -1)
    labeled = slice(None, None, max(1, graph.num_nodes // 50))
    labels[labeled] = torch.arange(len(labels[labeled])) % 10
    yield short_solve_case(graph, labels)


def edges_case(graph: Graph, propagated: Tensor, *, backward: bool, peers: bool = True) -> Case:
    entries, (nodes, classes) = graph.num_edges, propagated.shape
    weight, labels = graph.weight.clone().requires_grad_(backward), propagated.clone().requires_grad_(backward)
    grad = torch.ones_like(weight)

    def call(package: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> object:
            out = package(graph.crow, graph.col, graph.reverse, weight, labels)
            return torch.autograd.grad(out, (weight, labels), grad) if backward else out

        return run

    others: dict[str, Function] = {}
    if peers and entries * classes <= DENSE_ELEMENTS[propagated.device.type]:
        others["eager"] = call(reference.leave_one_edge_out)
        others["torch.compile"] = call(torch.compile(reference.leave_one_edge_out, dynamic=False))
    item = propagated.element_size()
    # Each pair reads the row of its other node once, a row of its own is read once; ids, weights and mirrors are read,
    # the result written.
    moved = item * (entries // 2 + nodes) * classes + entries * (4 + 8 + 2 * item)
    return Case(
        op="leave_one_edge_out",
        phase="forward + backward" if backward else "forward",
        size={"N": nodes, "E": entries, "C": classes},
        dtype=propagated.dtype,
        ours=call(ops.leave_one_edge_out),
        peers=others,
        products={},
        product_counts={},
        flops=20 * entries * classes,
        bytes=moved * (3 if backward else 1),
    )


def solve_case(points: Points, dtype: torch.dtype, device: str) -> Case:
    graph = points.graph.to(dtype)
    system = LabelSystem(graph, points.labels)
    constant = (system.rhs.sum(dim=0) / system.diagonal.sum())[None]  # of one component, as these graphs nearly are
    rhs, diagonal = (system.rhs - system.diagonal[:, None] * constant).to(dtype), system.diagonal.to(dtype)
    peers: dict[str, Function] = {"scipy cg": scipy_cg(graph, diagonal, rhs)}
    if graph.num_nodes <= 10_000 and device == "cpu":
        peers["scipy, all columns"] = scipy_all_columns(graph, diagonal, rhs)
        for name, peer in {"GraphLearning": graphlearning_cg, "pyamg": pyamg_cg}.items():
            if (solve := peer(graph, diagonal, rhs)) is not None:
                peers[name] = solve
    graph, rhs, diagonal = graph.to(device), rhs.to(device), diagonal.to(device)
    arguments = (graph.crow, graph.col, graph.weight, None, diagonal, rhs)
    if dtype == torch.float32:
        peers["torch sparse CG"] = functools.partial(
            torch_sparse_cg, graph.crow, graph.col, graph.weight, diagonal, rhs
        )
    scale = {"scipy cg": rhs.shape[1] / SCIPY_COLUMNS}
    return _solve(arguments, peers, scale)


def short_solve_case(graph: Graph, labels: Tensor) -> Case:
    system = LabelSystem(graph, labels)
    rhs = (system.rhs - system.diagonal[:, None] * (system.rhs.sum(dim=0) / system.diagonal.sum())).float()
    return _solve((graph.crow, graph.col, graph.weight, None, system.diagonal.float(), rhs), {}, {}, max_iter=30)


def _solve(
    arguments: tuple[Any, ...], peers: dict[str, Function], scale: dict[str, float], max_iter: int = 1000
) -> Case:
    _, _, weight, _, _, rhs = arguments
    iterations = int(torch.ops.ssmkernels.laplacian_solve(*arguments, None, RTOL, max_iter, True)[1].max())
    nodes, columns = rhs.shape
    item = rhs.element_size()
    # Per iteration the matrix is read once and eleven vectors are read or written; neighbours' rows are taken for cache
    # hits.
    moved = iterations * (len(weight) * (4 + item) + 11 * item * nodes * columns)
    return Case(
        op="laplacian_solve",
        phase=f"{iterations} iterations",
        size={"N": nodes, "E": len(weight), "C": columns},
        dtype=rhs.dtype,
        ours=lambda: torch.ops.ssmkernels.laplacian_solve(*arguments, None, RTOL, max_iter, True),
        peers=peers,
        products={},
        product_counts={},
        flops=2 * iterations * len(weight) * columns,
        bytes=moved,
        peer_scale=scale,
    )

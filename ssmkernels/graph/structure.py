# SPDX-License-Identifier: BSD-3-Clause
"""A symmetric, weighted graph in compressed sparse rows."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ssmkernels.ops import _checks as check


class Graph:
    """A symmetric graph of N nodes; both directions of an edge are stored, so E counts each twice. It does not change.

    A node may be its own neighbour (then ``reverse[e] == e``). :func:`ssmkernels.graph.knn_graph` makes one from
    features; :meth:`from_scipy`, :meth:`from_edge_index` and :meth:`from_torch_sparse` from what others have.
    ``torch.save`` and ``torch.load`` with their defaults keep one, as pickle and ``copy.deepcopy`` do: where
    ``ssmkernels.graph`` has been imported, torch loads it with ``weights_only=True``, and what it finds is checked as
    here.

    Args:
        crow: [N + 1] int32 or int64, where the entries of each row begin.
        col: [E] int32 or int64, ascending within a row, none twice.
        weight: [E] float32 or float64, finite, ≥ 0 and symmetric up to rounding.
        reverse: [E] int32 or int64, the position of (j, i) for the entry (i, j); found if not given.
        mutual: [E] bool, whether each end of the edge is among the k nearest neighbours of the other, where that is
            known.

    Raises:
        TypeError, ValueError: naming the argument, and the entry where one is wrong.
    """

    crow: Tensor
    """[N + 1] int64."""
    col: Tensor
    """[E] int32."""
    weight: Tensor
    """[E] float32 or float64."""
    reverse: Tensor
    """[E] int64."""
    mutual: Tensor | None
    """[E] bool, or None."""

    def __init__(
        self, crow: Tensor, col: Tensor, weight: Tensor, reverse: Tensor | None = None, *, mutual: Tensor | None = None
    ) -> None:
        _check_arrays(crow, col, weight, reverse, mutual)
        crow, col = _plain(crow.long()), _plain(col.long())
        nodes, rows = len(crow) - 1, _rows(crow)
        _check_rows(rows, col, nodes)
        mirror = _reverse(crow, rows, col)
        if reverse is not None and not bool((reverse.long() == mirror).all()):
            entry = int((reverse.long() != mirror).nonzero()[0])
            place = f"(i, j) = ({int(rows[entry])}, {int(col[entry])})"
            raise ValueError(
                f"reverse[{entry}] is {int(reverse[entry])}; it should be {int(mirror[entry])}, the position of (j, i)"
                f" for {place}"
            )
        _check_weight(weight, mirror, rows, col)
        if mutual is not None and not mutual.equal(mutual[mirror]):
            entry = int((mutual != mutual[mirror]).nonzero()[0])
            raise ValueError(
                f"mutual must be symmetric; the entry ({int(rows[entry])}, {int(col[entry])}) differs from its mirror"
            )
        self._set(crow, col.int(), _plain(weight.detach()), mirror, mutual)

    @classmethod
    def _trusted(cls, crow: Tensor, col: Tensor, weight: Tensor, reverse: Tensor, mutual: Tensor | None) -> Graph:
        """Without the checks, for arrays that come from a graph."""
        graph = cls.__new__(cls)
        graph._set(crow, col, weight, reverse, mutual)
        return graph

    def _set(self, crow: Tensor, col: Tensor, weight: Tensor, reverse: Tensor, mutual: Tensor | None) -> None:
        self.crow, self.col, self.weight, self.reverse, self.mutual = crow, col, weight, reverse, mutual
        self._components: tuple[Tensor, int] | None = None

    def __getstate__(self) -> dict[str, Tensor | None]:
        return {
            "crow": self.crow,
            "col": self.col,
            "weight": self.weight,
            "reverse": self.reverse,
            "mutual": self.mutual,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        loaded = Graph(**state)  # a file may hold anything
        self._set(loaded.crow, loaded.col, loaded.weight, loaded.reverse, loaded.mutual)

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.crow) - 1

    @property
    def num_edges(self) -> int:
        """E, both directions counted."""
        return len(self.col)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.weight.dtype

    @property
    def rows(self) -> Tensor:
        """[E] int64, the row of every entry."""
        return _rows(self.crow)

    @property
    def degree(self) -> Tensor:
        """[N] D_ii, the sum of the weights of a node's edges."""
        return self.sum_rows(self.weight)

    def sum_rows(self, values: Tensor) -> Tensor:
        """[N] the sums of ``values`` [E] over the entries of each row, in their order: the same bits in every run."""
        return torch.segment_reduce(values, "sum", offsets=self.crow, initial=0)

    @property
    def components(self) -> tuple[Tensor, int]:
        """[N] int64, the connected component of every node over edges of positive weight, and their number. Found
        once.
        """
        if self._components is None:
            from scipy.sparse.csgraph import connected_components

            linked = self.to_scipy()
            linked.data = (linked.data > 0).astype(np.float32)
            linked.eliminate_zeros()
            count, labels = connected_components(linked, directed=False)
            self._components = torch.from_numpy(labels).long().to(self.device), int(count)
        return self._components

    def to(self, target: torch.device | torch.dtype | str) -> Graph:
        """The same graph on another device, or with weights of another dtype, float32 or float64."""
        if not isinstance(target, (torch.device, torch.dtype, str)):
            raise TypeError(f"target must be a device or a dtype, got {type(target).__name__}")
        if isinstance(target, torch.dtype):
            if target not in (torch.float32, torch.float64):
                raise TypeError(f"target is {target}; weights are float32 or float64")
            moved = Graph._trusted(self.crow, self.col, self.weight.to(target), self.reverse, self.mutual)
        else:
            mutual = None if self.mutual is None else self.mutual.to(target)
            crow, col, weight, reverse = (x.to(target) for x in (self.crow, self.col, self.weight, self.reverse))
            moved = Graph._trusted(crow, col, weight, reverse, mutual)
        if self._components is not None:
            moved._components = self._components[0].to(moved.device), self._components[1]
        return moved

    def with_weight(self, weight: Tensor) -> Graph:
        """The same edges with other weights [E], finite, ≥ 0 and symmetric."""
        _check_arrays(self.crow, self.col, weight, None, None)
        _check_weight(weight, self.reverse, self.rows, self.col)
        return Graph._trusted(self.crow, self.col, _plain(weight.detach()), self.reverse, self.mutual)

    def normalized(self) -> Graph:
        """The same edges with the weights W/w̄, w̄ being the mean of the positive ones; the same graph where there
        are none.
        """
        weight = self.weight.double()
        largest = float(weight.max()) if self.num_edges else 0.0
        if largest == 0:
            return self
        weight = weight / largest  # so that the sum is finite
        graph = self.with_weight((weight / weight[weight > 0].mean()).to(self.dtype))
        if bool((graph.weight > 0).equal(self.weight > 0)):  # none too small for the dtype
            graph._components = self.components
        return graph

    def mutual_neighbours(self) -> Graph:
        """The graph of the edges whose ends are each among the other's nearest neighbours.

        Raises:
            ValueError: ``mutual`` is not known.
        """
        if self.mutual is None:
            raise ValueError(
                "mutual is None; this graph does not know which of its edges join mutual neighbours (knn_graph's do)"
            )
        kept = self.mutual
        count = torch.zeros_like(self.crow)
        count[1:] = kept.cumsum(0)[self.crow[1:] - 1].masked_fill(self.crow[1:] == 0, 0) if len(kept) else 0
        position = kept.cumsum(0) - 1
        return Graph._trusted(count, self.col[kept], self.weight[kept], position[self.reverse[kept]], kept[kept])

    @classmethod
    def from_scipy(cls, matrix: Any) -> Graph:
        """From a symmetric sparse matrix or array [N, N] of any format; entries that occur twice are added, as scipy
        does.

        Weights of float32 stay so, all others become float64.
        """
        from scipy import sparse

        if not sparse.issparse(matrix):
            raise TypeError(f"matrix must be a scipy.sparse matrix or array [N, N], got {type(matrix).__name__}")
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {matrix.shape}")
        if not np.can_cast(matrix.dtype, np.float64, casting="same_kind"):
            raise TypeError(f"matrix must be real, got {matrix.dtype}")
        csr = sparse.csr_array(matrix, copy=True)
        csr.sum_duplicates()
        values = csr.data if csr.data.dtype == np.float32 else csr.data.astype(np.float64)
        return cls(torch.from_numpy(csr.indptr), torch.from_numpy(csr.indices), torch.from_numpy(values))

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.csr_array`` [N, N] with arrays of its own."""
        from scipy import sparse

        arrays = (x.cpu().numpy().copy() for x in (self.weight, self.col, self.crow))
        return sparse.csr_array(tuple(arrays), shape=(self.num_nodes, self.num_nodes))

    @classmethod
    def from_edge_index(
        cls, edge_index: Tensor, weight: Tensor | None = None, *, num_nodes: int | None = None
    ) -> Graph:
        """From pairs [2, E] in any order, both directions of each edge present; pairs that occur twice are added.

        Args:
            edge_index: [2, E] int32 or int64, as PyTorch Geometric has it.
            weight: [E]; 1 in float32 if not given.
            num_nodes: N; the largest node and one if not given.
        """
        if not isinstance(edge_index, Tensor):
            raise TypeError(f"edge_index must be a tensor [2, E], got {type(edge_index).__name__}")
        if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"edge_index must be [2, E] int32 or int64, got {list(edge_index.shape)} {edge_index.dtype}"
            )
        edge_index = edge_index.long()
        top = int(edge_index.max()) + 1 if edge_index.numel() else 0
        nodes = top if num_nodes is None else check.check_integer("num_nodes", num_nodes)
        if nodes < 0:
            raise ValueError(f"num_nodes must be at least 0, got {nodes}")
        if top > nodes or (edge_index.numel() and int(edge_index.min()) < 0):
            raise ValueError(
                f"edge_index must be in [0, {nodes}), got values from {int(edge_index.min())} to {top - 1}"
            )
        if weight is None:
            weight = torch.ones(edge_index.shape[1], device=edge_index.device)
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor [E], got {type(weight).__name__}")
        if weight.shape != edge_index.shape[1:]:
            raise ValueError(f"weight must be [E], E = {edge_index.shape[1]} of edge_index, got {list(weight.shape)}")
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"weight must be float32 or float64, got {weight.dtype}")
        if weight.device != edge_index.device:
            raise ValueError(
                f"weight is on {weight.device} but edge_index is on {edge_index.device}; both must be on one device"
            )
        keys, order = (edge_index[0] * nodes + edge_index[1]).sort(stable=True)
        keys, times = keys.unique_consecutive(return_counts=True)
        begins = torch.nn.functional.pad(times.cumsum(0), (1, 0))
        summed = torch.segment_reduce(weight.detach()[order], "sum", offsets=begins, initial=0)
        crow = torch.searchsorted(keys, torch.arange(nodes + 1, device=keys.device) * nodes)
        rows, col = keys // max(nodes, 1), keys % max(nodes, 1)
        mirror = _reverse(crow, rows, col, "edge_index")
        _check_weight(summed, mirror, rows, col)
        return cls._trusted(crow, col.int(), summed, mirror, None)

    def to_edge_index(self) -> tuple[Tensor, Tensor]:
        """edge_index [2, E] int64 and weight [E]."""
        return torch.stack([self.rows, self.col.long()]), self.weight

    @classmethod
    def from_torch_sparse(cls, matrix: Tensor) -> Graph:
        """From a symmetric torch tensor [N, N] in CSR layout."""
        if not isinstance(matrix, Tensor) or matrix.layout != torch.sparse_csr:
            kind = matrix.layout if isinstance(matrix, Tensor) else type(matrix).__name__
            raise TypeError(
                f"matrix must be a tensor of layout torch.sparse_csr, got {kind}; .to_sparse_csr() makes one"
            )
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be [N, N], got shape {list(matrix.shape)}")
        return cls(matrix.crow_indices(), matrix.col_indices(), matrix.values())

    def to_torch_sparse(self) -> Tensor:
        """A torch tensor [N, N] in CSR layout."""
        size = (self.num_nodes, self.num_nodes)
        return torch.sparse_csr_tensor(self.crow, self.col.long(), self.weight, size, check_invariants=False)

    def __repr__(self) -> str:
        return (
            f"Graph(num_nodes={self.num_nodes}, num_edges={self.num_edges}, dtype={self.dtype}, device='{self.device}')"
        )


def _plain(value: Tensor) -> Tensor:
    """Contiguous, and without the negative bit, which numpy does not know."""
    return value.resolve_neg().contiguous()


def _rows(crow: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device), crow.diff())


def _check_arrays(crow: Tensor, col: Tensor, weight: Tensor, reverse: Tensor | None, mutual: Tensor | None) -> None:
    arrays = {"crow": crow, "col": col, "weight": weight, "reverse": reverse, "mutual": mutual}
    for name, value in arrays.items():
        if value is None and name in ("reverse", "mutual"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.ndim != 1:
            raise ValueError(f"{name} must have one dimension, got shape {list(value.shape)}")
        if value.device != crow.device:
            raise ValueError(
                f"{name} is on {value.device} but crow is on {crow.device}; all tensors must be on one device"
            )
        if name in ("crow", "col", "reverse") and value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {value.dtype}")
        if name not in ("crow", "col") and value.shape != col.shape:
            raise ValueError(f"{name} must have E = {len(col)} elements like col, got {len(value)}")
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight must be float32 or float64, got {weight.dtype}")
    if mutual is not None and mutual.dtype != torch.bool:
        raise TypeError(f"mutual must be bool, got {mutual.dtype}")
    if len(crow) == 0:
        raise ValueError("crow must be [N + 1], got an empty tensor")
    if int(crow[0]) != 0 or int(crow[-1]) != len(col):
        raise ValueError(
            f"crow must ascend from 0 to E = {len(col)}, the size of col; it goes from {int(crow[0])} to"
            f" {int(crow[-1])}"
        )
    descents = (crow.diff() < 0).nonzero()
    if len(descents):
        i = int(descents[0])
        raise ValueError(
            f"crow must ascend from 0 to E = {len(col)}; crow[{i}] is {int(crow[i])} and crow[{i + 1}] is"
            f" {int(crow[i + 1])}"
        )


def _check_rows(rows: Tensor, col: Tensor, nodes: int) -> None:
    if len(col) == 0:
        return
    outside = ((col < 0) | (col >= nodes)).nonzero()
    if len(outside):
        entry = int(outside[0])
        raise ValueError(f"col must be in [0, {nodes}), the nodes of crow; col[{entry}] is {int(col[entry])}")
    wrong = (col[1:] <= col[:-1]) & (rows[1:] == rows[:-1])
    if bool(wrong.any()):
        entry = int(wrong.nonzero()[0])
        raise ValueError(
            f"col must ascend within a row, none twice; row {int(rows[entry])} has {int(col[entry])} and then"
            f" {int(col[entry + 1])} at entry {entry}"
        )


def _reverse(crow: Tensor, rows: Tensor, col: Tensor, name: str = "the graph") -> Tensor:
    """The position of (j, i) for every entry (i, j); a ValueError names an entry that has none."""
    nodes = len(crow) - 1
    if crow.device.type == "cpu":
        from scipy import sparse

        positions = sparse.csr_array((np.arange(len(col)), col.numpy(), crow.numpy()), shape=(nodes, nodes)).tocsc()
        if np.array_equal(positions.indptr, crow.numpy()) and np.array_equal(positions.indices, col.numpy()):
            return torch.from_numpy(positions.data.astype(np.int64))
    keys, wanted = rows * nodes + col, col * nodes + rows
    places = torch.searchsorted(keys, wanted).clamp_max(max(len(keys) - 1, 0))
    missing = keys[places] != wanted
    if bool(missing.any()):
        entry = int(missing.nonzero()[0])
        i, j = int(rows[entry]), int(col[entry])
        raise ValueError(
            f"{name} must be symmetric: it has the entry ({i}, {j}) but not ({j}, {i}); W + W.T makes it so"
        )
    return places


def _check_weight(weight: Tensor, reverse: Tensor, rows: Tensor, col: Tensor) -> None:
    if len(weight) == 0:
        return
    weight = weight.detach()

    def entry_where(wrong: Tensor) -> str:
        entry = int(wrong.nonzero()[0])
        return f"the entry ({int(rows[entry])}, {int(col[entry])}) is {float(weight[entry]):g}"

    wrong = ~((weight >= 0) & (weight < torch.inf))
    if bool(wrong.any()):
        raise ValueError(f"weight must be finite and >= 0; {entry_where(wrong)}")
    other = weight[reverse]
    wrong = (weight - other).abs() > 16 * torch.finfo(weight.dtype).eps * torch.maximum(weight, other)
    if bool(wrong.any()):
        mirrored = cast(float, other[wrong.nonzero()[0]].item())
        raise ValueError(
            f"weight must be symmetric; {entry_where(wrong)} and its mirror is {mirrored:g}; W + W.T makes it so"
        )


torch.serialization.add_safe_globals([Graph])

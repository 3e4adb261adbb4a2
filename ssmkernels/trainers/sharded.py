# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints in parts, by ``torch.distributed.checkpoint``: every rank writes a share while training goes on.

A checkpoint is a folder ``step-N`` of DCP's files, and beside each of them its SHA-256. That of ``.metadata`` comes
last, when all ranks have written, so that a folder without it is none; the checkpoint before is removed only then. All
values are tensors to DCP, and nothing that it would unpickle is made but what describes tensors. Any number of ranks
reads what any other wrote. Of a tensor whose rows are split over ranks every rank writes its own, under a key of its
own, and reads those that it wants.
"""

from __future__ import annotations

import io
import itertools
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import StorageMeta

from ssmkernels._files import DamagedFile, WriteError, sha256_of, sync_folder, write_atomically
from ssmkernels.distributed import RowShard, is_distributed, rank_of

FOLDER = "checkpoint"
_NAME = re.compile(r"step-(\d+)")
_DESCRIPTION = ".metadata"
_CHECKSUM = ".sha256"
_PLAIN = "plain values"  # the key of what is no tensor
_TENSOR, _ROWS = "ssmkernels.tensor", "ssmkernels.rows"
_NO_GROUP = "torch.distributed is (disabled|unavailable)"  # what DCP warns of in one process


def latest(folder: Path) -> Path | None:
    """The whole checkpoint of the most steps in ``folder``, None where there is none."""
    return max(_whole(folder), key=lambda path: int(path.name[5:]), default=None)


def _whole(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path for path in paths if _NAME.fullmatch(path.name) and (path / (_DESCRIPTION + _CHECKSUM)).is_file()]


class Saver:
    """Saves checkpoints in ``folder``, on every rank. One is written at a time.

    Args:
        timeout: seconds that ranks wait for each other.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self.folder = folder
        self.saving: tuple[Path, Future[Any]] | None = None
        # A group of their own: the default one is used by the training that goes on, and may have no CPU backend.
        self.group: Any = None
        warnings.filterwarnings("ignore", message=_NO_GROUP)  # of another thread
        if is_distributed():
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        if rank_of() == 0 and folder.is_dir():
            for path in set(folder.iterdir()) - set(_whole(folder)):
                shutil.rmtree(path, ignore_errors=True)  # which a killed run left
        if self.group is not None:
            dist.barrier(self.group)

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Begins to write ``state``, which is copied first; waits for the checkpoint before. Of what is no tensor the
        first rank's is kept, of a ``RowShard`` every rank's.
        """
        self.wait()
        path = self.folder / f"step-{step}"
        tensors: dict[str, Tensor] = {}
        plain = _without_tensors(dict(state), tensors, itertools.count())
        if rank_of() == 0:
            file = io.BytesIO()
            torch.save(plain, file)
            tensors[_PLAIN] = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        future = dcp.async_save(
            tensors,
            storage_writer=_Writer(path),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
            process_group=self.group,
            no_dist=self.group is None,
        )
        self.saving = path, future  # type: ignore[assignment]

    def wait(self) -> None:
        """Until what :meth:`save` began is whole; the checkpoints before it are removed.

        Raises:
            WriteError: it cannot be written; the checkpoint before is kept.
        """
        if self.saving is None:
            return
        (path, future), self.saving = self.saving, None
        try:
            future.result()
        except (dcp.api.CheckpointException, OSError) as error:
            failures = [error, *(failure[0] for failure in getattr(error, "failures", {}).values())]
            for failure in failures:
                if isinstance(failure, OSError) and failure.errno is not None:
                    raise WriteError(failure.errno, failure.strerror, str(path)) from error
            raise
        if rank_of() == 0:
            sync_folder(self.folder)
            for other in self.folder.iterdir():
                if other != path:
                    shutil.rmtree(other, ignore_errors=True)


def load(path: Path) -> dict[str, Any]:
    """The state in the folder ``path``, on the CPU; what was a ``RowShard`` is a :class:`StoredRows`.

    Raises:
        DamagedFile: a file is not what was written, or is missing; the message names it.
        ValueError: it holds something else.
    """
    reader = _Reader(path)
    _verify(path / _DESCRIPTION)
    try:
        description = reader.read_metadata()
        files = sorted({info.relative_path for info in description.storage_data.values()})
        sizes = description.state_dict_metadata
        parts = {name: _empty(of) for name, of in sizes.items() if _part(name)}
        tensors = {name: _empty(of) for name, of in sizes.items() if not _part(name)}
    except Exception as error:  # a pickle can raise anything
        raise ValueError(f"{path / _DESCRIPTION} does not describe a checkpoint: {error}") from error
    for name in files:
        _verify(path / Path(name).name)
    _read(tensors, reader)
    plain = torch.load(io.BytesIO(tensors[_PLAIN].numpy().tobytes()), weights_only=True)
    split: dict[str, dict[int, Tensor]] = {}
    for name, part in parts.items():
        of, rank = name.split(".")
        split.setdefault(of, {})[int(rank)] = part
    stored = {of: StoredRows(path, of, dict(sorted(ranks.items()))) for of, ranks in split.items()}
    return _with_tensors(plain, {**tensors, **stored})


class StoredRows:
    """A tensor [N, ...] in a checkpoint, of which ranks wrote runs of rows: ``[first:last]`` reads some of them."""

    def __init__(self, path: Path, name: str, parts: Mapping[int, Tensor]) -> None:
        self.path, self.name = path, name
        self.like = next(iter(parts.values()))[:0]
        self.keys = [f"{name}.{rank}" for rank in parts]
        self.starts = list(itertools.accumulate((len(part) for part in parts.values()), initial=0))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.starts[-1], *self.like.shape[1:]))

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(self.starts[-1])
        wanted = self.like.new_empty(max(0, last - first), *self.like.shape[1:])
        for key, start, end in zip(self.keys, self.starts, self.starts[1:], strict=False):
            begin, stop = max(first, start), min(last, end)
            if begin < stop:
                part = self.like.new_empty(end - start, *self.like.shape[1:])
                _read({key: part}, _Reader(self.path))
                wanted[begin - first : stop - first] = part[begin - start : stop - start]
        return wanted


def _empty(description: Any) -> Tensor:
    return torch.empty(description.size, dtype=description.properties.dtype)


def _part(name: str) -> bool:
    """Whether it is the key of the rows of one rank."""
    return "." in name


def _read(tensors: dict[str, Tensor], reader: _Reader) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_NO_GROUP)
        dcp.load(tensors, storage_reader=reader, planner=_Planner(flatten_state_dict=False), no_dist=True)


def _without_tensors(value: Any, tensors: dict[str, Tensor], numbers: Iterator[int]) -> Any:
    """``value`` with the place in ``tensors`` for every tensor, which is put there, by a number that is the same on
    every rank.
    """
    if isinstance(value, Tensor):
        name = str(next(numbers))
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, RowShard):
        name = str(next(numbers))
        if len(value.rows):
            tensors[f"{name}.{rank_of()}"] = value.rows.detach()
        return {_ROWS: name}
    if isinstance(value, Mapping):
        return {key: _without_tensors(item, tensors, numbers) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_tensors(item, tensors, numbers) for item in value)
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        if set(value) in ({_TENSOR}, {_ROWS}):
            return tensors[next(iter(value.values()))]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_tensors(item, tensors) for item in value)
    return value


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return sha256_of(file, path.stat().st_size)


def _verify(path: Path) -> None:
    try:
        expected = path.with_name(path.name + _CHECKSUM).read_text().strip()
        if _digest(path) != expected:
            raise DamagedFile(path, "its SHA-256 is not that of what was written")
    except FileNotFoundError as error:
        raise DamagedFile(path, f"{Path(error.filename).name} is missing") from error


class _Writer(dcp.FileSystemWriter):
    """Writes the checksum of each file beside it."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        results = super().write_data(plan, planner)
        for name in {result.storage_data.relative_path for result in results.value()}:
            self._add_checksum(name)
        return results

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        sync_folder(Path(self.path))
        self._add_checksum(_DESCRIPTION)

    def _add_checksum(self, name: str) -> None:
        path = Path(self.path, name)
        write_atomically(path.with_name(name + _CHECKSUM), _digest(path) + "\n")


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise ValueError("it holds pickled values, which are not read")


class _Unpickler(pickle.Unpickler):
    """Makes what describes tensors and where they are, and nothing else."""

    NAMES: ClassVar[dict[str, tuple[str, ...]]] = {
        "torch.distributed.checkpoint.metadata": (
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
            *("StorageMeta", "_MEM_FORMAT_ENCODING"),
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch": ("Size",),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("PosixPath",),
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of one")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with open(Path(self.path, _DESCRIPTION), "rb") as file:
            metadata = _Unpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

# SPDX-License-Identifier: BSD-3-Clause
"""How files are written that outlive a command: whole or not at all, whatever ends the process or fills the disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.ssmkernels-[0-9a-f]{16}\.tmp")
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP}  # of folders, on some network file systems
_PREFIX = b"sha256:"
_COMMENT_BYTES = len(_PREFIX) + 64
_COMMENT_LENGTH = struct.Struct("<H")  # the last field of a zip archive that has no comment


class WriteError(OSError):
    """A file could not be written; what was there before is still there. ``filename`` says which."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}; what was there before is kept"


class DamagedFile(ValueError):
    """A file is not what was written: torn, or changed since."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} is damaged ({problem}); put a copy in its place, or delete it to have it made again")
        self.path, self.problem = path, problem


class _Target(io.FileIO):
    """The temporary file. It remembers why a write failed, as ``torch.save`` raises another error instead."""

    failure: OSError | None = None

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path`` when the block ends without an exception. A reader finds the old file or the
    new one, whole, now and after a crash. The folder is made if need be.

    Raises:
        WriteError: the disk is full, or the folder cannot be written. No temporary file is left.
    """
    path = Path(os.path.realpath(path))
    target = None
    # In the same folder, as os.replace is atomic only within a file system
    temporary = path.with_name(f".ssmkernels-{secrets.token_hex(8)}.tmp")
    try:
        make_folder(path.parent)
        target = _Target(temporary, "x+")
        with io.BufferedRandom(target) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        failure = target.failure if target is not None and target.failure is not None else error
        if isinstance(failure, OSError) and failure.errno is not None:
            raise WriteError(failure.errno, failure.strerror, str(path)) from error
        raise


def write_atomically(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` in UTF-8, by :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode())


def make_folder(folder: Path) -> None:
    """Makes ``folder`` with those above it where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # and is no folder
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def check_folder(folder: Path, option: str) -> None:
    """Makes ``folder``, writes a file there and removes both: before hours of work that would have to be kept there.

    Raises:
        ValueError: it cannot be written; the message names ``option``, which gave it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".ssmkernels-{secrets.token_hex(8)}.tmp"
    try:
        make_folder(folder)
        probe.touch()
        probe.unlink()
        for path in made:
            with contextlib.suppress(OSError):  # something else has put a file there meanwhile
                path.rmdir()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); give another folder with {option}") from None


def sync_folder(folder: Path) -> None:
    """Makes renames within ``folder`` last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def remove_temporary_files(folder: Path) -> None:
    """Removes what writers left in ``folder`` that were killed. None may be at work there."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def checksummed_archive(path: Path) -> Iterator[BinaryIO]:
    """:func:`atomic_file` for a zip archive, which ``torch.save`` and ``np.savez`` write; its SHA-256 becomes the
    comment of the archive, so that it stays one that anything else can read. See :func:`verify_checksum`.
    """
    with atomic_file(path) as file:
        yield file
        file.seek(-_COMMENT_LENGTH.size, os.SEEK_END)
        file.write(_COMMENT_LENGTH.pack(_COMMENT_BYTES))
        file.write(_PREFIX + sha256_of(file, file.seek(0, os.SEEK_END)).encode())


def verify_checksum(path: Path) -> None:
    """Raises an error unless the archive at ``path`` is as :func:`checksummed_archive` wrote it. In one that something
    else wrote, which has no SHA-256, the checksums of its members are verified.

    Raises:
        DamagedFile: it is not; the message names the file.
        OSError: it cannot be read.
    """
    if has_checksum(path):
        with open(path, "rb") as file:
            digest = sha256_of(file, path.stat().st_size - _COMMENT_BYTES)
            if file.read() != _PREFIX + digest.encode():
                raise DamagedFile(path, "its SHA-256 is not that of what was written")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # there is no end of what a torn archive makes zipfile raise
        raise DamagedFile(path, str(error) or type(error).__name__) from error
    if broken is not None:
        raise DamagedFile(path, f"the checksum of {broken} in it is wrong")
    if _last_bytes(path, _COMMENT_LENGTH.size) != _COMMENT_LENGTH.pack(0):  # nor has it a comment of its own
        raise DamagedFile(path, "its SHA-256 is cut off")


def has_checksum(path: Path) -> bool:
    """Whether the file ends as :func:`checksummed_archive` makes it end."""
    return _last_bytes(path, _COMMENT_BYTES).startswith(_PREFIX)


def _last_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - count))
        return file.read()


def is_whole(path: Path) -> bool:
    """Whether the archive at ``path`` is there, as :func:`checksummed_archive` wrote it: for files that can be made
    again. A damaged one is named on stderr.
    """
    try:
        verify_checksum(path)
    except FileNotFoundError:
        return False
    except DamagedFile as error:
        print(f"{path} is damaged ({error.problem}); it is made again", file=sys.stderr)
        return False
    return True


def set_aside(path: Path) -> Path:
    """Renames ``path`` to ``path``.damaged, which is returned."""
    aside = path.with_name(path.name + ".damaged")
    os.replace(path, aside)
    sync_folder(path.parent)
    return aside


def sha256_of(file: BinaryIO, count: int) -> str:
    """SHA-256 of the first ``count`` bytes, behind which the file then stands."""
    file.seek(0)
    digest = hashlib.sha256()
    while count > 0 and (block := file.read(min(count, 1 << 20))):
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()


@contextmanager
def naming_write_errors(path: Path) -> Iterator[None]:
    """Within it an error of the system becomes a :class:`WriteError` of ``path``."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from error


class LineFile:
    """A text file that grows by whole lines: one that does not fit on the disk leaves nothing of itself.

    Raises:
        WriteError: of every method, as :func:`atomic_file`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming_write_errors(self.path):
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115 -- closed by close()

    def write(self, line: str) -> None:
        """Appends ``line`` and a newline."""
        data = f"{line}\n".encode()
        with naming_write_errors(self.path):
            size = os.fstat(self.file.fileno()).st_size
            try:
                while data:
                    data = data[self.file.write(data) :]
            except OSError:
                self.file.truncate(size)
                raise

    def sync(self) -> None:
        """What was written so far survives a loss of power."""
        with naming_write_errors(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()

# SPDX-License-Identifier: BSD-3-Clause
"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssmkernels._files import WriteError, make_folder, remove_temporary_files

FILE = "lock"

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_held: dict[Path, int] = {}  # folders that this process has locked -> how often


class FolderInUse(ValueError):
    """Another process has locked the folder."""


@contextmanager
def folder_lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Within it no other process has this lock on ``folder``, which is made if need be, on this machine and, where the
    file system has locks, on others. What a killed writer left there is removed.

    The file ``lock`` in the folder names the process. It is the system's lock on that file that counts, which ends with
    the process however that ends: a file that a killed process left locks nothing, and neither do processes that were
    forked. Within one process it may be taken several times. On file systems without locks there is none.

    Args:
        wait: until no other process has it.

    Raises:
        FolderInUse: another process has it; the message names that one.
        WriteError: the folder cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    if folder in _held:
        _held[folder] += 1
        try:
            yield
        finally:
            _held[folder] -= 1
        return
    descriptor = _lock(folder, wait)
    _held[folder] = 1
    try:
        remove_temporary_files(folder)
        yield
    finally:
        del _held[folder]
        (folder / FILE).unlink(missing_ok=True)
        os.close(descriptor)


def _lock(folder: Path, wait: bool) -> int:
    """Takes the lock and returns the descriptor of its file, which holds it until it is closed."""
    path = folder / FILE
    try:
        make_folder(folder)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock_file(descriptor, path, wait)
                if _is_at(descriptor, path):  # its last owner may have removed it in between
                    with contextlib.suppress(OSError):  # of a full disk: then the owner has no name
                        os.ftruncate(descriptor, 0)
                        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
    except OSError as error:
        raise WriteError(error.errno, error.strerror, str(folder)) from error


def _lock_file(descriptor: int, path: Path, wait: bool) -> None:
    # Not flock, whose lock a forked process that loads data keeps for some seconds when its parent was killed
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise FolderInUse(
                f"{path.parent} is in use by {owner}; wait until that has ended, or take another folder"
            ) from error
        if error.errno not in _NO_LOCKS:
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at ``path``."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    opened = os.fstat(descriptor)
    return (opened.st_dev, opened.st_ino) == (there.st_dev, there.st_ino)

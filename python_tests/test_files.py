# SPDX-License-Identifier: BSD-3-Clause
"""Files are whole whatever happens, and there is one writer of them."""

from __future__ import annotations

import ast
import errno
import os
import pickle
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from ssmkernels._files import DamagedFile, LineFile, WriteError, atomic_file, checksummed_archive, verify_checksum
from ssmkernels._files import write_atomically as write
from ssmkernels._locks import FolderInUse, folder_lock

SAVES = {
    "torch.save": lambda file: torch.save({"step": 7, "weights": torch.arange(60.0)}, file),
    "np.savez": lambda file: np.savez(file, features=np.arange(90.0), labels=np.arange(3)),
}


@contextmanager
def largest_file(size):
    """Within it the system refuses to let a file grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_write_that_stops_at_any_byte_keeps_the_old_file(tmp_path, save):
    path = tmp_path / "file"
    with checksummed_archive(path) as file:
        save(file)
    before = path.read_bytes()
    for limit in range(len(before)):
        with largest_file(limit), pytest.raises(WriteError) as error, checksummed_archive(path) as file:
            save(file)
        assert str(error.value) == f"{path} cannot be written: File too large; what was there before is kept"
        assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == before


def test_an_error_of_the_disk_at_the_end_keeps_the_old_file(tmp_path, monkeypatch):
    write(tmp_path / "file", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"file cannot be written: No space left on device; what was there"):
        write(tmp_path / "file", "new")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_an_exception_of_the_writer_is_passed_on(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "file") as file:
        file.write(bytes(1 // 0))
    assert not os.listdir(tmp_path)


def test_file_and_folder_are_synchronised_around_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def record_rename(old, new):
        calls.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    write(tmp_path / "file", "text")
    assert calls == ["file", "rename", "folder"]


def test_writers_do_not_share_a_temporary_file(tmp_path):
    with atomic_file(tmp_path / "file") as first, atomic_file(tmp_path / "file") as second:
        first.write(b"first")
        second.write(b"second, longer")
        assert len(os.listdir(tmp_path)) == 2
    assert (tmp_path / "file").read_bytes() == b"first"


def test_folders_are_made_links_followed_and_permissions_usual(tmp_path):
    (tmp_path / "link").symlink_to("a/b/file")
    write(tmp_path / "link", "…")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a/b/file").read_text(encoding="utf-8") == "…"
    (tmp_path / "plain").touch()
    assert (tmp_path / "a/b/file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/below cannot be written: Not a directory"):
        write(tmp_path / "file" / "below", "")


def test_a_write_error_survives_pickling():
    error = pickle.loads(pickle.dumps(WriteError(errno.ENOSPC, "No space left on device", "/there")))
    assert type(error) is WriteError and str(error).startswith("/there cannot be written: No space left")


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_any_torn_or_flipped_byte_is_noticed(tmp_path, save):
    path = tmp_path / "file"
    with checksummed_archive(path) as file:
        save(file)
    verify_checksum(path)
    content = path.read_bytes()
    for position in range(len(content)):
        for damaged in (
            content[:position],
            content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :],
        ):
            path.write_bytes(damaged)
            with pytest.raises(DamagedFile, match=r"file is damaged \(.*\); put a copy in its place, or delete it"):
                verify_checksum(path)


def test_sealed_archives_are_read_by_their_own_libraries(tmp_path):
    with checksummed_archive(tmp_path / "a.pt") as file:
        SAVES["torch.save"](file)
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["weights"], torch.arange(60.0))
    assert torch.equal(torch.load(tmp_path / "a.pt", mmap=True)["weights"], torch.arange(60.0))
    with checksummed_archive(tmp_path / "a.npz") as file:
        SAVES["np.savez"](file)
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["features"], np.arange(90.0))


def test_archives_of_others_have_the_checksums_of_their_members(tmp_path):
    torch.save({"weights": torch.arange(60.0)}, tmp_path / "a.pt")
    verify_checksum(tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(torch.arange(60.0).numpy().tobytes()) + 100] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"the checksum of a/data/0 in it is wrong"):
        verify_checksum(tmp_path / "a.pt")


def test_a_line_that_does_not_fit_leaves_nothing_of_itself(tmp_path):
    file = LineFile(tmp_path / "log")
    file.write("first")
    for limit in range(6, 12):
        with largest_file(limit), pytest.raises(WriteError, match="log cannot be written: File too large"):
            file.write("second")
        assert (tmp_path / "log").read_text() == "first\n"
    file.write("third")
    file.close()
    assert (tmp_path / "log").read_text() == "first\nthird\n"


HOLD = """
import sys
from pathlib import Path
from ssmkernels._locks import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which has the lock on a folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_names_its_process_and_ends_with_it(tmp_path, holder):
    folder = tmp_path / "run"
    words = f"run is in use by process {holder.pid} on {os.uname().nodename}; wait until that has ended"
    with pytest.raises(FolderInUse, match=re.escape(words)), folder_lock(folder):
        pass
    (folder / ".ssmkernels-0123456789abcdef.tmp").touch()  # of a write that the kill stops
    holder.kill()
    holder.wait()
    assert (folder / "lock").exists()
    with folder_lock(folder), folder_lock(folder):
        assert os.listdir(folder) == ["lock"]
        assert f"process {os.getpid()} on" in (folder / "lock").read_text()
    assert not os.listdir(folder)


def test_a_lock_that_waits_is_had_when_the_other_process_ends(tmp_path, holder):
    ending = threading.Timer(0.3, holder.kill)
    ending.start()
    with folder_lock(tmp_path / "run", wait=True):
        assert holder.wait() == -signal.SIGKILL
    assert not os.listdir(tmp_path / "run")


def test_a_lock_on_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file cannot be written"), folder_lock(tmp_path / "file"):
        pass


# A call within "with atomic_file(...)" or "with checksummed_archive(...)" writes to the file that these give.
WRITERS = {"atomic_file", "checksummed_archive"}
METHODS = {"write_text", "write_bytes", "savefig", "tofile", "to_csv", "to_json", "to_parquet", "touch"}
FUNCTIONS = {
    "torch": {"save"},
    "np": {"save", "savez", "savez_compressed", "savetxt"},
    "json": {"dump"},
    "pickle": {"dump"},
    "yaml": {"dump", "safe_dump"},
    "joblib": {"dump"},
    "tempfile": {"mkstemp", "NamedTemporaryFile"},
    "os": {"rename", "renames", "replace", "link"},
    "shutil": {"copy", "copy2", "copyfile", "move"},
}
THE_WRITERS_THEMSELVES = ("ssmkernels/_files.py", "ssmkernels/_locks.py")
OF_OTHER_FILES = {
    ("ssmkernels/bench/measure.py", "write_text"),  # in /proc
    ("bench/pairs_over_ranks.py", "write_text"),  # likewise
    ("ssmkernels/trainers/sharded.py", "save"),  # in memory
    ("bench/margins.py", "save"),  # in a temporary folder
    ("bench/file_lists.py", "save"),  # likewise
    ("bench/file_lists.py", "open"),
    ("bench/gpu/runner.py", "open"),  # the output of a command, as it comes
    ("bench/gpu/build.py", "copy2"),  # the library
}


def name_of(function):
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def mode_of(call):
    """The mode of open(path, mode) or path.open(mode)."""
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    position = 0 if isinstance(call.func, ast.Attribute) and name_of(call.func.value) not in ("io", "os") else 1
    modes += call.args[position : position + 1]
    return "".join(mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str))


def writes(node, safe=False):
    """Names of calls that write or rename files by themselves."""
    if isinstance(node, ast.With):
        safe = safe or any(
            isinstance(item.context_expr, ast.Call) and name_of(item.context_expr.func) in WRITERS
            for item in node.items
        )
    if isinstance(node, ast.Call) and not safe:
        name, owner = name_of(node.func), name_of(getattr(node.func, "value", None))
        of_path = name in {"rename", "replace"} and len(node.args) == 1 and not node.keywords
        opened = name == "open" and set(mode_of(node)) & set("wax+")
        if name in METHODS or name in FUNCTIONS.get(owner, ()) or opened or (of_path and owner != "dataclasses"):
            yield node.lineno, name
    for child in ast.iter_child_nodes(node):
        yield from writes(child, safe)


def test_everything_is_written_by_the_one_writer(source_tree):
    wrong = []
    for folder in ("ssmkernels", "bench"):
        for path in sorted((source_tree / folder).rglob("*.py")):
            file = path.relative_to(source_tree).as_posix()
            calls = [] if file in THE_WRITERS_THEMSELVES else writes(ast.parse(path.read_text()))
            wrong += [f"{file}:{line}: {name}" for line, name in calls if (file, name) not in OF_OTHER_FILES]
    assert not wrong, "use ssmkernels._files:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('x')",
        "torch.save(state, path)",
        "np.savez(path, a=a)",
        "path.write_text(text)",
        "json.dump(record, file)",
        "os.replace(old, new)",
        "unfinished.replace(path)",
        "shutil.copy(old, new)",
        "figure.savefig(path)",
        "frame.to_csv(path)",
        "with open(path) as file: torch.save(state, file)",
    ],
)
def test_other_writers_are_seen(source):
    assert list(writes(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "open(path)",
        "open(path, 'rb')",
        "path.open()",
        "text.replace('a', 'b')",
        "replace(config, steps=3)",
        "with checksummed_archive(path) as file: torch.save(state, file)",
    ],
)
def test_what_writes_no_file_is_not(source):
    assert not list(writes(ast.parse(source)))

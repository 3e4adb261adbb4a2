# SPDX-License-Identifier: BSD-3-Clause
import os
import pickle
from pathlib import Path

import pytest
import torch

from ssmkernels._files import DamagedFile
from ssmkernels.trainers.checkpoint import check_same_config, load_checkpoint, save_checkpoint


def test_round_trip(tmp_path):
    state = {
        "weights": torch.randn(3),
        "step": 7,
        "history": [{"step": 7, "accuracy": 0.5}],
        "config": {"root": None, "flip": True},
    }
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    loaded = load_checkpoint(tmp_path / "checkpoint.pt")
    assert torch.equal(loaded.pop("weights"), state.pop("weights"))
    assert loaded == state
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_crash_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def torn(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"payload": Payload()}, "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a readable checkpoint"):
        load_checkpoint(Path("checkpoint.pt"))
    Path("checkpoint.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(DamagedFile, match=r"checkpoint\.pt is damaged"):
        load_checkpoint(Path("checkpoint.pt"))
    assert not Path("executed").exists()


def test_changed_settings_are_all_listed():
    saved = {"lr": 0.1, "data": {"name": "digits", "root": "a"}, "run": {"out": "x"}, "old": 1}
    elsewhere = {**saved, "data": {"name": "digits", "root": "b"}, "run": {"out": "y"}}
    check_same_config(saved, elsewhere, ignore=("run", "data.root"), path=Path("c"))
    with pytest.raises(ValueError, match="other settings") as error:
        check_same_config(
            saved,
            {"lr": 0.2, "data": {"name": "svhn", "root": "a"}, "run": {}, "new": 2},
            ignore=("run",),
            path=Path("c"),
        )
    assert str(error.value).splitlines()[1:] == [
        "  data.name: 'digits' in the checkpoint, 'svhn' now",
        "  lr: 0.1 in the checkpoint, 0.2 now",
        "  new: 'absent' in the checkpoint, 2 now",
        "  old: 1 in the checkpoint, 'absent' now",
    ]

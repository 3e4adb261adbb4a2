# SPDX-License-Identifier: BSD-3-Clause
import json

import pytest
import torch

from ssmkernels.trainers.progress import RunLog, keep_records_until


def make_log(folder, start=0, window=None):
    return RunLog(
        folder, steps=10, start=start, window=window or {}, images_per_step=4, scalars=dict, shown=("loss",), bar=False
    )


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_means_since_the_last_flush_and_the_last_evaluation(tmp_path):
    with make_log(tmp_path) as log:
        for loss in (1.0, 3.0):
            log.add({"loss": torch.tensor(loss)})
        log.flush(learning_rate=0.5)
        log.add({"loss": torch.tensor(8.0)})
        log.flush()
        assert log.evaluation({"accuracy": 0.9}) == {"loss": 4.0, "accuracy": 0.9}
    first, second, test = records(tmp_path)
    assert (first["step"], first["group"], first["loss"], first["learning_rate"]) == (2, "train", 2.0, 0.5)
    assert (second["step"], second["loss"]) == (3, 8.0)
    assert test == {"step": 3, "group": "test", "accuracy": 0.9}
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_window_of_an_evaluation_survives_a_resume(tmp_path):
    with make_log(None) as log:
        log.add({"loss": torch.tensor(1.0)})
        log.flush()
    with make_log(None, start=1, window=log.window) as log:
        log.add({"loss": torch.tensor(2.0)})
        log.flush()
        assert log.evaluation({})["loss"] == 1.5


def test_resuming_forgets_the_steps_that_will_be_done_again(tmp_path):
    with make_log(tmp_path) as log:
        for _ in range(4):
            log.add({"loss": torch.tensor(1.0)})
            log.flush()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # torn by a crash
    make_log(tmp_path, start=2).close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_damaged_lines_of_a_log_are_named_and_kept(tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1}\n', b'{"step": 2, \xff\n', b"7\n", b'{"step": "4"}\n', b'{"step": 5}\n', b'{"step": 9}\n']
    log.write_bytes(b"".join(lines))
    make_log(tmp_path, start=5).close()
    assert capsys.readouterr().err.startswith(f"{log}, lines 2, 3, 4: no record; the log goes on without")
    assert records(tmp_path) == [{"step": 1}, {"step": 5}]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"".join(lines)
    make_log(tmp_path, start=5).close()
    assert not capsys.readouterr().err


def test_a_log_torn_at_any_byte_is_gone_on_with(tmp_path):
    whole = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 4))
    for size in range(len(whole) + 1):
        (tmp_path / "metrics.jsonl").write_text(whole[:size])
        keep_records_until(tmp_path / "metrics.jsonl", 3)
        assert (tmp_path / "metrics.jsonl").read_text() == whole[: whole[:size].rfind("\n") + 1]
    assert not (tmp_path / "metrics.jsonl.damaged").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_step(bad):
    with make_log(None, start=4) as log:
        for loss in (1.0, 1.0, bad, 1.0):
            log.add({"loss": torch.tensor(loss), "loss_labeled": torch.tensor(0.5)})
        with pytest.raises(FloatingPointError, match=f"the loss of step 7 is {bad} \\(loss_labeled 0.5\\)"):
            log.flush()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with make_log(None) as log:
        log.add({"loss": torch.tensor(1.0)})
        log.flush()
    assert not list(tmp_path.iterdir())

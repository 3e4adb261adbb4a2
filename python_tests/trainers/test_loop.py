# SPDX-License-Identifier: BSD-3-Clause
import errno
import os
import signal

import pytest
import torch

from ssmkernels import data
from ssmkernels._files import WriteError
from ssmkernels._locks import FolderInUse
from ssmkernels.trainers import loop
from ssmkernels.trainers.checkpoint import load_checkpoint, save_checkpoint
from ssmkernels.trainers.loop import RunConfig, RunResult, StopSignals, fit, make_fabric


class Countdown:
    """A trainer of one number."""

    learning_rate, images_per_step, shown = 0.1, 1, ("loss",)

    def __init__(self, signal_at=None):
        self.value = torch.tensor(10.0)
        self.signal_at = signal_at

    def batches(self, start_step):
        return (torch.tensor(float(step)) for step in range(start_step, 3000))

    def step(self, batch, step):
        assert batch == step
        if step == self.signal_at:
            os.kill(os.getpid(), signal.SIGINT)
        self.value = self.value * 0.9 + batch / 7
        return {"loss": self.value}

    def scalars(self, means):
        return means

    seen = data.SeenImages(mean=(0.5,), std=(0.5,), image_size=8, resize=8, channel_order="L")

    def labels_text(self):
        return None

    def keep_inputs(self, folder):
        pass

    def evaluate(self):
        return {"value": float(self.value)}

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def run(trainer, out, steps=10, resume=False, config=None, eval_every=4, **options):
    settings = RunConfig(
        out=out and str(out), log_every=2, eval_every=eval_every, checkpoint_every=5, accelerator="cpu", bar=False
    )
    fabric = make_fabric(RunConfig(accelerator="cpu"))
    return fit(
        trainer, fabric=fabric, steps=steps, run=settings, config=config or {"lr": 1.0}, resume=resume, **options
    )


def test_evaluates_on_time_and_at_the_end(tmp_path):
    result = run(Countdown(), tmp_path / "run")
    assert result.finished
    assert result.step == 10
    assert [record["step"] for record in result.history] == [4, 8, 10]
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 10


@pytest.mark.parametrize("at", [0, 4, 6])
def test_interrupt_finishes_the_step_saves_and_resumes(tmp_path, at):
    whole = run(Countdown(), None)
    stopped = run(Countdown(signal_at=at), tmp_path)
    assert (stopped.finished, stopped.step) == (False, at + 1)
    resumed = run(Countdown(), tmp_path, resume=True)
    assert resumed.finished
    assert resumed.history == whole.history


def test_evaluates_at_the_end_of_every_epoch(tmp_path):
    ends = run(Countdown(), tmp_path / "epochs", steps=9, eval_every=None, epoch_ends=range(3, 10, 3)).history
    assert [record["step"] for record in ends] == [3, 6, 9]
    ends = run(Countdown(), tmp_path / "default", steps=2050, eval_every=None).history
    assert [record["step"] for record in ends] == [1024, 2048, 2050]


def test_the_model_of_the_best_evaluation_is_kept(tmp_path):
    class Hill(Countdown):
        """Best after the second of four evaluations, and again, no better, after the third."""

        def evaluate(self):
            return {"height": {2: 0.1, 4: 0.7, 6: 0.7, 8: 0.3}[self.steps]}

        def step(self, batch, step):
            self.steps = step + 1
            return super().step(batch, step)

        def state_dict(self):
            return {"model": {"steps": self.steps}, **super().state_dict()}

    result = run(Hill(), tmp_path, steps=8, eval_every=2, best="height")
    best = load_checkpoint(tmp_path / "best.pt")
    assert best["model"] == {"steps": 4}
    assert best["evaluation"] == result.best("height") == result.history[1]
    assert result.steps == 8


def test_resuming_a_finished_run_does_nothing(tmp_path):
    first = run(Countdown(), tmp_path)
    assert run(Countdown(signal_at=0), tmp_path, resume=True) == first


def test_resume_without_a_checkpoint_starts(tmp_path):
    assert run(Countdown(), tmp_path, resume=True).finished


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(Countdown(), tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt exists; go on from it with --resume, or give another folder"):
        run(Countdown(), tmp_path)


def test_other_settings_are_refused(tmp_path):
    run(Countdown(), tmp_path)
    with pytest.raises(ValueError, match=r"lr: 1\.0 in the checkpoint, 2\.0 now"):
        run(Countdown(), tmp_path, resume=True, config={"lr": 2.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer": {}}, "does not fit what is trained: 'value' is missing"),
        ({"trainer": None}, "does not fit what is trained: 'NoneType' object"),
        ({"precision": None, "step": 11}, "was made after step 11; it should be of a run of at most 10 steps"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, change, message):
    run(Countdown(), tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    save_checkpoint(tmp_path / "checkpoint.pt", {**state, **change})
    with pytest.raises(ValueError, match=f"checkpoint.pt {message}") as error:
        run(Countdown(), tmp_path, resume=True)
    assert "\n" not in str(error.value)


def test_what_is_no_checkpoint_of_a_run_is_refused(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", {"model": {}, "config": {}})
    with pytest.raises(ValueError, match="it lacks history, precision, step, trainer, window"):
        run(Countdown(), tmp_path, resume=True)
    torch.save([1], tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="it holds a list; it should be a dict"):
        run(Countdown(), tmp_path, resume=True)


def test_a_module_of_another_shape_is_named_in_one_line(tmp_path):
    class Layer(Countdown):
        def __init__(self, width):
            super().__init__()
            self.layer = torch.nn.Linear(3, width)

        def state_dict(self):
            return self.layer.state_dict()

        def load_state_dict(self, state):
            self.layer.load_state_dict(state)

    run(Layer(2), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit what is trained: .* size mismatch for weight") as error:
        run(Layer(4), tmp_path, resume=True)
    assert "\n" not in str(error.value)


def test_a_folder_in_use_or_unusable_is_named(tmp_path, monkeypatch):
    def in_use(folder):
        raise FolderInUse(f"{folder} is in use by process 7 on here")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "folder_lock", in_use)
        with pytest.raises(FolderInUse, match="in use by process 7"):
            run(Countdown(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"file cannot be written \(Not a directory\); give another folder with --run.out"
    ):
        run(Countdown(), tmp_path / "file")
    assert run(Countdown(), tmp_path / "run").finished
    assert not (tmp_path / "run" / "lock").exists()


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    def full(path, state):
        if state["step"] > 5:
            raise WriteError(errno.ENOSPC, "No space left on device", str(path))
        save_checkpoint(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", full)
        with pytest.raises(WriteError, match=r"checkpoint\.pt cannot be written: No space"):
            run(Countdown(), tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5
    assert run(Countdown(), tmp_path, resume=True).history == run(Countdown(), None).history


def test_no_checkpoint_of_a_broken_state(tmp_path):
    trainer = Countdown()
    trainer.value = torch.tensor(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        run(trainer, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_second_interrupt_is_immediate_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_median_of_the_last_evaluations():
    result = RunResult(True, 30, [{"step": step, "a": float(step)} for step in range(30)])
    assert result.median("a") == 19.5
    assert result.median("a", last=3) == 28


def test_bad_settings():
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        make_fabric(precision="fp8")
    with pytest.raises(ValueError, match=r"run\.log_every is 0"):
        RunConfig(log_every=0)
    with pytest.raises(ValueError, match=r"run\.eval_every is -1"):
        RunConfig(eval_every=-1)

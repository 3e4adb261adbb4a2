# SPDX-License-Identifier: BSD-3-Clause
import pytest
import torch

from ssmkernels import data
from ssmkernels.trainers import DataConfig, RunConfig, SimMatchConfig


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small are slower on more, and far slower where others use the machine. Of a module, because runs
    of its fixtures have to have the bits of those of its tests.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")  # of processes that a test starts
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits():
    return data.load_dataset("digits")


@pytest.fixture
def make_run():
    """The settings of a run that takes seconds: make_run(out=...)."""

    def make(**settings):
        small = {"log_every": 2, "eval_every": 4, "checkpoint_every": 100, "accelerator": "cpu", "bar": False}
        return RunConfig(**{**small, **settings})

    return make


@pytest.fixture
def make_config(make_run):
    """A configuration that takes seconds: make_config(steps=4, run={"out": ...}, data={...})."""

    def make(**settings):
        run = make_run(**settings.pop("run", {}))
        images = {"name": "digits", "labels": 20, **settings.pop("data", {})}
        small = {
            "model": "wrn-10-1",
            "batch_size": 8,
            "mu": 2,
            "steps": 8,
            "first_epoch_steps": 2,
            "projection_dim": 16,
        }
        return SimMatchConfig(data=DataConfig(**images), run=run, **{**small, **settings})

    return make


@pytest.fixture
def two_ranks(ranks):
    """A function: two_ranks(script, folder, *arguments) runs a script in two Gloo ranks, with the folder and the
    arguments as sys.argv[1:]; it gives what each left in ``folder``/rank{r}.pt.
    """

    def run(script, folder, *arguments):
        path = folder / "script.py"
        path.write_text(script)
        statuses, output = ranks(2, path, folder, *arguments)
        assert statuses == [0, 0], output
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    return run

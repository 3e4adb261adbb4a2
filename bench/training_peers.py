# SPDX-License-Identifier: BSD-3-Clause
"""Images a second of whole training steps beside the public loops, on the same network, batch and images of CIFAR-10's
size: FixMatch by FixMatch-pytorch (github.com/kekmodel/FixMatch-pytorch), SimMatch by USB
(github.com/microsoft/Semi-supervised-learning). Give the folders of their sources; either may be left out.

    python bench/training_peers.py --fixmatch DIR --usb DIR [--model wrn-28-2] [--batch-size 16] [--out FILE.md]

Their loops, views, averages and losses are theirs, the network is ours. Noise stands for the images. Loading is in the
process itself, so that a step is all of its work. Figures are of processor time, which other programs disturb less,
medians over rounds in which the loops take turns.

Their code is for CUDA and for older versions: ``Tensor.cuda`` does nothing here, iterators get the ``next`` that
FixMatch-pytorch calls, and packages that USB imports and its SimMatch does not use are empty where they are not
installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset

from ssmkernels import info, models
from ssmkernels._files import write_atomically
from ssmkernels._text import markdown_table
from ssmkernels.bench import views
from ssmkernels.trainers import DataConfig, RunConfig, SimMatchConfig
from ssmkernels.trainers.loop import make_fabric
from ssmkernels.trainers.simmatch import SimMatch

MU, LABELS = 7, 40
UNUSED = ("aim", "progress", "ruamel", "skimage", "timm", "torchaudio", "transformers", "wandb")
OLD = "timm.models.layers.helpers"  # of timm before 1.0
FIXMATCH = {"alpha": 1.0, "lambda_in": 0.0, "alignment_queue": 0, "hard_pseudo_labels": True}
Steps = Callable[[int], list[float]]
"""Runs a number of steps; seconds of each."""


class Stop(BaseException):
    """Ends a loop from within."""


class Clock:
    """Called where a step begins: seconds between the calls, after the first two."""

    def __init__(self, steps: int) -> None:
        self.steps, self.times = steps, list[float]()

    def __call__(self) -> None:
        self.times.append(time.process_time())

    @property
    def done(self) -> bool:
        return len(self.times) == self.steps + 2

    def seconds(self) -> list[float]:
        return [end - begin for begin, end in zip(self.times[1:], self.times[2:], strict=False)]


class InMemory(Dataset[Any]):
    """What torchvision.datasets.CIFAR10 is to them, without files."""

    def __init__(self, root: str, train: bool = True, transform: Any = None, **_: Any) -> None:
        rng = np.random.default_rng(0)
        self.data, self.targets = rng.integers(0, 256, (5000, 32, 32, 3), dtype=np.uint8), list(np.arange(5000) % 10)
        self.transform, self.target_transform = transform, None

    def __len__(self) -> int:
        return len(self.data)


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages of some names, any attribute of which is an empty class."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if any(name == given or name.startswith(f"{given}.") for given in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module: Any = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: type(name, (nn.Module,), {})
        return module

    def exec_module(self, module: Any) -> None:
        module.__path__ = []


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    return models.build_model(name, 10)


class Logits(nn.Module):
    """Our network as FixMatch-pytorch calls one."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)[0]
        return logits


class Backbone(nn.Module):
    """Our network as USB calls one."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.backbone, self.classifier = inner.backbone, inner.classifier
        self.num_features = inner.classifier.in_features

    def forward(self, x: Tensor, only_fc: bool = False, only_feat: bool = False) -> Any:
        if only_fc:
            return self.classifier(x)
        features = self.backbone(x)
        return features if only_feat else self.classifier(features)

    def no_weight_decay(self) -> list[str]:
        return []


def ours(model: str, rows: int, **settings: Any) -> Steps:
    run = RunConfig(accelerator="cpu", bar=False)
    chosen = DataConfig(labels=LABELS)
    config = SimMatchConfig(data=chosen, model=model, batch_size=rows, first_epoch_steps=0, run=run, **settings)
    trainer = SimMatch(config, views.small_images(5000), make_fabric(run))

    def steps(count: int) -> list[float]:
        clock = Clock(count)
        clock()
        for number, batch in enumerate(trainer.batches(0)):
            clock()
            if clock.done:
                break
            trainer.step(batch, number)
        return clock.seconds()

    return steps


def fixmatch_pytorch(folder: Path, model: str, rows: int) -> Steps:
    """Its ``train``, from the data sets to the average."""
    sys.path.insert(0, str(folder))
    with mock.patch.object(torchvision.datasets, "CIFAR10", InMemory):
        theirs, cifar = importlib.import_module("train"), importlib.import_module("dataset.cifar")
        settings: dict[str, Any] = {"num_labeled": LABELS, "num_classes": 10, "expand_labels": True, "batch_size": rows}
        settings |= {"eval_step": 1024, "mu": MU, "T": 1.0, "threshold": 0.95, "lambda_u": 1.0, "amp": False}
        settings |= {"world_size": 1, "start_epoch": 0, "epochs": 1, "local_rank": -1, "no_progress": True}
        settings |= {"use_ema": True, "device": torch.device("cpu")}
        args = argparse.Namespace(**settings)
        labeled, unlabeled, _ = cifar.get_cifar10(args, "none")
    average = importlib.import_module("models.ema")
    loaders = [
        torch.utils.data.DataLoader(images, batch_size=count, shuffle=True, drop_last=True)
        for images, count in ((labeled, rows), (unlabeled, MU * rows))
    ]
    learns = Logits(network(model))
    optimizer = torch.optim.SGD(learns.parameters(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = theirs.get_cosine_schedule_with_warmup(optimizer, 0, 2**20)
    ema = average.ModelEMA(args, learns, 0.999)

    def steps(count: int) -> list[float]:
        clock = Clock(count)
        iterables = [_WithNext(loaders[0], clock), _WithNext(loaders[1], None)]
        with contextlib.suppress(Stop):
            theirs.train(args, *iterables, None, learns, optimizer, ema, scheduler)
        return clock.seconds()

    return steps


class _WithNext:
    """A loader that goes on for ever, whose iterator has ``next``; the clock is called at each."""

    def __init__(self, loader: Any, clock: Clock | None) -> None:
        self.loader, self.clock = loader, clock

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self) -> Any:
        if self.clock is not None:
            if self.clock.done:
                raise Stop
            self.clock()
        batches = vars(self).setdefault("batches", iter(self.loader))
        try:
            return next(batches)
        except StopIteration:
            self.batches = iter(self.loader)
            return next(self.batches)


def usb(folder: Path, model: str, rows: int) -> Steps:
    """Its ``SimMatch.train``, with the hooks that learn."""
    sys.path.insert(0, str(folder))
    missing = [name for name in UNUSED if importlib.util.find_spec(name) is None]
    print(f"USB: {', '.join(missing) or 'no packages'} are not installed, and empty")
    sys.meta_path.append(Empty([*missing, OLD]))
    with mock.patch.object(torchvision.datasets, "CIFAR10", InMemory):
        base = importlib.import_module("semilearn.core.algorithmbase")
        hooks = importlib.import_module("semilearn.core.hooks")
        theirs = importlib.import_module("semilearn.algorithms.simmatch.simmatch")

        def needed_hooks(algorithm: Any) -> None:
            algorithm.register_hook(hooks.ParamUpdateHook(), None, "HIGHEST")
            algorithm.register_hook(hooks.EMAHook(), None, "HIGH")

        base.AlgorithmBase.set_hooks = needed_hooks
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
        settings: dict[str, Any] = {
            "algorithm": "simmatch",
            "dataset": "cifar10",
            "num_labels": LABELS,
            "num_classes": 10,
        }
        settings |= {"ulb_num_labels": None, "lb_imb_ratio": 1, "ulb_imb_ratio": 1, "include_lb_to_ulb": True}
        settings |= {"data_dir": tempfile.mkdtemp(), "img_size": 32, "crop_ratio": 0.875, "seed": 0}
        settings |= {"batch_size": rows, "uratio": MU, "eval_batch_size": 256, "num_workers": 0}
        settings |= {"train_sampler": "RandomSampler", "epoch": 1, "num_train_iter": 2**14, "num_eval_iter": 2**14}
        settings |= {"num_log_iter": 2**14, "num_warmup_iter": 0, "ema_m": 0.999, "ulb_loss_ratio": 1.0}
        settings |= {"use_cat": True, "amp": False, "clip_grad": 0, "optim": "SGD", "lr": 0.03, "momentum": 0.9}
        settings |= {"weight_decay": 5e-4, "layer_decay": 1.0, "save_name": "", "save_dir": "", "resume": False}
        settings |= {"gpu": None, "rank": 0, "distributed": False, "world_size": 1, "use_pretrain": False}
        settings |= {"pretrain_path": "", "T": 0.1, "p_cutoff": 0.95, "proj_size": 128, "K": LABELS, "da_len": 32}
        settings |= {"in_loss_ratio": 1.0, "smoothing_alpha": 0.9, "use_epass": False, "hard_label": False}
        settings |= {"use_wandb": False, "use_aim": False, "net": "wrn_28_2", "multiprocessing_distributed": False}
        with contextlib.redirect_stdout(io.StringIO()):
            algorithm = theirs.SimMatch(argparse.Namespace(**settings), lambda **_: Backbone(network(model)))
    step = algorithm.train_step

    def steps(count: int) -> list[float]:
        clock = Clock(count)
        clock()

        def timed_step(idx_lb: Any, x_lb: Any, y_lb: Any, x_ulb_w: Any, x_ulb_s: Any) -> Any:
            clock()
            if clock.done:
                raise Stop
            algorithm.epoch = 1  # the first one has no instance matching
            return step(idx_lb, x_lb, y_lb, x_ulb_w, x_ulb_s)

        algorithm.train_step = timed_step
        with contextlib.suppress(Stop):
            algorithm.train()
        return clock.seconds()

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixmatch", type=Path, metavar="DIR", help="the source of FixMatch-pytorch")
    parser.add_argument("--usb", type=Path, metavar="DIR", help="the source of USB")
    parser.add_argument("--model", default="wrn-28-2")
    parser.add_argument("--batch-size", type=int, default=16, help="labelled images of a step; of others 7 times two")
    parser.add_argument("--steps", type=int, default=3, help="of each loop in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    loops: dict[str, Steps] = {}
    if args.fixmatch:
        loops["FixMatch, ours"] = ours(args.model, args.batch_size, **FIXMATCH)
        loops["FixMatch-pytorch"] = fixmatch_pytorch(args.fixmatch, args.model, args.batch_size)
    if args.usb:
        loops["SimMatch, ours"] = ours(args.model, args.batch_size)
        loops["SimMatch, USB"] = usb(args.usb, args.model, args.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(args.rounds):
        for name, steps in loops.items():
            seconds[name] += steps(args.steps)
            print(f"{name}: {', '.join(f'{value:.3f}' for value in seconds[name][-args.steps :])} s", flush=True)
    images = (1 + 2 * MU) * args.batch_size
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        own = statistics.median(seconds[f"{name.split('-')[0].split(',')[0]}, ours"])
        rows.append([name, f"{1e3 * median:.0f}", f"{images / median:.0f}", f"{median / own:.2f}"])
    titles = ["loop", "ms of processor time a step", "views a second of it", "time, to ours"]
    command = f"python bench/training_peers.py --model {args.model} --batch-size {args.batch_size}"
    text = (
        f"{torch.get_num_threads()} thread(s) of an {info.collect()['cpu']['model']}, torch {torch.__version__};"
        f" `{command}`: {images} views a step\n\n{markdown_table(titles, rows)}\n"
    )
    print(text)
    if args.out:
        write_atomically(args.out, text)


if __name__ == "__main__":
    main()

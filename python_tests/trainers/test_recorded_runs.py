# SPDX-License-Identifier: BSD-3-Clause
"""Short runs of every trainer against records that were made before the trainers were last restructured.

What no processor changes is compared bit by bit: the batches (indices, views, labels), the names in checkpoints and
metrics, the number of steps; learning rates to a rounding of the cosine. Losses are compared to float32: the first is
one forward pass from the seed's weights, the second follows one optimiser step.

    python python_tests/trainers/test_recorded_runs.py    # writes the records anew
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ssmkernels import data
from ssmkernels.trainers import (
    MLSN,
    CollectionConfig,
    DataConfig,
    MixedLP,
    MixedLPConfig,
    MLSNConfig,
    RunConfig,
    SimMatch,
    SimMatchConfig,
    Slade,
    SladeConfig,
    SladeDataConfig,
    SwAV,
    SwAVConfig,
    SwAVDataConfig,
)
from ssmkernels.trainers.linear_evaluation import linear_evaluation
from ssmkernels.trainers.loop import make_fabric

RECORDS = Path(__file__).with_name("recorded_runs.json")
RUN = {"accelerator": "cpu", "bar": False}
DIGITS = {"labels": 20, "augment": "pil"}


def simmatch(images=DIGITS, **settings):
    small = {"model": "wrn-10-1", "batch_size": 8, "mu": 2, "steps": 3, "first_epoch_steps": 1, "projection_dim": 16}
    config = SimMatchConfig(data=DataConfig(**images), run=RunConfig(**RUN), **{**small, **settings})
    return SimMatch(config, data.load_dataset("digits"), make_fabric(RunConfig(accelerator="cpu")))


def mlsn(images=DIGITS, **settings):
    small = {"model": "wrn-10-1", "batch_size": 8, "pairs": 32, "hidden_features": 12, "steps": 3}
    config = MLSNConfig(data=DataConfig(**images), run=RunConfig(**RUN), **{**small, **settings})
    return MLSN(config, data.load_dataset("digits"), make_fabric(RunConfig(accelerator="cpu")))


def mixed_lp():
    config = MixedLPConfig(
        data=CollectionConfig(images_per_class=12, augment="pil"),
        model="convnet-small",
        embedding_dim=8,
        k=10,
        batch_size=16,
        labeled_epochs=1,
        epochs=1,
        decay_every=1,
        learn_bn_affine=False,
        warm_up_images="labeled",
        run=RunConfig(**RUN),
    )
    return MixedLP(config, data.load_collection("digits"), make_fabric(RunConfig(accelerator="cpu")))


def slade():
    config = SladeConfig(
        data=SladeDataConfig(test_fraction=0.3, folds=3, fold=1, labeled_fraction=0.6, augment="pil"),
        model="convnet-small",
        embedding_dim=8,
        k=6,
        batch_size=16,
        optimizer="adamw",
        teacher_steps=2,
        warm_up_steps=1,
        student_steps=2,
        patience=None,
        run=RunConfig(**RUN),
    )
    return Slade(config, data.load_collection("digits"), make_fabric(RunConfig(accelerator="cpu")))


def swav():
    config = SwAVConfig(
        data=SwAVDataConfig(augment="pil"),
        model="convnet-small",
        hidden_dim=16,
        embedding_dim=8,
        num_prototypes=12,
        batch_size=30,
        epochs=1,
        small_crops=1,
        small_size=8,
        queue_length=60,
        queue_from_epoch=0,
        run=RunConfig(**RUN),
    )
    digits = data.first_images(data.load_collection("digits"), 9)
    return SwAV(config, digits, digits, make_fabric(RunConfig(accelerator="cpu")))


TRAINERS = {
    "simmatch": simmatch,
    "simmatch-teacher": lambda: simmatch(memory="teacher", ema_buffers="own", schedule="half-cosine", warm_up_steps=2),
    "simmatch-batched": lambda: simmatch({"labels": 20}),
    "mlsn": mlsn,
    "mlsn-batched": lambda: mlsn({"labels": 20}),
    "mlsn-sgd": lambda: mlsn(optimizer="sgd", schedule="cosine-7/16"),
    "mixed-lp": mixed_lp,
    "slade": slade,
    "swav": swav,
}


def tensors_of(batch):
    """The tensors of a batch, of its parts where it has parts; those drawn by k-means, which rounds, are left out."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    parts = [getattr(batch, name) for name in batch._fields if name != "pseudo_labeled"]
    return [tensor for part in parts for tensor in tensors_of(part)]


def digest(batch):
    bits = hashlib.sha256()
    for tensor in tensors_of(batch):
        bits.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return bits.hexdigest()


def names_of(state, prefix=""):
    """The names in a state, in order; a parameter's number stands for its name in an optimiser."""
    if not isinstance(state, dict):
        return [prefix]
    return [name for key, value in state.items() for name in names_of(value, f"{prefix}/{key}")]


def trace(trainer):
    """What a run of a few steps shows of itself."""
    batches, losses, rates, metrics = [], [], [], []
    for step, batch in enumerate(trainer.batches(0)):
        batches.append(digest(batch))
        metrics.append(trainer.step(batch, step))
        losses.append(float(metrics[-1]["loss"]))
        rates.append(trainer.learning_rate)
    means = {name: float(value) for name, value in metrics[-1].items()}
    return {
        "batches": batches,
        "losses": losses[:2],
        "learning rates": rates,
        "metrics": [sorted(names) for names in metrics],
        "scalars": sorted(trainer.scalars(means)),
        "figures": sorted(trainer.evaluate()),
        "state": hashlib.sha256("\n".join(names_of(trainer.state_dict())).encode()).hexdigest(),
        "parts": list(trainer.state_dict()),
        "images per step": trainer.images_per_step,
        "shown": list(trainer.shown),
    }


def linear():
    """A linear classifier on the pixels of digits."""
    digits = data.load_dataset("digits")
    parts = digits.train, digits.test
    pixels = [np.stack([np.asarray(part.image(i)) for i in range(400)]) for part in parts]
    features = [torch.from_numpy(images).flatten(1).float() / 255 for images in pixels]
    labels = [torch.from_numpy(part.labels[:400]) for part in parts]
    train, test = (features[0][:300], labels[0][:300]), (features[1], labels[1])
    return linear_evaluation(train, (features[0][300:], labels[0][300:]), test, penalties=(1.0, 1e-2, 1e-3))._asdict()


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_is_what_it_was(name):
    now, before = trace(TRAINERS[name]()), json.loads(RECORDS.read_text())[name]
    assert now.pop("learning rates") == pytest.approx(before.pop("learning rates"), rel=1e-14, abs=0)
    # The longest sums have fewer than 2^13 terms in a layer, and there are fewer than 2^4 layers: 2^17 roundings of
    # 2^-24 in the worst order.
    assert now.pop("losses") == pytest.approx(before.pop("losses"), rel=2.0**-7)
    assert now == before


def test_linear_evaluation_is_what_it_was():
    now, before = linear(), json.loads(RECORDS.read_text())["linear"]
    assert now["penalty"] == before["penalty"]
    # The fit ends where its gradient is below 1e-7; an image whose two best logits are that close may change sides.
    assert now["accuracy"] == pytest.approx(before["accuracy"], abs=1.5 / 400)


if __name__ == "__main__":
    torch.set_num_threads(1)
    records = {**{name: trace(make()) for name, make in TRAINERS.items()}, "linear": linear()}
    RECORDS.write_text(json.dumps(records, indent=1) + "\n")

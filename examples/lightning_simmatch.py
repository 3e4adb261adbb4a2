# SPDX-License-Identifier: BSD-3-Clause
"""SimMatch as a Lightning module; ``ssmkernels.lightning.MemoryAndTeacher`` keeps the memory and the EMA teacher.

Trains a small network on scikit-learn's digits with a few labels of each class, and compares it with the same network
without the unlabelled images. Run: ``python examples/lightning_simmatch.py`` (needs Lightning and scikit-learn).
"""

import argparse
import logging
import warnings

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from ssmkernels.lightning import MemoryAndTeacher
from ssmkernels.nn import LabeledMemory

CLASSES, DIM = 10, 32


class SimMatch(lightning.LightningModule):
    """One step: labelled images and their slots in the memory, and unlabelled images, of which two views are made."""

    def __init__(self, state: MemoryAndTeacher, unlabelled_weight: float) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, DIM))
        self.classifier = torch.nn.Linear(DIM, CLASSES)
        self.state = state  # no torch module, so it is saved and moved by itself
        self.unlabelled_weight = unlabelled_weight

    def training_step(self, batch, batch_idx):
        images, labels, slots, unlabelled = batch
        hidden = self.encoder(images)
        loss = F.cross_entropy(self.classifier(hidden), labels)
        self.state.remember(slots, F.normalize(hidden), labels)
        if self.unlabelled_weight == 0 or self.current_epoch == 0:  # the memory is empty in the first
            return loss
        with torch.no_grad():
            weak = self.state.teacher(unlabelled + 0.05 * torch.randn_like(unlabelled))
            probs = self.classifier(weak).softmax(dim=1)
        strong = self.encoder(F.dropout(unlabelled, 0.3) + 0.2 * torch.randn_like(unlabelled))
        matching = self.state.memory.instance_matching(F.normalize(weak), F.normalize(strong), probs)
        sure = (matching.pseudo_probs.amax(dim=1) > 0.9).float()
        classes = F.cross_entropy(self.classifier(strong), matching.pseudo_probs, reduction="none")
        return loss + self.unlabelled_weight * ((sure * classes).mean() + matching.loss.mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def batches(images, labels, labelled, steps):
    """The labelled images with their slots, each step beside other unlabelled ones."""
    count = len(labelled)
    unlabelled = images[torch.randint(0, len(images), (steps, 7 * count))]
    fixed = [
        tensor.expand(steps, *tensor.shape) for tensor in (images[labelled], labels[labelled], torch.arange(count))
    ]
    return DataLoader(TensorDataset(*fixed, unlabelled), batch_size=None)


def train(images, labels, labelled, unlabelled_weight, epochs, seed):
    lightning.seed_everything(seed, verbose=False)
    state = MemoryAndTeacher(LabeledMemory(len(labelled), DIM, CLASSES), student="encoder", decay=0.99, warm_up=True)
    module = SimMatch(state, unlabelled_weight)
    trainer = lightning.Trainer(
        accelerator="auto",
        max_epochs=epochs,
        callbacks=[state],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches(images, labels, labelled, steps=20))
    predicted = module.classifier.cpu()(state.teacher.cpu()(images)).argmax(dim=1)
    return 100 * float((predicted == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=4, help="of each class (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="of 20 steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, views and labels (default: %(default)s)")
    args = parser.parse_args()

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # about workers
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(labels), generator=generator)
    labelled = torch.cat([order[labels[order] == c][: args.labels] for c in range(CLASSES)])
    print(f"{len(labelled)} labelled digits of {len(labels)}")
    for name, weight in (("labelled images alone", 0.0), ("SimMatch", 1.0)):
        accuracy = train(images, labels, labelled, weight, args.epochs, args.seed)
        print(f"{name:22} {accuracy:5.1f} % of all images right")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""Linear classifiers on frozen features, and the data sets that they are rated on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

from ssmkernels.data import TransferImages, load_transfer_images
from ssmkernels.trainers.linear_evaluation import (
    PENALTIES,
    CentralSquare,
    fit_logistic_regression,
    frozen_features,
    linear_evaluation,
    transfer,
)


def clusters(count, seed, classes=3, dim=5, spread=1.5):
    draw = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(count) % classes
    return centers[labels] + spread * torch.randn(count, dim, generator=draw, dtype=torch.float64), labels


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_the_fit_is_scikit_learns(penalty):
    """λ of a mean of N cross-entropies is C = 1/(λN) of scikit-learn."""
    features, labels = clusters(120, seed=1)
    classifier = nn.Linear(5, 3, dtype=torch.float64)
    fit_logistic_regression(classifier, features, labels, penalty=penalty)
    theirs = LogisticRegression(C=1 / (penalty * len(labels)), tol=1e-10, max_iter=10_000).fit(
        features.numpy(), labels.numpy()
    )
    np.testing.assert_allclose(classifier.weight.detach().numpy(), theirs.coef_, atol=2e-4)
    shift = classifier.bias.detach().numpy() - theirs.intercept_
    np.testing.assert_allclose(shift, shift.mean(), atol=5e-4)  # the softmax does not see a constant


def test_the_penalty_is_picked_on_the_validation_images():
    train, validation, test = (clusters(count, seed) for count, seed in ((30, 1), (300, 2), (300, 3)))
    best = linear_evaluation(train, validation, test)
    right = {}
    for penalty in PENALTIES:
        result = linear_evaluation(train, validation, test, penalties=[penalty])
        right[penalty] = result.accuracy
    assert best.penalty in PENALTIES and PENALTIES[0] > best.penalty
    assert right[best.penalty] == pytest.approx(best.accuracy, abs=0.01)
    assert best.accuracy > right[PENALTIES[0]]
    assert best.mean_per_class == pytest.approx(best.accuracy)  # as many of each class


def test_the_mean_over_classes_weighs_them_equally():
    features = torch.tensor([[1.0], [1.0], [1.0], [-1.0]])
    labels = torch.tensor([0, 0, 0, 1])
    result = linear_evaluation(
        (features, labels), (features, labels), (torch.tensor([[1.0]] * 4), labels), penalties=[1e-3]
    )
    assert (result.accuracy, result.mean_per_class) == (0.75, 0.5)


def test_bad_arguments():
    part = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="penalties is"):
        linear_evaluation(part, part, part, penalties=[0.0])
    with pytest.raises(ValueError, match="validation has features and labels of shape"):
        linear_evaluation(part, (part[0], part[1][:2]), part)
    with pytest.raises(ValueError, match="name is 'mnist'; it should be one of food101"):
        load_transfer_images("mnist")


def test_central_squares():
    image = Image.fromarray(np.arange(8 * 16, dtype=np.uint8).reshape(8, 16))
    assert CentralSquare(8)(image).size == (8, 8)
    assert np.array_equal(np.asarray(CentralSquare(8)(image)), np.asarray(image)[:, 4:12])
    assert CentralSquare(224)(Image.new("RGB", (500, 333))).size == (224, 224)


def test_digits_by_their_pixels():
    images = load_transfer_images("digits")
    assert (
        len(images.train) + len(images.validation) == 1198 and len(images.validation) == 240 and len(images.test) == 599
    )
    kept = {id(images.train.dataset)} | {id(images.validation.dataset)}
    assert len(kept) == 1 and not set(images.train.index) & set(images.validation.index)
    features, labels = frozen_features(nn.Flatten(), images.test, mean=(0.0,), std=(1.0,), image_size=None)
    assert features.shape == (599, 64) and labels.tolist() == images.test.labels.tolist()
    result = transfer(nn.Flatten(), images, mean=(0.3,), std=(0.35,), image_size=None, penalties=(1e-1, 1e-2, 1e-3))
    assert result.accuracy > 0.93


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), (shade, 0, 0)).save(path)


def dtd(root):
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test")):
        lines = []
        for label, name in enumerate(("banded", "dotted")):
            picture(folder / "images" / name / f"{name}_{split}.jpg", 100 * label + number)
            lines.append(f"{name}/{name}_{split}.jpg\n")
        (folder / "labels" / f"{split}1.txt").write_text("".join(lines))


def food(root):
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, count in (("train", 5), ("test", 2)):
        listed = {}
        for label, name in enumerate(("apple_pie", "baklava")):
            listed[name] = [f"{name}/{split}{i}" for i in range(count)]
            for file in listed[name]:
                picture(folder / "images" / f"{file}.jpg", 100 * label)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))


def pets(root):
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("trainval", 5), ("test", 2)):
        lines = []
        for label, name in enumerate(("Abyssinian", "beagle"), start=1):
            for i in range(count):
                picture(folder / "images" / f"{name}_{split}{i}.jpg", 100 * label)
                lines.append(f"{name}_{split}{i} {label} 1 1\n")
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))


@pytest.mark.parametrize(
    ("name", "build", "sizes"), [("dtd", dtd, (2, 2, 2)), ("food101", food, (8, 2, 4)), ("pets", pets, (8, 2, 4))]
)
def test_official_splits(tmp_path, name, build, sizes):
    build(tmp_path)
    images = load_transfer_images(name, tmp_path)
    assert isinstance(images, TransferImages) and tuple(map(len, images)) == sizes
    for part in images:
        assert part.num_classes == 2 and set(part.labels.tolist()) == {0, 1}
    assert images.test.image(0).size == (12, 9)


@pytest.mark.parametrize("name", ["food101", "cars196", "dtd", "pets", "flowers102", "cifar10"])
def test_missing_images_are_explained(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"(?s){name}: looked for .* in {tmp_path} and found none"):
        load_transfer_images(name, tmp_path)

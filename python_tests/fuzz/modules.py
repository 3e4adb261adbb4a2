# SPDX-License-Identifier: BSD-3-Clause
"""Calls of modules: arguments of the constructor and of a method together, parameters as arguments of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fuzz import values as v
from fuzz.contents import Tensors
from fuzz.oracle import Finding, Target
from fuzz.pairs import ALPHA, GAMMA, IGNORED, draw_pair_focal_loss, draw_pair_logits
from fuzz.ranking import REDUCTIONS
from fuzz.values import Draw, Number
from hypothesis import strategies as st
from torch import Tensor

from ssmkernels import nn, reference

COUNT = Number((3, 4, 5), least=1, integer=True, shapes=True)
IGNORE = Number((-1, 0, -100), integer=True, optional=True)
POSITIVE = Number((1.0, 8.0, 32, 0.5), least=0, above=True)
FACTOR = Number((1.0, 8.0, 32, 0.5), least=1e-18, most=1e18)
MOMENTUM = Number((0.99, 0.5, 0), least=0, most=1, below=True)
COSINE = Number((0.1, 0, -0.5, 1), least=-1, most=1)
MARGIN = Number((0.5, 0.0, 1, -0.5))
WEIGHT = Number((1.0, 0, 2), least=0)
BASE = Number((0.5, 0.0, 1, -0.5), least=-1e18, most=1e18)
VARIANCE_WEIGHT = Number((1.0, 0, 2), least=0, most=1e18)


def method(
    made: Callable[..., torch.nn.Module], settings: tuple[str, ...], state: tuple[str, ...] = (), name: str = "forward"
):
    """A call with what the constructor takes, what the parameters are and what the method takes."""

    def call(**arguments: Any) -> Any:
        torch.default_generator.manual_seed(0)  # torch.manual_seed writes down a stack for each kind of device
        module = made(**{setting: arguments.pop(setting) for setting in settings})
        given = {parameter: arguments.pop(parameter) for parameter in state}
        floats = [x for x in arguments.values() if isinstance(x, Tensor) and x.is_floating_point()]
        if floats:
            module.to(torch.float64 if any(x.dtype == torch.float64 for x in floats) else torch.float32)
        for parameter, value in given.items():
            setattr(module, parameter, torch.nn.Parameter(value, requires_grad=False))
        return getattr(module, name)(**arguments)

    return call


def _labels(draw: Draw, rows: int, classes: int) -> Tensor:
    return v.classes(draw, (rows,), classes)


def _one_hot_mask(labels: Tensor, others: Tensor) -> Tensor:
    return labels[:, None] == others


# Pair losses


def _draw_pairs(draw: Draw) -> dict[str, Any]:
    rows, others, dim = v.sizes(draw, 3)
    arguments = {
        "embeddings": v.values(draw, (rows, dim), v.dtype(draw)),
        "labels": _labels(draw, rows, 4) - 1,
        "ignore_index": IGNORE.draw(draw),
    }
    if draw(st.booleans()):
        arguments["ref_emb"] = v.values(draw, (others, dim), v.dtype(draw))
        arguments["ref_labels"] = _labels(draw, others, 4) - 1
    elif rows and draw(st.booleans()):
        (listed,) = v.sizes(draw, 1)
        arguments["indices_tuple"] = tuple(v.classes(draw, (listed,), rows) for _ in range(3))
    return arguments


def _draw_contrastive(draw: Draw) -> dict[str, Any]:
    margins = {"pos_margin": MARGIN.draw(draw), "neg_margin": WEIGHT.draw(draw)}
    return {**_draw_pairs(draw), **margins, "reduction": draw(st.sampled_from(REDUCTIONS))}


def _draw_multi_similarity(draw: Draw) -> dict[str, Any]:
    arguments = _draw_pairs(draw)
    arguments.pop("indices_tuple", None)  # lists that contradict themselves are refused
    return {**arguments, "alpha": FACTOR.draw(draw), "beta": FACTOR.draw(draw), "base": BASE.draw(draw)}


# Similarity distribution


def _draw_basis(draw: Draw) -> dict[str, Any]:
    rows, dim = v.sizes(draw, 2)
    return {
        "basis_features": v.values(draw, (rows, dim), v.dtype(draw)),
        "labels": _labels(draw, rows, 4),
        "momentum": MOMENTUM.draw(draw),
    }


def _draw_distribution(draw: Draw) -> dict[str, Any]:
    return {
        **_draw_basis(draw),
        "margin": MARGIN.draw(draw),
        "variance_weight": VARIANCE_WEIGHT.draw(draw),
        "gradient": draw(st.sampled_from(["batch", "momentum"])),
        "ignore_index": IGNORE.draw(draw),
    }


def _check_distribution(arguments: dict[str, Any], results: Tensors) -> None:
    """Of a first batch, whose moments are the running ones: means of cosines and of their squares."""
    features, labels = arguments["basis_features"].double(), arguments["labels"]
    ignored = arguments["ignore_index"]
    kept = torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != int(ignored)
    moments = reference.similarity_moments(features[kept], labels[kept])
    gap = F.relu(moments.negative_mean - moments.positive_mean + float(arguments["margin"]))
    weight = float(arguments["variance_weight"])
    exact = float(gap + weight * (moments.positive_var + moments.negative_var))
    unit = torch.finfo(results["value"].dtype).eps * (8 * features.shape[1] + 8 * len(features) + 64)
    representable = abs(exact) < torch.finfo(results["value"].dtype).max
    if representable and not abs(float(results["value"]) - exact) <= unit * (2 + abs(exact) + 2 * weight):
        raise Finding(f"{float(results['value'])}, exactly {exact}")


def _draw_local(draw: Draw) -> dict[str, Any]:
    return {**_draw_basis(draw), "scale": FACTOR.draw(draw)}


def _exact_local(basis_features: Tensor, labels: Tensor, scale: float, **_: Any) -> Tensor:
    rows = F.normalize(basis_features)
    logits, same = scale * (rows @ rows.t()), _one_hot_mask(labels, labels)
    positives = same & ~torch.eye(len(rows), dtype=torch.bool)
    total = basis_features.sum() * 0
    for pairs, logs in ((positives, F.logsigmoid(logits)), (~same, F.logsigmoid(-logits))):
        total = total - logs[pairs].sum() / max(int(pairs.sum()), 1)
    return total


def _inner_local(basis_features: Tensor, scale: float, **_: Any) -> dict[str, Any]:
    """The gradient of a direction, at most 4 σ, loses its part along the row."""
    return {"gradient of basis_features": 4 * scale / basis_features.norm(dim=1, keepdim=True).clamp_min(1e-12)}


def _inner_cross_entropy(**_: Any) -> dict[str, Any]:
    """The logarithm of a sum of at least 1 is a number beside 1."""
    return {"value": 1.0}


def _draw_global(draw: Draw) -> dict[str, Any]:
    arguments = _draw_local(draw)
    dim, clusters = arguments["basis_features"].shape[1], draw(st.integers(4, 6))
    arguments["basis_features"] = arguments["basis_features"] if dim else torch.ones(len(arguments["labels"]), 1)
    dim = max(dim, 1)
    prototypes = v.values(draw, (clusters, dim), torch.float32)
    return {**arguments, "num_basis": dim, "num_clusters": clusters, "prototypes": prototypes}


def _exact_global(basis_features: Tensor, labels: Tensor, scale: float, prototypes: Tensor, **_: Any) -> Tensor:
    logits = scale * (F.normalize(basis_features) @ F.normalize(prototypes).t())
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


class _Moments(nn.RunningSimilarityMoments):
    """The base class is only made; those that derive from it are called."""

    def forward(self) -> Tensor:
        return self.positive_mean


# Prototypes and proxies


def _draw_proxy(draw: Draw) -> dict[str, Any]:
    (rows,), (classes, dim) = v.sizes(draw, 1), v.sizes(draw, 2, least=1)
    return {
        "num_classes": classes,
        "embedding_dim": dim,
        "epsilon": FACTOR.draw(draw),
        "margin": COSINE.draw(draw),
        "proxies": v.values(draw, (classes, dim), torch.float32),
        "embeddings": v.values(draw, (rows, dim), v.dtype(draw)),
        "labels": _labels(draw, rows, classes + 1) - 1,
        "confidence": v.values(draw, (rows,), v.dtype(draw), least=0) if draw(st.booleans()) else None,
    }


def _exact_proxy(
    embeddings: Tensor,
    labels: Tensor,
    confidence: Tensor | None,
    proxies: Tensor,
    epsilon: float,
    margin: float,
    **_: Any,
) -> Tensor:
    cosines, total = embeddings @ F.normalize(proxies).t(), embeddings.sum() * 0
    for row, label in enumerate(labels.tolist()):
        if label < 0:
            continue
        signs = torch.ones(len(proxies), dtype=torch.float64)
        signs[label] = -1
        loss = -F.logsigmoid(-epsilon * (signs * cosines[row] + margin)).sum()
        total = total + (1 if confidence is None else confidence[row].detach()) * loss
    return total / len(proxies)


def _draw_alignment(draw: Draw) -> dict[str, Any]:
    (rows,), (classes,) = v.sizes(draw, 1), v.sizes(draw, 1, least=1)
    probs = v.values(draw, (rows, classes), v.dtype(draw), least=0, exponent=8)
    return {"num_classes": classes, "queue_length": COUNT.draw(draw), "probs": probs}


def _check_alignment(arguments: dict[str, Any], results: Tensors) -> None:
    """Rows sum to 1, and each is in proportion to its p over the mean."""
    probs, aligned = arguments["probs"].double(), results["value"].double()
    if aligned.shape != probs.shape:
        raise Finding(f"shape {list(aligned.shape)}")
    mean = probs.sum(dim=0) / max(len(probs), 1)
    if bool((mean > 0).all()) and float(mean.min()) > 1e-12 and float(mean.max()) < 1e12:
        exact = probs / mean
        exact = exact / exact.sum(dim=1, keepdim=True).clamp_min(1e-300)
        if not torch.allclose(aligned, exact, rtol=1e-4, atol=1e-6):
            raise Finding(f"{aligned}, exactly {exact}")


def _draw_head(draw: Draw) -> dict[str, Any]:
    (rows,) = v.sizes(draw, 1)
    sizes = {name: COUNT.draw(draw) for name in ("in_features", "hidden_features", "embedding_dim", "num_prototypes")}
    features = v.values(draw, (rows, int(sizes["in_features"])), v.dtype(draw, v.WIDE_FLOATS), exponent=8)
    return {**sizes, "features": features}


def _eval_head(**settings: Any) -> torch.nn.Module:
    return nn.PrototypeHead(**settings).eval()


def _exact_head(features: Tensor, **sizes: int) -> tuple[Tensor, Tensor]:
    torch.default_generator.manual_seed(0)
    head = nn.PrototypeHead(**sizes).eval().double()
    z = F.normalize(head.projection(features), dim=1)
    return z.detach(), (z @ head.prototypes.weight.t()).detach()


def _inner_head(features: Tensor, **sizes: int) -> dict[str, Any]:
    """Sums of the two layers by magnitude, and what they become where their result is scaled to unit length."""
    torch.default_generator.manual_seed(0)
    first, _, _, second = nn.PrototypeHead(**sizes).double().projection
    hidden = features.abs() @ first.weight.abs().t() + first.bias.abs()
    terms = hidden @ second.weight.abs().t() + second.bias.abs()
    length = second(F.relu(first(features))).norm(dim=1, keepdim=True).clamp_min(1e-12)
    relative = (terms.norm(dim=1, keepdim=True) / length).detach()
    return {"value 0": relative, "value 1": relative}


def _draw_sinkhorn(draw: Draw) -> dict[str, Any]:
    shape = tuple(v.sizes(draw, 2, least=1))
    scores = v.values(draw, shape, v.dtype(draw), exponent=3)
    return {"scores": scores, "epsilon": FACTOR.draw(draw), "iterations": COUNT.draw(draw)}


def _exact_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(dim=0)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


# Feature basis


def _draw_feature_basis(draw: Draw) -> dict[str, Any]:
    (rows,), (dim, basis) = v.sizes(draw, 1), v.sizes(draw, 2, least=1)
    dtype = v.dtype(draw, v.WIDE_FLOATS)  # what is rounded to a half type in between is torch's
    return {
        "in_features": dim,
        "num_basis": basis,
        "weight": v.values(draw, (basis, dim), dtype, exponent=3),
        "features": v.values(draw, (rows, dim), dtype, exponent=3),
    }


def _draw_basis_entropy(draw: Draw) -> dict[str, Any]:
    arguments = _draw_feature_basis(draw)
    return {**arguments, "labels": _labels(draw, len(arguments["features"]), arguments["num_basis"])}


def _exact_basis_entropy(weight: Tensor, features: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(features @ weight.t(), labels, reduction="sum") / max(len(labels), 1)


# Similarity network


def _with_sizes(arguments: dict[str, Any]) -> dict[str, Any]:
    hidden, dim = len(arguments["w2"]), arguments["x"].shape[1]
    return {**arguments, "in_features": dim, "hidden_features": hidden}


def _draw_network(draw: Draw) -> dict[str, Any]:
    return _with_sizes(_nonempty(draw, draw_pair_logits))


def _draw_network_loss(draw: Draw) -> dict[str, Any]:
    return _with_sizes(_nonempty(draw, draw_pair_focal_loss))


def _nonempty(draw: Draw, draw_arguments: Callable[[Draw], dict[str, Any]]) -> dict[str, Any]:
    """A network has at least one feature and one hidden unit."""
    arguments = draw_arguments(draw)
    if 0 not in arguments["w1"].shape:
        return arguments
    dim, hidden = max(arguments["x"].shape[1], 1), max(len(arguments["w2"]), 1)
    dtype, width = arguments["x"].dtype, 2 * dim if arguments["interaction"] == "concat" else dim
    shapes = {"x": (len(arguments["x"]), dim), "y": (len(arguments["y"]), dim)}
    shapes |= {"w1": (hidden, width), "b1": (hidden,), "w2": (hidden,)}
    return arguments | {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}


def _draw_probabilities(draw: Draw) -> dict[str, Any]:
    arguments = _draw_network(draw)
    del arguments["pairs"]
    return {**{name: value for name, value in arguments.items() if name != "y"}, "centers": arguments["y"]}


def _check_probabilities(arguments: dict[str, Any], results: Tensors) -> None:
    probs = results["value"]
    if probs.shape != (len(arguments["x"]), len(arguments["centers"])):
        raise Finding(f"shape {list(probs.shape)}")
    if not bool(((probs >= 0) & (probs <= 1) | probs.isnan()).all()):
        raise Finding(f"{probs} leaves [0, 1]")


def _draw_sample(draw: Draw) -> dict[str, Any]:
    return {"n": COUNT.draw(draw), "m": LISTED.draw(draw)}


def _seeded(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        return function(**arguments, generator=torch.Generator().manual_seed(0))

    return call


def _check_sample(arguments: dict[str, Any], results: Tensors) -> None:
    pairs, n = results["value"], int(arguments["n"])
    if pairs.shape != (int(arguments["m"]), 2) or pairs.dtype != torch.int64:
        raise Finding(f"{pairs.dtype} {list(pairs.shape)}")
    halves = pairs.div(n, rounding_mode="floor")
    if not bool(((halves[:, 0] == halves[:, 1]) & (halves[:, 0] >= 0) & (halves[:, 0] <= 1)).all()):
        raise Finding(f"pairs {pairs.tolist()} of {n} and {n} rows")


def _draw_centers(draw: Draw) -> dict[str, Any]:
    rows, dim = v.sizes(draw, 2)
    classes = draw(st.integers(1, 6))
    return {
        "features": v.values(draw, (rows, dim), v.dtype(draw)),
        "labels": _labels(draw, rows, classes),
        "num_classes": classes,
    }


def _check_centers(arguments: dict[str, Any], results: Tensors) -> None:
    features, labels = arguments["features"], arguments["labels"]
    for label in range(int(arguments["num_classes"])):
        rows = features[labels == label]
        center = results["features"][label]
        if bool(results["present"][label]) != bool(len(rows)):
            raise Finding(f"whether class {label} has a sample: {results['present']}")
        if not len(rows) and bool((center != 0).any()):
            raise Finding(f"class {label} has no sample and the center {center}")
        if len(rows) and not bool(torch.isclose(rows, center, rtol=0, atol=0, equal_nan=True).all(dim=1).any()):
            raise Finding(f"the center of class {label} is none of its samples")


# Memory and teacher


def _draw_memory(draw: Draw) -> dict[str, Any]:
    slots, dim, classes = v.sizes(draw, 3, least=1)
    (rows,) = v.sizes(draw, 1)
    return {
        "num_slots": slots,
        "dim": dim,
        "num_classes": classes,
        "mode": draw(st.sampled_from(["temporal", "teacher"])),
        "momentum": Number((0.7, 0, 1), least=0, most=1).draw(draw),
        "slots": v.classes(draw, (rows,), slots),
        "embeddings": v.values(draw, (rows, dim), v.dtype(draw, v.WIDE_FLOATS)),
        "labels": _labels(draw, rows, classes),
    }


def _written(num_slots: int, dim: int, num_classes: int, mode: str, momentum: float, **batch: Any) -> dict[str, Tensor]:
    memory = nn.LabeledMemory(num_slots, dim, num_classes, mode=mode, momentum=momentum)
    if isinstance(batch["embeddings"], Tensor) and batch["embeddings"].dtype == torch.float64:
        memory.double()
    memory.update(**batch)
    return {"features": memory.features(), "labels": memory.labels[memory.rows]}


def _exact_written(
    num_slots: int, dim: int, num_classes: int, mode: str, momentum: float, **batch: Any
) -> dict[str, Tensor]:
    bank = torch.zeros(num_slots, dim, dtype=torch.float64)
    labels = torch.zeros(num_slots, dtype=torch.int64)
    momentum = momentum if mode == "temporal" else 0.0
    reference.memory_update_(bank, labels, batch["slots"], batch["embeddings"], batch["labels"], momentum=momentum)
    return {"features": bank, "labels": labels}


def _draw_teacher(draw: Draw) -> dict[str, Any]:
    shape = tuple(v.sizes(draw, 2, least=1))
    names = ("weight", "buffer", "student_weight", "student_buffer")
    return {
        **{name: v.values(draw, shape, torch.float32, exponent=3) for name in names},
        "decay": MOMENTUM.draw(draw),
        "buffers": draw(st.sampled_from(["average", "copy", "own"])),
    }


class _Model(torch.nn.Module):
    def __init__(self, weight: Tensor, buffer: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())
        self.register_buffer("buffer", buffer.clone())


def _taught(
    weight: Tensor, buffer: Tensor, student_weight: Tensor, student_buffer: Tensor, decay: Any, buffers: Any
) -> dict[str, Tensor]:
    teacher = nn.EMATeacher(_Model(weight, buffer), decay, buffers=buffers)
    teacher.update(_Model(student_weight, student_buffer))
    return {"weight": teacher.model.weight.detach(), "buffer": teacher.model.buffer}


def _exact_taught(
    weight: Tensor, buffer: Tensor, student_weight: Tensor, student_buffer: Tensor, decay: float, buffers: str
) -> dict[str, Tensor]:
    averaged = decay * buffer + (1 - decay) * student_buffer
    buffer = {"average": averaged, "copy": student_buffer, "own": buffer}[buffers]
    return {"weight": decay * weight + (1 - decay) * student_weight, "buffer": buffer}


LISTED = Number((0, 1, 5, 64), least=0, integer=True, shapes=True)
PARAMETERS = ("w1", "b1", "w2", "b2")
SIZES = ("in_features", "hidden_features")
NETWORK = (*SIZES, "interaction")
HEAD = ("in_features", "hidden_features", "embedding_dim", "num_prototypes")


def _counts(*names: str) -> dict[str, Number]:
    return dict.fromkeys(names, COUNT)


TARGETS = {
    "nn.ContrastiveLoss": Target(
        _draw_contrastive,
        method(nn.ContrastiveLoss, ("pos_margin", "neg_margin", "reduction", "ignore_index")),
        numbers={"pos_margin": MARGIN, "neg_margin": WEIGHT, "ignore_index": IGNORE},
        words={"reduction": REDUCTIONS},
        gradient=("embeddings", "ref_emb"),
    ),
    "nn.MultiSimilarityLoss": Target(
        _draw_multi_similarity,
        method(nn.MultiSimilarityLoss, ("alpha", "beta", "base", "ignore_index")),
        numbers={"alpha": FACTOR, "beta": FACTOR, "base": BASE, "ignore_index": IGNORE},
        gradient=("embeddings", "ref_emb"),
    ),
    "nn.DistributionAlignment": Target(
        _draw_alignment,
        method(nn.DistributionAlignment, ("num_classes", "queue_length")),
        holds=_check_alignment,
        numbers=_counts("num_classes", "queue_length"),
        undefined=("probs",),
    ),
    "nn.EMATeacher": Target(
        _draw_teacher,
        _taught,
        _exact_taught,
        numbers={"decay": MOMENTUM},
        words={"buffers": ("average", "copy", "own")},
        fixed=("weight", "buffer", "student_weight", "student_buffer"),
    ),
    "nn.FeatureBasis": Target(
        _draw_feature_basis,
        method(nn.FeatureBasis, ("in_features", "num_basis"), ("weight",)),
        lambda weight, features, **_: features @ weight.t(),
        numbers=_counts("in_features", "num_basis"),
        gradient=("features",),
        fixed=("weight", "num_basis", "in_features"),
    ),
    "nn.FeatureBasis.similarities": Target(
        _draw_feature_basis,
        method(nn.FeatureBasis, ("in_features", "num_basis"), ("weight",), "similarities"),
        numbers=_counts("in_features", "num_basis"),
        gradient=("features",),
        fixed=("weight", "num_basis", "in_features"),
    ),
    "nn.FeatureBasis.cross_entropy": Target(
        _draw_basis_entropy,
        method(nn.FeatureBasis, ("in_features", "num_basis"), ("weight",), "cross_entropy"),
        _exact_basis_entropy,
        inner=_inner_cross_entropy,
        numbers=_counts("in_features", "num_basis"),
        fixed=("weight", "num_basis", "in_features"),
    ),
    "nn.GlobalCrossEntropy": Target(
        _draw_global,
        method(nn.GlobalCrossEntropy, ("num_basis", "num_clusters", "scale", "momentum"), ("prototypes",)),
        _exact_global,
        inner=_inner_cross_entropy,
        numbers={"scale": FACTOR, "momentum": MOMENTUM},
        fixed=("num_basis", "num_clusters", "prototypes"),
    ),
    "nn.LabeledMemory": Target(
        _draw_memory,
        _written,
        _exact_written,
        numbers={**_counts("num_slots", "dim", "num_classes"), "momentum": Number((0.7,), least=0, most=1)},
        words={"mode": ("temporal", "teacher")},
    ),
    "nn.LocalCrossEntropy": Target(
        _draw_local,
        method(nn.LocalCrossEntropy, ("scale", "momentum")),
        _exact_local,
        inner=_inner_local,
        numbers={"scale": FACTOR, "momentum": MOMENTUM},
        gradient=("basis_features",),
    ),
    "nn.PrototypeHead": Target(
        _draw_head,
        method(_eval_head, HEAD),
        _exact_head,
        inner=_inner_head,
        numbers=_counts(*HEAD),
        undefined=HEAD,
    ),
    "nn.ProxyLoss": Target(
        _draw_proxy,
        method(nn.ProxyLoss, ("num_classes", "embedding_dim", "epsilon", "margin"), ("proxies",)),
        _exact_proxy,
        numbers={"epsilon": FACTOR, "margin": COSINE},
        fixed=("num_classes", "embedding_dim", "proxies"),
    ),
    "nn.RunningSimilarityMoments": Target(
        lambda draw: {"momentum": MOMENTUM.draw(draw)},
        method(_Moments, ("momentum",)),
        lambda momentum: torch.zeros((), dtype=torch.float64),
        numbers={"momentum": MOMENTUM},
    ),
    "nn.SimilarityDistributionLoss": Target(
        _draw_distribution,
        method(nn.SimilarityDistributionLoss, ("margin", "variance_weight", "momentum", "gradient", "ignore_index")),
        holds=_check_distribution,
        numbers={"margin": MARGIN, "variance_weight": VARIANCE_WEIGHT, "momentum": MOMENTUM, "ignore_index": IGNORE},
        words={"gradient": ("batch", "momentum")},
    ),
    "nn.SimilarityNetwork": Target(
        _draw_network,
        method(nn.SimilarityNetwork, NETWORK, PARAMETERS),
        gradient=("x", "y"),
        fixed=(*SIZES, *PARAMETERS, "interaction"),
    ),
    "nn.SimilarityNetwork.focal_loss": Target(
        _draw_network_loss,
        method(nn.SimilarityNetwork, NETWORK, PARAMETERS, "focal_loss"),
        numbers={"alpha": ALPHA, "gamma": GAMMA, "ignore_index": IGNORED},
        words={"reduction": ("mean", "sum", "none")},
        gradient=("x", "y"),
        fixed=(*SIZES, *PARAMETERS, "interaction"),
    ),
    "nn.SimilarityNetwork.class_probabilities": Target(
        _draw_probabilities,
        method(nn.SimilarityNetwork, NETWORK, PARAMETERS, "class_probabilities"),
        holds=_check_probabilities,
        fixed=(*SIZES, *PARAMETERS, "interaction"),
    ),
    "nn.draw_class_centers": Target(
        _draw_centers,
        _seeded(nn.draw_class_centers),
        holds=_check_centers,
        numbers=_counts("num_classes"),
        undefined=("labels",),
    ),
    "nn.sample_pairs": Target(
        _draw_sample, _seeded(nn.sample_pairs), holds=_check_sample, numbers={"n": COUNT, "m": LISTED}
    ),
    "nn.sinkhorn_codes": Target(
        _draw_sinkhorn,
        nn.sinkhorn_codes,
        _exact_sinkhorn,
        numbers={"epsilon": FACTOR, "iterations": COUNT},
    ),
}

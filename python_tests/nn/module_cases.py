# SPDX-License-Identifier: BSD-3-Clause
"""What test_module_contract.py asks of every module of ssmkernels.nn: how to make it and call it, and what its outputs
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.nn import (
    ContrastiveLoss,
    DistributionAlignment,
    EMATeacher,
    FeatureBasis,
    GlobalCrossEntropy,
    LabeledMemory,
    LocalCrossEntropy,
    MultiSimilarityLoss,
    PrototypeHead,
    ProxyLoss,
    SimilarityDistributionLoss,
    SimilarityNetwork,
)

DIM, CLASSES, SLOTS = 6, 4, 10
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One method of one module.

    A module accumulates where its outputs in training depend on earlier batches; its rows are independent where row i
    of each output is a function of row i of the inputs.
    """

    module: type[nn.Module]
    settings: Mapping[str, Any]
    """Arguments of the constructor."""
    make_inputs: Callable[[int, torch.Generator], Inputs]
    """Inputs of so many rows in float32, by the names of the method's parameters."""
    method: str = "forward"
    leaves: tuple[str, ...] = ()
    """The inputs with a gradient."""
    fixed: tuple[str, ...] = ()
    """The inputs whose first dimension is not the batch."""
    optional: tuple[str, ...] = ()
    """The inputs that may be None."""
    accumulates: bool = False
    rows_are_independent: bool = False
    is_once_differentiable: bool = False
    """A second derivative raises."""
    in_float32: bool = False
    """Outputs are computed in float32 or better, from inputs of any dtype and under autocast, which changes no bit."""
    in_eval_mode: bool = False
    """Called in eval mode: batch norm takes no single row in train mode."""
    passes_inputs_on: bool = False
    """To a module of the caller, which judges them."""
    values_are_checked: tuple[str, ...] = ()
    """The floating-point inputs in which NaN is refused."""
    roundings: int = 8
    """At most so many times is a number of size 1 rounded to the module's dtype on the way to an output or a
    gradient.
    """
    prepare: Callable[[Any], None] | None = None
    """Gives a new module a state worth testing."""
    reads_result: str = ""
    """The method that reads what ``method``, which returns nothing, has written."""

    @property
    def without_gradient(self) -> bool:
        return not self.leaves

    @property
    def follows_autocast(self) -> bool:
        return not self.in_float32

    @property
    def name(self) -> str:
        name = self.module.__name__ if self.method == "forward" else f"{self.module.__name__}.{self.method}"
        choices = [value for value in self.settings.values() if isinstance(value, str)]
        return "-".join([name, *choices, *(["references"] if "ref_emb" in self.fixed else [])])

    def make(self, **changes: Any) -> nn.Module:
        torch.manual_seed(0)
        module = self.module(**{**self.settings, **changes}).train(not self.in_eval_mode)
        if self.prepare:
            self.prepare(module)
        return module

    def inputs(self, rows: int = 12, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
        inputs = self.make_inputs(rows, torch.Generator().manual_seed(seed))
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    def run(self, module: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The outputs of the method."""
        output = getattr(module, self.method)(**inputs)
        if self.reads_result:
            output = getattr(module, self.reads_result)()
        return (output,) if isinstance(output, Tensor) else tuple(output)


def weighted_sum(outputs: Iterable[Tensor]) -> Tensor:
    """In which no gradient cancels by symmetry."""
    weights = [torch.linspace(0.5, 1.5, output.numel()).reshape(output.shape) for output in outputs]
    sums = [(output * weight).double().sum() for output, weight in zip(outputs, weights, strict=True)]
    return torch.stack(sums).sum()


class Call(nn.Module):
    """The method of a case as a forward, for what takes only modules."""

    def __init__(self, case: Case, module: nn.Module) -> None:
        super().__init__()
        self.case, self.module = case, module

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return self.case.run(self.module, inputs)


def normal(*shape: int, draw: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=draw)


def unit(*shape: int, draw: torch.Generator) -> Tensor:
    return F.normalize(normal(*shape, draw=draw))


def probabilities(rows: int, draw: torch.Generator) -> Tensor:
    return normal(rows, CLASSES, draw=draw).softmax(dim=1)


def classes(rows: int, draw: torch.Generator) -> Tensor:
    return torch.randint(0, CLASSES, (rows,), generator=draw)


def embeddings_and_labels(rows: int, draw: torch.Generator) -> Inputs:
    return {"embeddings": normal(rows, DIM, draw=draw), "labels": classes(rows, draw)}


def with_references(rows: int, draw: torch.Generator) -> Inputs:
    references = {"ref_emb": normal(9, DIM, draw=draw), "ref_labels": classes(9, draw)}
    return {**embeddings_and_labels(rows, draw), **references}


def basis_features_and_labels(rows: int, draw: torch.Generator) -> Inputs:
    return {"basis_features": normal(rows, DIM, draw=draw), "labels": classes(rows, draw)}


def features_and_labels(rows: int, draw: torch.Generator) -> Inputs:
    return {"features": normal(rows, DIM, draw=draw), "labels": classes(rows, draw)}


def features_only(rows: int, draw: torch.Generator) -> Inputs:
    return {"features": normal(rows, DIM, draw=draw)}


def predictions(rows: int, draw: torch.Generator) -> Inputs:
    return {"probs": probabilities(rows, draw)}


def network_input(rows: int, draw: torch.Generator) -> Inputs:
    return {"input": normal(rows, DIM, draw=draw)}


def proxy_inputs(rows: int, draw: torch.Generator) -> Inputs:
    return {
        "embeddings": unit(rows, DIM, draw=draw),
        "labels": classes(rows, draw),
        "confidence": torch.rand(rows, generator=draw),
    }


def queries(rows: int, draw: torch.Generator) -> Inputs:
    names = ("query_weak", "query_strong")
    return {**{name: unit(rows, DIM, draw=draw) for name in names}, "probs_weak": probabilities(rows, draw)}


def slots_to_write(rows: int, draw: torch.Generator) -> Inputs:
    slots = torch.randint(0, SLOTS, (rows,), generator=draw)
    return {"slots": slots, "embeddings": unit(rows, DIM, draw=draw), "labels": slots % CLASSES}


def pairs_of_rows(rows: int, draw: torch.Generator) -> Inputs:
    return {"x": normal(rows, DIM, draw=draw), "y": normal(5, DIM, draw=draw)}


def labelled_pairs_of_rows(rows: int, draw: torch.Generator) -> Inputs:
    return {**pairs_of_rows(rows, draw), "x_labels": classes(rows, draw), "y_labels": classes(5, draw)}


def rows_and_centers(rows: int, draw: torch.Generator) -> Inputs:
    return {"x": normal(rows, DIM, draw=draw), "centers": normal(CLASSES, DIM, draw=draw)}


def fill(memory: LabeledMemory) -> None:
    slots = torch.arange(SLOTS)
    memory.update(slots, unit(SLOTS, DIM, draw=torch.Generator().manual_seed(5)), slots % CLASSES)


def small_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


MEMORY = {"num_slots": SLOTS, "dim": DIM, "num_classes": CLASSES, "labels": torch.arange(SLOTS) % CLASSES}
NETWORK = {"in_features": DIM, "hidden_features": 7}
BASIS = {"in_features": DIM, "num_basis": CLASSES}
INTERACTIONS = ("concat", "absdiff", "product")


def memory_cases() -> list[Case]:
    read = Case(
        LabeledMemory,
        MEMORY,
        queries,
        "instance_matching",
        leaves=("query_strong",),
        rows_are_independent=True,
        values_are_checked=("probs_weak",),
        is_once_differentiable=True,
        prepare=fill,
    )
    write = Case(
        LabeledMemory,
        MEMORY,
        slots_to_write,
        "update",
        accumulates=True,
        prepare=fill,
        reads_result="features",
    )
    teacher = replace(write, settings={**MEMORY, "mode": "teacher"})
    return [read, replace(write, settings={**MEMORY, "mode": "temporal", "momentum": 0.5}), teacher]


def network_cases() -> list[Case]:
    cases = []
    for interaction in INTERACTIONS:
        settings = {**NETWORK, "interaction": interaction}
        logits = Case(
            SimilarityNetwork,
            settings,
            pairs_of_rows,
            leaves=("x", "y"),
            fixed=("y",),
            rows_are_independent=True,
        )
        cases += [
            logits,
            replace(
                logits,
                make_inputs=rows_and_centers,
                method="class_probabilities",
                leaves=("x", "centers"),
                fixed=("centers",),
            ),
            Case(
                SimilarityNetwork,
                settings,
                labelled_pairs_of_rows,
                "focal_loss",
                is_once_differentiable=True,
                leaves=("x", "y"),
                fixed=("y", "y_labels"),
            ),
        ]
    return cases


def pair_loss_cases() -> list[Case]:
    own = {"leaves": ("embeddings",), "in_float32": True, "optional": ("ref_emb", "ref_labels")}
    others = {**own, "leaves": ("embeddings", "ref_emb"), "fixed": ("ref_emb", "ref_labels")}
    contrastive = {"pos_margin": 0.1, "neg_margin": 1.5}
    return [
        Case(ContrastiveLoss, {**contrastive, "reduction": "mean_nonzero"}, embeddings_and_labels, **own),
        Case(ContrastiveLoss, {**contrastive, "reduction": "mean"}, embeddings_and_labels, **own),
        Case(ContrastiveLoss, {**contrastive, "reduction": "sum"}, embeddings_and_labels, **own),
        Case(ContrastiveLoss, contrastive, with_references, **others),
        Case(MultiSimilarityLoss, {"alpha": 2.0, "beta": 5.0, "base": 0.5}, embeddings_and_labels, **own),
        Case(MultiSimilarityLoss, {"alpha": 3.0}, with_references, **others),
    ]


def teacher_cases() -> list[Case]:
    shared = {"rows_are_independent": True, "in_eval_mode": True, "passes_inputs_on": True}
    settings = {"model": small_network(), "decay": 0.9}
    rules = ("average", "copy", "own")
    return [Case(EMATeacher, {**settings, "buffers": rule}, network_input, **shared) for rule in rules]


CASES = [
    *memory_cases(),
    *network_cases(),
    *pair_loss_cases(),
    Case(
        DistributionAlignment,
        {"num_classes": CLASSES, "queue_length": 3},
        predictions,
        accumulates=True,
        in_float32=True,
    ),
    *teacher_cases(),
    Case(FeatureBasis, BASIS, features_only, leaves=("features",), rows_are_independent=True),
    Case(FeatureBasis, BASIS, features_only, "similarities", leaves=("features",)),
    Case(FeatureBasis, BASIS, features_and_labels, "cross_entropy", leaves=("features",)),
    Case(
        PrototypeHead,
        {"in_features": DIM, "hidden_features": 8, "embedding_dim": 5, "num_prototypes": 7},
        features_only,
        leaves=("features",),
        rows_are_independent=True,
        in_eval_mode=True,
    ),
    Case(
        ProxyLoss,
        {"num_classes": CLASSES, "embedding_dim": DIM, "epsilon": 8.0, "margin": 0.1},
        proxy_inputs,
        leaves=("embeddings",),
        optional=("confidence",),
        values_are_checked=("confidence",),
        in_float32=True,
    ),
    *(
        Case(
            SimilarityDistributionLoss,
            {"margin": 0.4, "variance_weight": 2.0, "momentum": 0.5, "gradient": gradient},
            basis_features_and_labels,
            leaves=("basis_features",),
            in_float32=True,
            accumulates=True,
        )
        for gradient in ("batch", "momentum")
    ),
    Case(
        LocalCrossEntropy,
        {"scale": 3.0, "momentum": 0.5},
        basis_features_and_labels,
        leaves=("basis_features",),
        in_float32=True,
        accumulates=True,
    ),
    Case(
        GlobalCrossEntropy,
        {"num_basis": DIM, "num_clusters": CLASSES, "scale": 3.0, "momentum": 0.5},
        basis_features_and_labels,
        leaves=("basis_features",),
        in_float32=True,
        accumulates=True,
    ),
]

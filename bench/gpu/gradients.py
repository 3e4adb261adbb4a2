# SPDX-License-Identifier: BSD-3-Clause
"""torch.autograd.gradcheck of every differentiable op in float64 on the device."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck

from bench.gpu.rows import Rows, arguments
from bench.gpu.smoke import CASES, Case, to
from ssmkernels import ops

ROW_SECONDS = 10


def check(case: Case, variant: dict[str, Any], device: str) -> dict[str, Any]:
    inputs = to(case.draw(case.sizes[1], torch.float64, **variant), device)
    given = case.given(inputs)

    def smooth_outputs(*values: Tensor) -> tuple[Tensor, ...]:
        changed = case.free(inputs | dict(zip(given, values, strict=True)))
        outputs = dict(zip(case.outputs, case.run(ops, changed), strict=True))
        return tuple(outputs[name] for name in case.smooth)

    gradcheck(smooth_outputs, [inputs[name].detach().requires_grad_() for name in given], fast_mode=True)
    return {"inputs": list(given)}


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv, "gradcheck of every op.")
    rows = Rows(args.out, ROW_SECONDS)
    for case in CASES.values():
        for variant in case.variants if case.differentiable else ():
            options = "".join(f" {name}={value}" for name, value in variant.items())
            rows.run(f"{case.name}{options}", lambda case=case, variant=variant: check(case, variant, args.device))
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())

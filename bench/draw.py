# SPDX-License-Identifier: BSD-3-Clause
"""Draws the plots of committed results anew, without measuring.

python bench/draw.py [bench/results/cpu-amd-avx512-memory.json ...]    all of bench/results by default
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ssmkernels.bench import plots
from ssmkernels.bench.case import Result
from ssmkernels.bench.measure import Rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="files that ssmkernels bench wrote")
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent / "results"
    for path in options.results or sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        results = [Result.from_json(value) for value in document["results"]]
        print(path.name, *plots.plot(results, path, Rates(**document["rates"]), plots.measured_on(document)))


if __name__ == "__main__":
    main()

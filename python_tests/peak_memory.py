# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory of a statement, in a process of its own: the peak of this one may be of a test that ran before."""

import subprocess
import sys

MEASURE = """
import resource
{setup}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{statement}
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), {figure})
"""


def peak_bytes(setup: str, statement: str, figure: str = "0") -> tuple[int, int]:
    """By how much the peak of resident memory grows while ``statement`` runs, after ``setup``; and the ``figure`` that
    the code computes. The setup should have run the statement once at a small size.
    """
    code = MEASURE.format(setup=setup, statement=statement, figure=figure)
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    grown, value = output.split()
    return int(grown), int(value)

# SPDX-License-Identifier: BSD-3-Clause
"""Runs steps one after the other, each in its time box, and keeps a table of them that is right after every step."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.gpu.files import write_atomically
from bench.gpu.rows import FAILED
from bench.gpu.steps import ROOT, Step

GRACE = 5.0  # seconds of a time box that are left to a command which is asked to stop: pytest then prints what it has
RESTARTS = 20  # of one step, where a row took the process down
SITE = ROOT / "build" / "gpu-site"  # packages that the machine lacks and the bundle brought
PASSED = "passed"


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str
    """``passed``, or what happened."""
    seconds: float
    file: str
    last_line: str


def run(steps: Sequence[Step], out: Path, *, dry_run: bool = False, again: bool = False) -> list[Outcome]:
    """Every step, whatever became of those before it; unless ``again``, not those that passed before in this folder."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes = {outcome.name: outcome for outcome in read(out)}
    for step in steps:
        if step.name in outcomes and outcomes[step.name].result == PASSED and not again:
            continue
        print(f"== {step.name} (at most {step.seconds} s)", flush=True)
        outcomes[step.name] = outcome = run_step(step, out, step.stand_in if dry_run else step.command)
        write(list(outcomes.values()), out)
        print(f"   {outcome.result}, {outcome.seconds:.0f} s: {outcome.last_line}", flush=True)
    return list(outcomes.values())


def run_step(step: Step, out: Path, command: Sequence[str]) -> Outcome:
    """One step. A step of rows whose process died is started again behind the row that it died of."""
    begin, log, result = time.monotonic(), out / f"{step.name}.log", out / step.result
    result.unlink(missing_ok=True)
    command = [part.replace("{out}", str(out)) for part in command]
    with log.open("wb") as output:
        for _ in range(RESTARTS):
            before = _content(result)
            verdict = _run_command(command, output, begin + step.seconds)
            ended = verdict in (PASSED, f"exit {FAILED}", "timed out")
            if not step.has_rows or ended or _content(result) == before:
                break
    lines = log.read_text(errors="replace").strip().splitlines()
    last_line = lines[-1].strip()[:160] if lines else ""
    return Outcome(step.name, verdict, round(time.monotonic() - begin, 1), step.result, last_line)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _run_command(command: Sequence[str], output: object, deadline: float) -> str:
    """Runs a command with all its children until the deadline."""
    paths = [str(ROOT), str(SITE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    environment["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    try:
        process = subprocess.Popen(  # type: ignore[call-overload]
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return f"did not start: {error.strerror}"
    try:
        code = process.wait(max(0.0, deadline - GRACE - time.monotonic()))
    except subprocess.TimeoutExpired:
        _signal(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        return "timed out"
    finally:
        _signal(process.pid, signal.SIGKILL)  # what it left running too
        process.wait()
    return PASSED if code == 0 else f"signal {-code}" if code < 0 else f"exit {code}"


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def read(out: Path) -> list[Outcome]:
    try:
        return [Outcome(**entry) for entry in json.loads((out / "summary.json").read_text())]
    except FileNotFoundError:
        return []


def write(outcomes: Sequence[Outcome], out: Path) -> None:
    """summary.json, from which a later call goes on, and summary.md."""
    write_atomically(out / "summary.json", json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    write_atomically(out / "summary.md", table(outcomes) + "\n")


def table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| step | result | seconds | file | last line |", "|---|---|---:|---|---|"]
    for outcome in outcomes:
        last = outcome.last_line.replace("|", "/")
        lines.append(f"| {outcome.name} | {outcome.result} | {outcome.seconds:.0f} | {outcome.file} | {last} |")
    return "\n".join(lines)

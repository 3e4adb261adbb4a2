# SPDX-License-Identifier: BSD-3-Clause
"""``make gpu`` without a GPU: every step's code, and what becomes of a step that fails, hangs or dies."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CASES

from ssmkernels import ops
from ssmkernels.bench import ranking

MODULES = (
    "bundle",
    "build",
    "counters",
    "device",
    "gradients",
    "main_sizes",
    "peers",
    "rows",
    "runner",
    "sanitizers",
    "smoke",
    "speed",
    "steps",
)
STEP_NAMES = ("build", "info", "smoke", "tests", "speed", "peers", "sanitizers", "counters", "large", "gradients")
NOT_THERE = ("faiss", "jsonargparse", "lightning_fabric", "mlxtend", "pytorch_metric_learning")


@pytest.fixture
def gpu(source_tree, monkeypatch):
    monkeypatch.syspath_prepend(str(source_tree))
    return SimpleNamespace(**{name: importlib.import_module(f"bench.gpu.{name}") for name in MODULES})


def replaced(steps, name, *command, seconds=60):
    """All steps as ``true``, and one of them as a command."""
    quick = [dataclasses.replace(step, command=("true",), seconds=60) for step in steps]
    changed = {"command": command, "seconds": seconds}
    return [dataclasses.replace(step, **changed) if step.name == name else step for step in quick]


def by_name(outcomes):
    return {outcome.name: outcome.result for outcome in outcomes}


def test_time_boxes_fit(gpu):
    assert tuple(step.name for step in gpu.steps.STEPS) == STEP_NAMES
    assert sum(step.seconds for step in gpu.steps.STEPS) <= gpu.steps.TOTAL_SECONDS == 540
    assert len({step.result for step in gpu.steps.STEPS}) == len(STEP_NAMES)


def test_what_the_steps_name_is_there(gpu, source_tree):
    for step in gpu.steps.STEPS:
        for part in step.command:
            named = part.removeprefix("--ignore=")
            assert not named.startswith("python_tests") or (source_tree / named).exists()
            assert not part.startswith("bench.gpu.") or (source_tree / (part.replace(".", "/") + ".py")).is_file()


@pytest.mark.parametrize("name", STEP_NAMES)
def test_a_step_that_fails_stops_none(gpu, tmp_path, name):
    steps = replaced(gpu.steps.STEPS, name, "sh", "-c", "echo before; echo what is wrong; exit 7")
    outcomes = gpu.runner.run(steps, tmp_path)
    assert by_name(outcomes) == dict.fromkeys(STEP_NAMES, "passed") | {name: "exit 7"}
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert len(lines) == 2 + len(STEP_NAMES)
    pattern = rf"\| {name} \| exit 7 \| \d+ \| {name}\.(json|log) \| what is wrong \|"
    assert re.fullmatch(pattern, lines[2 + STEP_NAMES.index(name)])


def ends(status):
    """Whether a process that was killed goes; the signal may still be on its way."""
    for _ in range(1000):
        try:
            if "State:\tZ" in status.read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("stubborn", [False, True], ids=["told to stop", "killed"])
@pytest.mark.parametrize("name", STEP_NAMES)
def test_a_step_that_hangs_is_ended_with_its_children(gpu, tmp_path, monkeypatch, name, stubborn):
    monkeypatch.setattr(gpu.runner, "GRACE", 0.2)
    script = ("trap '' INT; " if stubborn else "") + f"sleep 600 & echo $! >{tmp_path}/child; wait; wait"
    outcomes = gpu.runner.run(replaced(gpu.steps.STEPS, name, "sh", "-c", script, seconds=0.5), tmp_path)
    assert by_name(outcomes) == dict.fromkeys(STEP_NAMES, "passed") | {name: "timed out"}
    assert ends(Path("/proc", (tmp_path / "child").read_text().strip(), "status"))


def test_a_program_that_is_not_there(gpu, tmp_path):
    outcomes = gpu.runner.run(replaced(gpu.steps.STEPS, "info", "no-such-program"), tmp_path)
    assert by_name(outcomes)["info"] == "did not start: No such file or directory"


@pytest.mark.parametrize("name", STEP_NAMES)
def test_the_table_is_there_while_a_step_runs(gpu, tmp_path, name):
    """So that a call that is cut off leaves it, with all steps before."""
    script = f"cp {tmp_path}/summary.md {tmp_path}/seen; true"
    gpu.runner.run(replaced(gpu.steps.STEPS, name, "sh", "-c", script), tmp_path)
    seen = tmp_path / "seen"
    assert len(seen.read_text().splitlines()) - 2 == STEP_NAMES.index(name) if seen.exists() else name == STEP_NAMES[0]


def test_a_second_call_runs_what_has_not_passed(gpu, tmp_path):
    steps = replaced(gpu.steps.STEPS, "smoke", "false")
    gpu.runner.run(steps, tmp_path)
    count = [dataclasses.replace(step, command=("sh", "-c", f"echo {step.name} >>{tmp_path}/ran")) for step in steps]
    assert set(by_name(gpu.runner.run(count, tmp_path)).values()) == {"passed"}
    assert (tmp_path / "ran").read_text().split() == ["smoke"]
    gpu.runner.run(count[:1], tmp_path, again=True)
    assert (tmp_path / "ran").read_text().split() == ["smoke", "build"]


ROWS = """
import os, pathlib, sys, time
from bench.gpu.rows import Rows
rows = Rows(pathlib.Path(sys.argv[1]), seconds=0.5)
rows.run("first", lambda: {"value": 1})
rows.run("second", SECOND)
rows.run("third", lambda: {"value": 3})
sys.exit(rows.finish())
"""


@pytest.mark.parametrize(
    "second",
    ["os.abort", "lambda: time.sleep(600)", "lambda: os._exit(75)"],
    ids=["dies", "hangs", "context lost"],
)
def test_rows_go_on_behind_one_that_takes_the_process_down(gpu, tmp_path, second):
    (step,) = (step for step in gpu.steps.STEPS if step.name == "smoke")
    command = [sys.executable, "-c", ROWS.replace("SECOND", second), "{out}/smoke.json"]
    outcome = gpu.runner.run_step(step, tmp_path, command)
    rows = json.loads((tmp_path / "smoke.json").read_text())
    assert outcome.result == "exit 3" and outcome.last_line == "2 of 3 rows passed; failed: second"
    assert rows["first"] == {"state": "passed", "value": 1} and rows["third"] == {"state": "passed", "value": 3}
    assert rows["second"] == {"state": "failed", "error": "the process died"}


def test_what_other_rows_need_is_made_again_unless_it_failed(gpu, tmp_path):
    made = []
    for _ in range(2):
        rows = gpu.rows.Rows(tmp_path / "rows.json", 10)
        assert rows.prepare("inputs", lambda: made.append(1) or 5) == 5
        assert rows.prepare("others", lambda: made.append(2) or 1 / 0) is None
    assert made == [1, 2, 1]
    assert rows.rows["others"]["state"] == "failed" and rows.finish() == gpu.rows.FAILED


# The code of every step, with the CPU in the place of the device and few cases.


@pytest.fixture
def few(gpu, monkeypatch):
    cases = {name: CASES[name] for name in ("aggregate", "unfold", "laplacian_solve")}
    families = {name: gpu.main_sizes.FAMILIES[name] for name in ("memory", "graph")}
    for module in (gpu.smoke, gpu.gradients):
        monkeypatch.setattr(module, "CASES", cases)
    for module in (gpu.main_sizes, gpu.counters):
        monkeypatch.setattr(module, "FAMILIES", families)
    for module in (gpu.speed, gpu.peers):
        monkeypatch.setattr(module, "DTYPES", (torch.float32,))
    return gpu


def dry_run(module, path):
    code = module.main(["--out", str(path), "--device", "cpu"])
    return code, json.loads(path.read_text())


@pytest.mark.parametrize("name", ["info", "large"])
def test_dry_run_of_a_command(gpu, tmp_path, name):
    (step,) = (step for step in gpu.steps.STEPS if step.name == name)
    (outcome,) = gpu.runner.run([dataclasses.replace(step, seconds=300)], tmp_path, dry_run=True)
    text = (tmp_path / step.result).read_text()
    assert outcome.result in ("passed", "exit 1")  # of `info`, where there are problems
    if name == "info":
        assert json.loads(text)["ssmkernels"]
    else:
        assert outcome.result == "passed" and "test_past_2_31.py" in text


def test_dry_run_of_build(gpu, tmp_path):
    code, rows = dry_run(gpu.build, tmp_path / "rows.json")
    assert code == 0 and rows["library"]["loads"]


def test_dry_run_of_smoke(few, tmp_path):
    code, rows = dry_run(few.smoke, tmp_path / "rows.json")
    assert code == 0 and len(rows) == 4 * 5
    assert all(0 <= row["share_of_bound"] <= 1 for row in rows.values())


def test_smoke_names_what_is_wrong(few, tmp_path, monkeypatch):
    right = ops.aggregate
    monkeypatch.setattr(ops, "aggregate", lambda *args, **options: 1.1 * right(*args, **options))
    monkeypatch.setattr(ops, "unfold", lambda *args, **options: 1 / 0)
    code, rows = dry_run(few.smoke, tmp_path / "rows.json")
    failed = {label for label, row in rows.items() if row["state"] == "failed"}
    assert code == few.rows.FAILED
    assert {label.split()[0] for label in failed} == {"aggregate", "unfold"} and len(failed) == 8 + 4
    assert rows["aggregate float32 forward"]["share_of_bound"] > 1
    assert rows["unfold float64 forward"]["error"].startswith("ZeroDivisionError")


def test_dry_run_of_speed(few, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "unfold", lambda *args, **options: 1 / 0)
    code, rows = dry_run(few.speed, tmp_path / "rows.json")
    assert code == few.rows.FAILED and {"copy", "matmul"} <= set(rows["rates"])
    failed = {label.split()[0] for label, row in rows.items() if row["state"] == "failed"}
    timed = {label.split()[0] for label, row in rows.items() if row.get("cold", 0) > 0}
    assert failed == {"unfold"} and {"instance_matching", "aggregate", "leave_one_edge_out", "laplacian_solve"} <= timed


@pytest.mark.long
def test_dry_run_of_peers(few, tmp_path):
    code, rows = dry_run(few.peers, tmp_path / "rows.json")
    peers = [(label.split()[0], label.split(": ")[-1]) for label in rows if ": " in label]
    assert code == 0
    assert [op for op, peer in peers if peer == "torch.compile"] == ["instance_matching", "leave_one_edge_out"]
    assert ("instance_matching", "official") in peers


def test_every_family_is_measured(gpu):
    built = {case.op for build in gpu.main_sizes.FAMILIES.values() for case in build("cpu", torch.float32)}
    assert built >= {
        "instance_matching",
        "aggregate",
        "unfold",
        "memory_update_",
        "pair_focal_loss",
        "pair_ranking_loss",
    }
    assert built >= {"mined_pair_ranking_loss", "similarity_moments", "leave_one_edge_out", "laplacian_solve"}


def test_cold_time_is_what_a_call_adds_to_the_reads(gpu):
    class Fake:
        rounds = 3

        def __init__(self):
            self.clock, self.cold = 0.0, True

        def capture(self, function, calls=1):
            return lambda: [function() for _ in range(calls)]

        def seconds(self, function):
            before = self.clock
            function()
            return self.clock - before

        def empty_l2(self):
            self.clock += 2.0**-10
            self.cold = True

        def op(self):
            self.clock += 2.0**-12 if self.cold else 2.0**-13
            self.cold = False

    device = Fake()
    device.op()  # what cold memory it meets is behind it
    times = gpu.device.time_call(device, device.op)
    assert times == gpu.device.CallTime(warm=2.0**-13, cold=2.0**-12)


def test_the_device_tests_are_compiled_for_the_device(gpu, tmp_path, monkeypatch, source_tree):
    (tmp_path / "cmake").write_text(f"#!/bin/sh\necho $@ >>{tmp_path}/calls\n")
    (tmp_path / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gpu.build.device_tests("90")
    configure, build = (tmp_path / "calls").read_text().splitlines()
    assert configure == "--preset device-tests -DCMAKE_CUDA_ARCHITECTURES=90-real"
    assert build.startswith("--build --preset device-tests --parallel ")
    presets = json.loads((source_tree / "CMakePresets.json").read_text())
    for kind in ("configurePresets", "buildPresets"):
        assert "device-tests" in {preset["name"] for preset in presets[kind]}


def test_dry_run_of_sanitizers(gpu, tmp_path, monkeypatch):
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, body in {
        "test_memory": "exit 0",
        "compute-sanitizer": 'echo "$@"; [ "$2" != racecheck ] || exit 9',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(gpu.sanitizers, "programs", lambda: [folder / "test_memory"])
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert dry_run(gpu.sanitizers, tmp_path / "dry.json")[0] == 0
    path = tmp_path / "rows.json"
    assert gpu.sanitizers.main(["--out", str(path), "--device", "cuda"]) == gpu.rows.FAILED
    rows = json.loads(path.read_text())
    states = {label.removesuffix(" test_memory"): row["state"] for label, row in rows.items()}
    passed = dict.fromkeys(("memcheck", "synccheck", "initcheck"), "passed")
    assert states == passed | {"racecheck": "failed"}
    assert "--tool memcheck" in rows["memcheck test_memory"]["report"]


def test_missing_device_tests_are_named(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.sanitizers, "FOLDER", gpu.steps.ROOT / "build" / "no-device-tests")
    code, rows = dry_run(gpu.sanitizers, tmp_path / "rows.json")
    message = "the C++ tests for a device are missing: no test_* in build/no-device-tests"
    assert code == gpu.rows.FAILED and message in rows["programs"]["error"]


def test_dry_run_of_counters(few, tmp_path):
    code, rows = dry_run(few.counters, tmp_path / "rows.json")
    assert code == 0 and list(rows) == ["calls"]
    assert few.counters.main(["--out", str(tmp_path / "rows.json"), "--device", "cpu", "--calls"]) == 0


NCU = """#!/bin/sh
if [ "$1" = --query-metrics ]; then
  printf 'gpu__time_duration  Duration\\ndram__throughput  Share\\nsmsp__issue_active  Cycles\\n'
  exit
fi
while [ "$1" != --log-file ]; do shift; done
cat >"$2" <<'END'
==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed"
"","","ns","%"
"0","void ssmkernels::sweep<float, (int)32>(Args)","1,234.5","50.25"
END
"""


def test_counters_are_read(gpu, tmp_path, monkeypatch):
    (tmp_path / "ncu").write_text(NCU)
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "rows.json"
    assert gpu.counters.main(["--out", str(path), "--device", "cuda"]) == 0
    row = json.loads(path.read_text())["launches"]
    (launch,) = row["launches"]
    kernel = "void ssmkernels::sweep<float, (int)32>(Args)"
    assert launch == {"kernel": kernel, "nanoseconds": 1234.5, "memory %": 50.25, "issue %": None}
    assert row["missing"] == ["L2 %", "tensor %", "tensor instructions %"]
    assert row["kernels without launch"] == [kernel for kernel in gpu.counters.KERNELS if kernel != "sweep"]


def test_the_counted_kernels_are_there(gpu, source_tree):
    text = "".join(path.read_text() for path in (source_tree / "csrc/kernels").rglob("*.cu*"))
    launched = r"__global__\s+void\s+(?:__launch_bounds__\([^()]*\)\s*)?(\w+)\("
    kernels = set(re.findall(launched, re.sub(r"//.*", "", text)))
    assert len(gpu.counters.KERNELS) == 7 and set(gpu.counters.KERNELS) <= kernels


def test_dry_run_of_gradients(few, tmp_path):
    code, rows = dry_run(few.gradients, tmp_path / "rows.json")
    assert code == 0 and {"aggregate", "laplacian_solve"} <= {label.split()[0] for label in rows}


# The bundle.


@pytest.fixture
def sources(tmp_path):
    root = tmp_path / "root"
    for name in (
        "CMakeLists.txt",
        "setup.py",
        "ssmkernels/__init__.py",
        "csrc/torch/module.cpp",
        "csrc/kernels/tests/test_memory.cpp",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_a_bundle_is_of_its_sources(gpu, sources, tmp_path):
    bundle = tmp_path / "bundle"
    assert gpu.bundle.problem(bundle, sources) == "there is no bundle"
    (bundle / "ssmkernels").mkdir(parents=True)
    gpu.bundle.seal(bundle, sources)
    assert gpu.bundle.problem(bundle, sources).startswith("the bundle has no _C.")
    (bundle / "ssmkernels" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_text("")
    assert gpu.bundle.problem(bundle, sources) is None
    (sources / "csrc/kernels/tests/test_memory.cpp").write_text("no part of the library")
    assert gpu.bundle.problem(bundle, sources) is None
    (sources / "csrc/torch/module.cpp").write_text("changed")
    assert gpu.bundle.problem(bundle, sources) == "the bundle was made from other sources"


def test_a_bundle_that_is_too_large(gpu, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.bundle, "LARGEST", 10)
    with pytest.raises(SystemExit, match="and should have at most 0"):
        gpu.bundle.seal(tmp_path, sources)


@pytest.mark.parametrize(("loads", "origin"), [("pass", "the bundle"), ("raise ImportError('wrong torch')", "a build")])
def test_the_library_is_taken_where_it_loads(gpu, tmp_path, monkeypatch, loads, origin):
    bundle, package = tmp_path / "bundle", tmp_path / "ssmkernels"
    (bundle / "ssmkernels").mkdir(parents=True)
    package.mkdir()
    (bundle / "ssmkernels" / "_C.so").write_text("the library")
    monkeypatch.setattr(gpu.bundle, "problem", lambda _: None)
    monkeypatch.setattr(gpu.build, "LOADS", (sys.executable, "-c", loads))
    built = []
    row = gpu.build.library(bundle, package, lambda: built.append(1))
    assert row["from"] == origin and built == ([] if origin == "the bundle" else [1])
    assert (package / "_C.so").read_text() == "the library"
    assert origin == "the bundle" or row["because"] == "the bundle's library does not load: ImportError: wrong torch"


def test_only_lacking_packages_are_installed(gpu, tmp_path):
    for name in ("torch-9.9-py3-none-any.whl", "no_such_package-1.0-py3-none-any.whl"):
        (tmp_path / name).write_text("")
    assert [wheel.name for wheel in gpu.build.lacking(tmp_path)] == ["no_such_package-1.0-py3-none-any.whl"]


# What a GPU machine may lack.

WITHOUT = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_THERE!r}))
"""


@pytest.mark.long
def test_nothing_that_make_gpu_calls_needs_what_is_missing(source_tree):
    packages = [source_tree / "ssmkernels" / name for name in ("ops", "nn", "graph", "bench", "reference")]
    files = [path.relative_to(source_tree) for package in packages for path in sorted(package.glob("*.py"))]
    files.remove(Path("ssmkernels/bench/training.py"))  # of trainers, which `make gpu` does not measure
    modules = [".".join(path.with_suffix("").parts) for path in files]
    code = WITHOUT + "".join(f"import {name.removesuffix('.__init__')}\n" for name in modules)
    code += "from bench.gpu import build, counters, gradients, peers, sanitizers, smoke, speed, __main__\n"
    code += "smoke.CASES = {'aggregate': smoke.CASES['aggregate']}\n"
    code += "import pathlib, tempfile\nfolder = tempfile.mkdtemp()\n"
    code += "assert smoke.main(['--out', folder + '/rows.json', '--device', 'cpu']) == 0\n"
    code += "import pytest\n"
    folders = [f"python_tests/{name}" for name in ("ops", "nn", "graph")]
    code += f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '--collect-only', '-m', 'gpu', *{folders!r}]))\n"
    environment = os.environ | {"PYTHONPATH": str(source_tree)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=source_tree, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def test_a_missing_peer_is_left_out(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "pytorch_metric_learning":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    case = ranking.loss_case(8, 4, 0.5, "forward + backward", "cpu", torch.float32)
    assert set(case.peers) == {"eager", "torch.compile"}

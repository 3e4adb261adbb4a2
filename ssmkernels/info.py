# SPDX-License-Identifier: BSD-3-Clause
"""``ssmkernels info``: what was built, what machine this is, and what is wrong, with the command that fixes it.

Needs the standard library only, and works where torch or the compiled library is missing or broken: unless they are
loaded already, they are asked in a process of their own, so that even a crash of theirs is but a line of the report.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ssmkernels import __version__

PACKAGE = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
ENVIRONMENT = ("SSMKERNELS_ISA", "SSMKERNELS_CHECK", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")
VECTORS = {"amx_tile": "amx", "avx512f": "avx512", "avx2": "avx2"}
"""Flags of a processor, the best first, and what they are called in its kind."""

Report = dict[str, Any]

_MARK = "ssmkernels-probe:"  # before the answer of a process, whatever else its imports print


def collect() -> Report:
    """Everything that ``ssmkernels info`` says, as JSON types; ``problems`` has entries of ``problem`` and ``fix``."""
    report: Report = {
        "ssmkernels": {"version": __version__, "location": str(PACKAGE)},
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "packages": {name: _installed(name) for name in ("torch", "torchvision", "numpy")},
        "torch": _answer("torch", torch_here) if importlib.util.find_spec("torch") else None,
        "library": _answer("ssmkernels._C", library_here) if importlib.util.find_spec("ssmkernels._C") else None,
        "build": _build_info(),
        "cpu": {"model": _cpu_model(), "kind": cpu_kind(), "processors": os.cpu_count(), "flags": _cpu_flags()},
        "cuda": {"nvcc": _nvcc_version(), "driver": _driver_version(), "devices": _nvidia_devices()},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }
    report["problems"] = [{"problem": problem, "fix": fix} for problem, fix in _problems(report)]
    return report


def covers(architectures: Iterable[str], capability: Sequence[int]) -> bool:
    """Whether a build for ``architectures`` (CMake's words: "80-real", "90-virtual", "90") has code for a device of
    ``capability``.

    Machine code runs on devices of its major version and at least its minor one; PTX on everything not older; neither,
    where the name ends in a, on anything but that very device.
    """
    device = capability[0] * 10 + capability[1]
    for architecture in architectures:
        name, _, kind = architecture.partition("-")
        number = int(name.rstrip("af"))
        if device == number:
            return True
        if name[-1] == "a" or device < number:
            continue
        if (kind != "virtual" and device // 10 == number // 10) or (kind != "real" and name.isdigit()):
            return True
    return False


def install_command(environment: str = "") -> str:
    """The command that builds and installs this package again, from where it came."""
    root = PACKAGE.parent
    prefix = f"{environment} " if environment else ""
    if (root / "CMakeLists.txt").is_file():
        return f"cd {root} && {prefix}{_pip()} install --no-build-isolation -e ."
    return f"{prefix}{_pip()} install --force-reinstall --no-deps --no-build-isolation {_origin()}"


def describe_build(report: Report) -> str:
    build = report["build"]
    if build is None:
        return "nothing"
    cuda = f"CUDA {build['cuda']} for {_architectures(build)}" if build["cuda"] else "CPU only"
    return f"{build['version']}, {cuda}, Python {build['python']}, torch {build['torch']}"


def describe_machine(report: Report) -> str:
    torch = report["torch"]
    torch_version = (
        "no torch"
        if torch is None
        else "a torch that does not import"
        if "error" in torch
        else f"torch {torch['version']}"
    )
    devices = ", ".join(_device_name(device) for device in _devices(report)) or "no CUDA device"
    return f"{__version__}, Python {report['python']['version']}, {torch_version}, {devices}"


@functools.cache
def machine_in_words() -> str:
    """The processors and devices here."""
    here = collect()
    devices = (here["torch"] or {}).get("devices") or here["cuda"]["devices"]
    names = [device["name"] for device in devices]
    gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{os.cpu_count()} x {here['cpu']['model']}, {gpus or 'no GPU'}"


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of this package and of those of the packages ``names`` that are installed."""
    installed = {name: _installed(name) for name in names}
    return {"ssmkernels": __version__} | {name: version for name, version in installed.items() if version is not None}


def format_report(report: Report) -> str:
    """The report as aligned plain text."""
    blocks = []
    for title, rows in _sections(report):
        width = max(len(name) for name, _ in rows)
        blocks.append("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]))
    problems = [
        line for entry in report["problems"] for line in (f"  - {entry['problem']}", f"    fix: {entry['fix']}")
    ]
    blocks.append("\n".join(["problems", *(problems or ["  none"])]))
    return "\n\n".join(blocks)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; 1 where there are problems, 0 otherwise."""
    parser = argparse.ArgumentParser(
        prog="ssmkernels info", description="What was built, what machine this is, and what is wrong."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--cmakedir", action="store_true", help="print the folder for ssmkernels_DIR, which CMake's find_package reads"
    )
    arguments = parser.parse_args(argv)
    if arguments.cmakedir:
        return _print_cmake_folder()
    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else format_report(report))
    return 1 if report["problems"] else 0


def _print_cmake_folder() -> int:
    folder = PACKAGE / "cpp" / "cmake"
    if folder.is_dir():
        print(folder)
        return 0
    print(f"ssmkernels info: the kernels for C++ are not there; {install_command()}", file=sys.stderr)
    return 1


def _sections(report: Report) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    python, cpu, cuda = report["python"], report["cpu"], report["cuda"]
    torch, library, build = report["torch"] or {}, report["library"] or {}, report["build"]
    versions = [
        ("ssmkernels", f"{__version__} ({report['ssmkernels']['location']})"),
        ("python", f"{python['version']} ({python['executable']})"),
        ("platform", python["platform"]),
        *((name, version or "not installed") for name, version in report["packages"].items()),
        ("nvcc", cuda["nvcc"] or "not found"),
    ]
    yield "versions", versions
    built = [("library", library.get("file") or library.get("error") or "not built")]
    if build:
        built += [
            (
                "built from",
                f"{build['version']} with Python {build['python']}, torch {build['torch']}, {build['compiler']}",
            ),
            ("CUDA", f"{build['cuda']} for {_architectures(build)}" if build["cuda"] else "none: CPU only"),
            ("instruction sets", ", ".join(build["instruction_sets"])),
        ]
    yield "build", built
    processor = [
        ("model", f"{cpu['model']} ({cpu['kind']}), {cpu['processors']} processors"),
        ("flags", " ".join(cpu["flags"]) or "unknown"),
        ("chosen", library.get("instruction_set", "unknown")),
        ("torch threads", str(torch.get("threads", "unknown"))),
    ]
    yield "processor", processor
    driver = f"runs CUDA up to {cuda['driver'][0]}.{cuda['driver'][1]}" if cuda["driver"] else "none"
    devices = "; ".join(_device_name(device) for device in _devices(report)) or "none"
    yield "CUDA", [("driver", driver), ("torch", _torch_cuda(report["torch"])), ("devices", devices)]
    if report["environment"]:
        yield "environment", sorted(report["environment"].items())


def _torch_cuda(torch: Report | None) -> str:
    if torch is None:
        return "no torch"
    if "error" in torch:
        return f"does not import: {torch['error']}"
    return f"built for CUDA {torch['cuda']}" if torch["cuda"] else "built without CUDA"


def _problems(report: Report) -> Iterable[tuple[str, str]]:
    torch, library, build, devices = report["torch"], report["library"], report["build"], _devices(report)
    floor = ".".join(map(str, MINIMUM_TORCH))
    if torch is None:
        yield "torch is not installed", f"{_pip()} install torch"
    elif "error" in torch:
        yield f"torch does not import: {torch['error']}", f"{_pip()} install --force-reinstall torch"
    elif _release(torch["version"]) < MINIMUM_TORCH:
        yield f"torch {torch['version']} is older than {floor}", f'{_pip()} install --upgrade "torch>={floor}"'
    elif library is None:
        yield _missing_library(), install_command()
    elif "error" in library:
        yield f"the compiled library does not load: {library['error']}", install_command()
    elif build and build["version"] != __version__:
        yield (
            f"the compiled library is of version {build['version']}, the Python files of {__version__}",
            install_command(),
        )
    yield from _cuda_problems(report, build, torch, devices)
    wanted = report["environment"].get("SSMKERNELS_ISA")
    if wanted and library and wanted not in library.get("available", [wanted]):
        yield (
            f"SSMKERNELS_ISA is {wanted!r}, and this processor runs {', '.join(library['available'])}",
            "unset SSMKERNELS_ISA",
        )


def _cuda_problems(
    report: Report, build: Report | None, torch: Report | None, devices: list[Report]
) -> Iterable[tuple[str, str]]:
    if not devices or not torch or "error" in torch:
        return
    if torch["cuda"] and not torch["cuda_available"] and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        problem = f"torch {torch['version']} is built for CUDA {torch['cuda']} and cannot use {devices[0]['name']}"
        yield (
            problem,
            (
                "nvidia-smi   # a driver older than that CUDA is the usual cause: install a newer one, or a torch for"
                " an older CUDA"
            ),
        )
    if build is None or not torch["cuda_available"]:
        return
    if build["cuda"] is None:
        yield (
            f"there is {devices[0]['name']}, but the compiled library was built without CUDA",
            install_command("FORCE_CUDA=1"),
        )
        return
    for device in devices:
        if not covers(build["cuda_architectures"], device["capability"]):
            problem = (
                f"the compiled library has no code for {_device_name(device)}: it was built for {_architectures(build)}"
            )
            major, minor = device["capability"]
            newer = install_command(f'TORCH_CUDA_ARCH_LIST="{major}.{minor}"')
            yield problem, newer if major >= 8 else "use the CPU: the CUDA kernels need compute capability 8.0 or newer"
    driver = report["cuda"]["driver"]
    if driver and driver[0] < int(build["cuda"].split(".")[0]):
        problem = (
            f"the driver runs CUDA {driver[0]}.{driver[1]}, and the compiled library was built with {build['cuda']}"
        )
        yield (
            problem,
            install_command(f"CUDA_HOME=/usr/local/cuda-{driver[0]}.{driver[1]}") + "   # or install a newer driver",
        )


def _missing_library() -> str:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    others = sorted(path.name for path in PACKAGE.glob("_C.*.so"))
    return f"the compiled library _C{suffix} is not there" + (f", only {', '.join(others)}" if others else "")


def _build_info() -> Report | None:
    try:
        build: Report = json.loads((PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None
    return build


def torch_here() -> Report:
    """What torch says of itself, its devices and its threads."""
    import torch

    cuda = torch.cuda.is_available()
    devices = [
        {"name": torch.cuda.get_device_name(i), "capability": list(torch.cuda.get_device_capability(i))}
        for i in range(torch.cuda.device_count() if cuda else 0)
    ]
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cuda_available": cuda,
        "devices": devices,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def library_here() -> Report:
    """What the compiled library says of itself."""
    import importlib

    import torch  # noqa: F401  the library needs it loaded

    library = importlib.import_module("ssmkernels._C")
    return {
        "build": library.build_info(),
        "file": library.__file__,
        "instruction_set": library.current_isa(),
        "available": library.available_isas(),
    }


def _answer(module: str, question: Callable[[], Report]) -> Report:
    """``question()``, which stands on its own, here if ``module`` is loaded, and else in another process."""
    if module in sys.modules:
        return question()
    source, name = inspect.getsource(question), getattr(question, "__name__", "")
    code = f"from __future__ import annotations\nimport json\n{source}\nprint({_MARK!r} + json.dumps({name}()))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-c", code]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    for line in result.stdout.splitlines():
        if line.startswith(_MARK):
            answer: Report = json.loads(line[len(_MARK) :])
            return answer
    if result.returncode < 0:
        return {"error": f"the process died of signal {-result.returncode}"}
    lines = result.stderr.strip().splitlines()
    return {"error": lines[-1] if lines else f"exit status {result.returncode}"}


def _devices(report: Report) -> list[Report]:
    torch = report["torch"] or {}
    devices: list[Report] = torch.get("devices") or report["cuda"]["devices"]
    return devices


def _device_name(device: Report) -> str:
    return f"{device['name']} ({device['capability'][0]}.{device['capability'][1]})"


def _architectures(build: Report) -> str:
    names = []
    for architecture in build["cuda_architectures"]:
        number, _, kind = architecture.partition("-")
        names.append(f"{'PTX' if kind == 'virtual' else 'sm'}_{number}" if kind else f"sm_{number}+PTX")
    return " ".join(names)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _origin() -> str:
    """Where pip installed this package from: a checkout or a wheel that is still there, or else the package's name."""
    try:
        text = importlib.metadata.distribution("ssmkernels").read_text("direct_url.json")
        url = json.loads(text or "{}").get("url", "")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        url = ""
    path = url.removeprefix("file://")
    return path if path != url and Path(path).exists() else "ssmkernels"


def _pip() -> str:
    return f"{sys.executable} -m pip"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _cpu_field(name: str) -> str:
    try:
        match = re.search(rf"^{name}\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return match[1] if match else ""


def _cpu_model() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def cpu_kind() -> str:
    """Maker and widest vectors of the processor, such as "amd-avx512": what kernels' times are compared within."""
    makers = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
    present = set(_cpu_field("flags").split())
    widest = [name for flag, name in VECTORS.items() if flag in present]
    return "-".join([makers.get(_cpu_field("vendor_id"), platform.machine().lower()), *widest[:1]])


def _cpu_flags() -> list[str]:
    wanted = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile")
    present = set(_cpu_field("flags").split())
    return [flag for flag in wanted if flag in present]


def _nvcc_version() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [os.path.join(home, "bin") for home in homes if home] + [
        os.environ.get("PATH", os.defpath),
        "/usr/local/cuda/bin",
    ]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        return None
    release = re.search(r"release ([\d.]+)", _output([nvcc, "--version"]))
    return f"{release[1]} ({nvcc})" if release else None


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, (major, minor)."""
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            return version.value // 1000, version.value % 1000 // 10
    except (OSError, AttributeError):
        pass
    return None


def _nvidia_devices() -> list[Report]:
    devices = []
    for line in _output(["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]).splitlines():
        name, _, capability = line.rpartition(", ")
        if re.fullmatch(r"\d+\.\d+", capability):
            devices.append({"name": name, "capability": [int(number) for number in capability.split(".")]})
    return devices


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    sys.exit(main())

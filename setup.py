# SPDX-License-Identifier: BSD-3-Clause
"""Thin driver of CMake, which holds the list of sources. The rest of the packaging is in pyproject.toml.

Environment: MAX_JOBS, CUDA_HOME (or CUDA_PATH), FORCE_CUDA (1: fail without nvcc, 0: CPU only), TORCH_CUDA_ARCH_LIST,
CMAKE_ARGS (more options of CMake, such as -DSSM_AVX512_LANES=ON).
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNELS_FOLDER = ROOT / "build" / "kernels"  # as in CMakePresets.json
MINIMUM_TORCH = (2, 11)
MINIMUM_CUDA = (12, 0)  # the first nvcc that compiles C++20
INSTALL = "pip install --no-build-isolation ."

DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # those that nvcc knows, and PTX of the newest
ARCHITECTURE_NAMES = {"ampere": ("8.0", "8.6"), "ada": ("8.9",), "hopper": ("9.0",), "blackwell": ("10.0", "12.0")}
GIB_PER_JOB = 2  # what the largest compilation takes


class BuildError(Exception):
    """What is wrong, and the command that fixes it."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"\n\nssmkernels cannot be built: {problem}.\nTo fix it:\n\n    {fix}\n")


def max_jobs(environment: Mapping[str, str]) -> int:
    """MAX_JOBS, or as many compilers as there are processors for this process and GiB of available memory."""
    if wanted := environment.get("MAX_JOBS"):
        if not wanted.isdigit() or int(wanted) == 0:
            raise BuildError(
                f"MAX_JOBS is {wanted!r}; it should be a number of parallel compilations", f"MAX_JOBS=2 {INSTALL}"
            )
        return int(wanted)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processors, available_gib() // GIB_PER_JOB))


def available_gib() -> int:
    try:
        available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        return int(available[1]) >> 20  # type: ignore[index]
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30


def find_nvcc(environment: Mapping[str, str]) -> Path | None:
    """The CUDA compiler to build with, or None for a build without CUDA."""
    force = environment.get("FORCE_CUDA")
    if force not in (None, "", "0", "1"):
        raise BuildError(
            f"FORCE_CUDA is {force!r}; it should be 0 (CPU only) or 1 (CUDA or fail)", f"FORCE_CUDA=1 {INSTALL}"
        )
    if force == "0":
        return None
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := environment.get(variable):
            nvcc = Path(home) / "bin" / "nvcc"
            if nvcc.is_file():
                return nvcc
            raise BuildError(f"{variable} is {home!r}, but there is no {nvcc}", f"{variable}=/usr/local/cuda {INSTALL}")
    if on_path := shutil.which("nvcc", path=environment.get("PATH")):
        return Path(on_path)
    if (nvcc := Path("/usr/local/cuda/bin/nvcc")).is_file():
        return nvcc
    if force == "1":
        raise BuildError(
            "FORCE_CUDA=1, but nvcc is neither in CUDA_HOME, nor on PATH, nor in /usr/local/cuda",
            f"CUDA_HOME=/path/to/cuda FORCE_CUDA=1 {INSTALL}",
        )
    return None


def cmake_architectures(wanted: str | None, supported: set[str]) -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", "Hopper") as CMAKE_CUDA_ARCHITECTURES ("80-real;90-real;90-virtual").

    Args:
        wanted: the list, separated by semicolons, commas or spaces; None or empty for the default.
        supported: the compute capabilities that nvcc knows, like {"80", "90", "90a"}.
    """
    entries = [entry for entry in re.split(r"[;,\s]+", wanted or "") if entry]
    if not entries:
        entries = [capability for capability in DEFAULT_ARCHITECTURES if capability.replace(".", "") in supported]
        entries[-1] += "+PTX"
    result: list[str] = []
    for entry in entries:
        name, plus, ptx = entry.partition("+")
        capabilities = ARCHITECTURE_NAMES.get(name.lower(), (name,))
        for capability in capabilities:
            number = capability.replace(".", "")
            if (plus and ptx != "PTX") or not re.fullmatch(r"\d+\.\d[af]?", capability) or number not in supported:
                known = " ".join(sorted(supported, key=lambda number: (int(number.rstrip("af")), number)))
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST has {entry!r}; an entry should be like 9.0, 9.0+PTX or Hopper, and this nvcc"
                    f" knows {known}",
                    f'TORCH_CUDA_ARCH_LIST="9.0+PTX" {INSTALL}',
                )
            if int(number.rstrip("af")) < 80:
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST has {entry!r}; the kernels need compute capability 8.0 or newer",
                    f'TORCH_CUDA_ARCH_LIST="8.0+PTX" {INSTALL}',
                )
            result.append(f"{number}-real")
        if ptx:
            result.append(f"{capabilities[-1].replace('.', '')}-virtual")
    return ";".join(dict.fromkeys(result))


def require_torch() -> None:
    fix = f'pip install --upgrade "torch>={MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}" && {INSTALL}'
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        problem = f"torch is not installed in {sys.prefix} (a build without isolation uses the torch that is there)"
        raise BuildError(problem, f"pip install torch && {INSTALL}") from None
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        raise BuildError(f"torch {version} is here, and {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]} or newer is needed", fix)


def require_tool(name: str) -> str:
    beside = Path(sys.executable).parent  # a virtual environment's scripts, also when it is not activated
    executable = shutil.which(name, path=os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)]))
    if executable is None:
        raise BuildError(f"{name} is not installed", f"pip install cmake ninja pybind11 setuptools wheel && {INSTALL}")
    return executable


def pybind11_directory() -> str:
    try:
        import pybind11
    except ModuleNotFoundError:
        raise BuildError(
            "pybind11 is not installed", f"pip install cmake ninja pybind11 setuptools wheel && {INSTALL}"
        ) from None
    return pybind11.get_cmake_dir()


def require_cxx20() -> str:
    """The C++ compiler: CXX, or the first of c++, g++ and clang++ that is there; it must compile C++20."""
    fix = "apt-get install g++   # 11 or newer; or name another one: CXX=/path/to/g++ " + INSTALL
    command = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if command is None or shutil.which(command) is None:
        raise BuildError("there is no C++ compiler" + (f": CXX is {command!r}" if command else ""), fix)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <span>\ntemplate <class T> concept Sized = sizeof(T) > 1;\nstatic_assert(Sized<int>);\n"
        )
        result = subprocess.run(
            [command, "-std=c++20", "-fsyntax-only", str(source)], capture_output=True, text=True, check=False
        )
    if result.returncode:
        raise BuildError(f"{command} does not compile C++20 ({result.stderr.strip().splitlines()[0]})", fix)
    return command


def cuda_options(nvcc: Path) -> list[str]:
    def ask(option: str) -> str:
        return subprocess.run([str(nvcc), option], capture_output=True, text=True, check=True).stdout

    release = re.search(r"release (\d+)\.(\d+)", ask("--version"))
    if release is None or (int(release[1]), int(release[2])) < MINIMUM_CUDA:
        raise BuildError(
            f"{nvcc} is CUDA {release[1]}.{release[2]}" if release else f"{nvcc} does not tell its version",
            f"CUDA_HOME=/path/to/cuda-12-or-newer {INSTALL}   # or, for the CPU kernels alone: FORCE_CUDA=0 {INSTALL}",
        )
    supported = set(re.findall(r"compute_(\d+[af]?)", ask("--list-gpu-arch"))) | set(
        re.findall(r"sm_(\d+[af]?)", ask("--list-gpu-code"))
    )
    architectures = cmake_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), supported)
    return ["-DSSM_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]


def cmake_build(options: list[str], folder: Path, target: str) -> None:
    """Configures ``folder`` and builds one target there. It is kept: the next build is incremental."""
    compiler = require_cxx20()
    cmake, ninja = require_tool("cmake"), require_tool("ninja")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=Release", *options]
    configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    build = [cmake, "--build", str(folder), "--target", target, "--parallel", str(max_jobs(os.environ))]
    for command in (configure, build):
        print(" ".join(command), flush=True)
        if subprocess.run(command, check=False).returncode:
            raise BuildError("the first error is above", f"rm -rf {folder} && {INSTALL}   # after fixing what it says")


def module_folder(environment: Mapping[str, str]) -> str:
    """A folder for each Python and each CMAKE_ARGS: CMake keeps the options that it was given once."""
    tag, options = sys.implementation.cache_tag, environment.get("CMAKE_ARGS", "")
    return f"{tag}-{hashlib.sha256(options.encode()).hexdigest()[:8]}" if options else tag


class BuildKernels(build_clib):
    """The kernels, which need neither torch nor Python: one folder for every version of them, and for the C++ tests."""

    def run(self) -> None:
        nvcc = find_nvcc(os.environ)
        options = cuda_options(nvcc) if nvcc else ["-DSSM_CUDA=OFF"]
        cmake_build(["-DSSM_AVX512_LANES=OFF", *options], KERNELS_FOLDER, "kernels")


class BuildModule(build_ext):
    """The one extension there is, ``ssmkernels._C``; it, _build_info.json and cpp/, which is for C++ users, are left
    where setuptools wants them.
    """

    def run(self) -> None:
        require_torch()
        pybind11 = pybind11_directory()
        self.run_command("build_clib")
        output = Path(self.get_ext_fullpath("ssmkernels._C")).resolve().parent
        options = ["-DSSM_PYTHON=ON", f"-Dssmkernels_DIR={KERNELS_FOLDER}", f"-DSSM_OUTPUT={output}"]
        options += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
        cmake_build(options, ROOT / "build" / module_folder(os.environ), "_C")
        install = [require_tool("cmake"), "--install", str(KERNELS_FOLDER), "--component", "cpp"]
        subprocess.run([*install, "--prefix", str(output / "cpp")], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    try:
        setup(
            license="BSD-3-Clause",
            ext_modules=[Extension("ssmkernels._C", sources=[])],
            cmdclass={"build_clib": BuildKernels, "build_ext": BuildModule},
        )
    except BuildError as error:
        sys.exit(str(error))

# SPDX-License-Identifier: BSD-3-Clause
"""What setup.py decides before CMake is called."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

SUPPORTED = {"75", "80", "86", "87", "88", "89", "90", "90a", "100", "103", "110", "120", "121"}


@pytest.fixture(scope="module")
def build(source_tree):
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("ssmkernels_setup", source_tree / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc_at(tmp_path):
    def make(*parts):
        nvcc = tmp_path.joinpath(*parts, "nvcc")
        nvcc.parent.mkdir(parents=True, exist_ok=True)
        nvcc.write_text("#!/bin/sh\n")
        nvcc.chmod(0o755)
        return nvcc

    return make


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("8.0", "80-real"),
        ("8.0;9.0+PTX", "80-real;90-real;90-virtual"),
        ("8.0 9.0", "80-real;90-real"),
        ("8.6, 8.0,8.6", "86-real;80-real"),
        ("Hopper", "90-real"),
        ("ampere;Blackwell+PTX", "80-real;86-real;100-real;120-real;120-virtual"),
        ("9.0a", "90a-real"),
        ("12.1", "121-real"),
        (None, "80-real;86-real;89-real;90-real;100-real;120-real;120-virtual"),
        (" ", "80-real;86-real;89-real;90-real;100-real;120-real;120-virtual"),
    ],
)
def test_architecture_list(build, wanted, expected):
    assert build.cmake_architectures(wanted, SUPPORTED) == expected


def test_default_architectures_stop_where_the_toolkit_does(build):
    assert build.cmake_architectures(None, {"80", "86", "89", "90"}) == "80-real;86-real;89-real;90-real;90-virtual"


@pytest.mark.parametrize("wanted", ["9", "sm_90", "9.0+ptx", "9.9", "Volta", "8.0;nine"])
def test_unknown_architecture(build, wanted):
    with pytest.raises(
        build.BuildError, match=r"has .* should be like 9\.0, 9\.0\+PTX or Hopper, and this nvcc knows 75 80"
    ):
        build.cmake_architectures(wanted, SUPPORTED)


def test_architecture_too_old(build):
    with pytest.raises(build.BuildError, match=r"'7\.5'; the kernels need compute capability 8\.0"):
        build.cmake_architectures("7.5", SUPPORTED)


@pytest.mark.parametrize(("gib", "processors", "expected"), [(64, 8, 8), (7, 8, 3), (1, 8, 1), (64, 1, 1)])
def test_max_jobs_follows_memory_and_processors(build, monkeypatch, gib, processors, expected):
    monkeypatch.setattr(build, "available_gib", lambda: gib)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    assert build.max_jobs({}) == expected


def test_available_memory_is_read(build):
    assert 0 <= build.available_gib() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30


def test_max_jobs_is_obeyed(build):
    assert build.max_jobs({"MAX_JOBS": "7"}) == 7


@pytest.mark.parametrize("wanted", ["0", "-1", "many"])
def test_max_jobs_must_be_a_number(build, wanted):
    with pytest.raises(build.BuildError, match=f"MAX_JOBS is '{wanted}'; it should be a number"):
        build.max_jobs({"MAX_JOBS": wanted})


def test_nvcc_is_looked_for_in_cuda_home_then_cuda_path_then_path(build, nvcc_at, tmp_path):
    home, other, on_path = nvcc_at("home", "bin"), nvcc_at("other", "bin"), nvcc_at("scripts")
    environment = {
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "other"),
        "PATH": str(tmp_path / "scripts"),
    }
    assert build.find_nvcc(environment) == home
    del environment["CUDA_HOME"]
    assert build.find_nvcc(environment) == other
    del environment["CUDA_PATH"]
    assert build.find_nvcc(environment) == on_path


def test_force_cuda_0_is_a_cpu_build(build, nvcc_at, tmp_path):
    nvcc_at("bin")
    assert build.find_nvcc({"FORCE_CUDA": "0", "CUDA_HOME": str(tmp_path)}) is None


def test_force_cuda_1_fails_without_nvcc(build, monkeypatch):
    monkeypatch.setattr(build.Path, "is_file", lambda _: False)
    assert build.find_nvcc({"PATH": ""}) is None
    with pytest.raises(
        build.BuildError,
        match=r"(?s)FORCE_CUDA=1, but nvcc is neither.*CUDA_HOME=/path/to/cuda FORCE_CUDA=1 pip install",
    ):
        build.find_nvcc({"FORCE_CUDA": "1", "PATH": ""})


def test_wrong_cuda_home_is_said(build, tmp_path):
    with pytest.raises(build.BuildError, match=r"CUDA_HOME is .* but there is no"):
        build.find_nvcc({"CUDA_HOME": str(tmp_path)})


def test_force_cuda_must_be_0_or_1(build):
    with pytest.raises(build.BuildError, match="FORCE_CUDA is 'yes'; it should be 0"):
        build.find_nvcc({"FORCE_CUDA": "yes"})


def test_options_of_cmake_have_a_folder_of_their_own(build):
    plain = build.module_folder({})
    assert plain == build.module_folder({"CMAKE_ARGS": ""}) == sys.implementation.cache_tag
    folders = {plain, *(build.module_folder({"CMAKE_ARGS": options}) for options in ("-DA=1", "-DA=2"))}
    assert len(folders) == 3 and all(folder.startswith(plain) for folder in folders)


def test_missing_torch_is_said_with_the_command(build, monkeypatch):
    def missing(name):
        raise build.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(build.metadata, "version", missing)
    with pytest.raises(
        build.BuildError,
        match=r"(?s)torch is not installed in .*pip install torch && pip install --no-build-isolation \.",
    ):
        build.require_torch()


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117", "2.9"])
def test_old_torch(build, monkeypatch, version):
    monkeypatch.setattr(build.metadata, "version", lambda _: version)
    with pytest.raises(
        build.BuildError, match=r"(?s)and 2\.11 or newer is needed.*pip install --upgrade \"torch>=2\.11\""
    ):
        build.require_torch()


@pytest.mark.parametrize("version", ["2.11.0a0+git1234567", "2.13.0+cpu", "3.0"])
def test_new_torch(build, monkeypatch, version):
    monkeypatch.setattr(build.metadata, "version", lambda _: version)
    build.require_torch()


def test_missing_tool(build, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(build.BuildError, match="ninja is not installed"):
        build.require_tool("ninja")


def test_missing_compiler(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        build.BuildError, match=r"(?s)there is no C\+\+ compiler: CXX is 'no-such-compiler'.*apt-get install g\+\+"
    ):
        build.require_cxx20()


def test_compiler_without_cxx20(build, monkeypatch, tmp_path):
    compiler = tmp_path / "old-g++"
    compiler.write_text("#!/bin/sh\necho \"unrecognized option '-std=c++20'\" >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match=r"does not compile C\+\+20 \(unrecognized option"):
        build.require_cxx20()

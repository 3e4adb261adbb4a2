# SPDX-License-Identifier: BSD-3-Clause
"""The command, its report on good and broken installations, and the errors of an op that cannot run."""

from __future__ import annotations

import importlib.machinery
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ssmkernels
from ssmkernels import _library, cli, info

TORCH = """
__version__ = "{version}"
class version:
    cuda = {cuda!r}
class cuda:
    is_available = staticmethod(lambda: bool({devices!r}))
    device_count = staticmethod(lambda: len({devices!r}))
    get_device_name = staticmethod(lambda i: "Device %d" % i)
    get_device_capability = staticmethod(lambda i: {devices!r}[i])
class backends:
    class cpu:
        get_cpu_capability = staticmethod(lambda: "AVX2")
get_num_threads = lambda: 2
"""
BUILD = {
    "version": ssmkernels.__version__,
    "python": "3.11.7",
    "torch": "2.15.0",
    "cuda": "12.8",
    "cuda_architectures": ["80-real", "90-real", "90-virtual"],
    "compiler": "GNU 12.2.0",
    "instruction_sets": ["baseline", "avx2", "avx512"],
}
LIBRARY = """
import json
build_info = lambda: json.loads({build!r})
current_isa = lambda: "avx2"
available_isas = lambda: ["baseline", "avx2"]
"""


class Installation:
    """A copy of the package, run by a Python that sees neither site-packages nor the real torch."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / "ssmkernels"
        compiled = shutil.ignore_patterns("_C*", "_build_info.json", "__pycache__")
        shutil.copytree(Path(ssmkernels.__file__).parent, self.package, ignore=compiled)

    def add_torch(self, version="2.15.0", cuda=None, devices=()):
        self.write("torch.py", TORCH.format(version=version, cuda=cuda, devices=list(devices)))
        self.write("torch-0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")

    def add_library(self, **changes):
        build = json.dumps({**BUILD, **changes})
        self.write("ssmkernels/_build_info.json", build)
        self.write("ssmkernels/_C.py", LIBRARY.format(build=build))

    def write(self, name, text):
        (self.root / name).parent.mkdir(exist_ok=True)
        (self.root / name).write_text(text)

    def run(self, *arguments, **environment):
        command = [sys.executable, "-S", "-m", "ssmkernels", *arguments]
        environment = {"PATH": "/usr/bin:/bin", **environment}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self.root, env=environment, timeout=300
        )

    def problems(self, **environment):
        result = self.run("info", "--json", **environment)
        problems = json.loads(result.stdout)["problems"]
        assert result.returncode == (1 if problems else 0), result.stderr
        return problems


@pytest.fixture
def installation(tmp_path):
    return Installation(tmp_path)


def test_a_working_installation_has_no_problems(installation):
    installation.add_torch()
    installation.add_library()
    assert installation.problems() == []


def test_text_report(installation):
    installation.add_torch(version="2.15.0+cu132", cuda="13.2", devices=[(9, 0)])
    installation.add_library()
    result = installation.run("info")
    assert result.returncode == 0, result.stdout
    lines = result.stdout.splitlines()
    assert f"  ssmkernels   {ssmkernels.__version__} ({installation.package})" in lines
    assert "  CUDA              12.8 for sm_80 sm_90 PTX_90" in lines
    assert "  instruction sets  baseline, avx2, avx512" in lines
    assert "  chosen         avx2" in lines
    assert "  devices  Device 0 (9.0)" in lines
    assert lines[-2:] == ["problems", "  none"]


def test_torch_missing(installation):
    (entry,) = installation.problems()
    assert entry["problem"] == "torch is not installed"
    assert entry["fix"] == f"{sys.executable} -m pip install torch"


def test_torch_too_old(installation):
    installation.add_torch(version="2.10.1")
    (entry,) = installation.problems()
    assert entry["problem"] == "torch 2.10.1 is older than 2.11"
    assert entry["fix"].endswith('-m pip install --upgrade "torch>=2.11"')


@pytest.mark.parametrize(
    ("code", "message"),
    [("raise OSError('libcudart.so.9: missing')", "so.9: missing"), ("import os; os.abort()", "signal 6")],
)
def test_torch_broken(installation, code, message):
    installation.write("torch.py", code)
    (entry,) = installation.problems()
    assert "torch does not import" in entry["problem"]
    assert message in entry["problem"]


def test_library_missing(installation):
    installation.add_torch()
    (entry,) = installation.problems()
    assert f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]} is not there" in entry["problem"]
    assert "-m pip install --force-reinstall --no-deps --no-build-isolation ssmkernels" in entry["fix"]


def test_library_of_another_python(installation):
    installation.add_torch()
    installation.write("ssmkernels/_C.cpython-399-x86_64-linux-gnu.so", "")
    (entry,) = installation.problems()
    assert "only _C.cpython-399-x86_64-linux-gnu.so" in entry["problem"]


def test_library_does_not_load(installation):
    installation.add_torch()
    installation.write(f"ssmkernels/_C{importlib.machinery.EXTENSION_SUFFIXES[0]}", "no ELF header")
    (entry,) = installation.problems()
    assert "the compiled library does not load: ImportError" in entry["problem"]


def test_source_tree_is_mended_in_place(installation):
    installation.add_torch()
    installation.write("CMakeLists.txt", "")
    (entry,) = installation.problems()
    assert entry["fix"] == f"cd {installation.root} && {sys.executable} -m pip install --no-build-isolation -e ."


def test_stale_library(installation):
    installation.add_torch()
    installation.add_library(version="0.0.1")
    (entry,) = installation.problems()
    assert entry["problem"] == f"the compiled library is of version 0.0.1, the Python files of {ssmkernels.__version__}"


def test_device_without_cuda_build(installation):
    installation.add_torch(cuda="13.2", devices=[(9, 0)])
    installation.add_library(cuda=None, cuda_architectures=[])
    (entry,) = installation.problems()
    assert entry["problem"] == "there is Device 0, but the compiled library was built without CUDA"
    assert entry["fix"].startswith("FORCE_CUDA=1 ")


def test_device_without_code(installation):
    installation.add_torch(cuda="13.2", devices=[(8, 6)])
    installation.add_library(cuda_architectures=["90-real", "90-virtual"])
    (entry,) = installation.problems()
    assert entry["problem"] == "the compiled library has no code for Device 0 (8.6): it was built for sm_90 PTX_90"
    assert entry["fix"].startswith('TORCH_CUDA_ARCH_LIST="8.6" ')


def test_unknown_instruction_set(installation):
    installation.add_torch()
    installation.add_library()
    (entry,) = installation.problems(SSMKERNELS_ISA="avx1024")
    assert entry == {
        "problem": "SSMKERNELS_ISA is 'avx1024', and this processor runs baseline, avx2",
        "fix": "unset SSMKERNELS_ISA",
    }


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (["80-real"], (8, 0), True),
        (["80-real"], (8, 6), True),
        (["86-real"], (8, 0), False),
        (["80-real"], (9, 0), False),
        (["80-virtual"], (12, 0), True),
        (["80"], (12, 0), True),
        (["90a-real"], (9, 0), True),
        (["90a"], (10, 0), False),
        ([], (9, 0), False),
    ],
)
def test_covers(architectures, capability, expected):
    assert info.covers(architectures, capability) is expected


def test_package_imports_without_torch(installation):
    code = (
        "import sys, ssmkernels; assert ssmkernels.info.collect()['torch'] is None and 'torch' not in sys.modules;"
        " print(dir(ssmkernels))"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False, cwd=installation.root
    )
    assert result.returncode == 0, result.stderr
    assert "'ops'" in result.stdout


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'no_such_room'"):
        _ = ssmkernels.no_such_room


def test_library_reports_the_build():
    library = _library.library()
    build = library.build_info()
    assert build == json.loads((Path(ssmkernels.__file__).parent / "_build_info.json").read_text())
    assert build["version"] == ssmkernels.__version__
    assert set(library.available_isas()) <= set(build["instruction_sets"])


def test_instruction_set_is_chosen():
    library = _library.library()
    before = library.current_isa()
    try:
        for name in library.available_isas():
            library.set_isa(name)
            assert library.current_isa() == name
        with pytest.raises(ValueError, match="name is 'sse9'; this processor runs baseline"):
            library.set_isa("sse9")
    finally:
        library.set_isa(before)


def test_op_without_library_raises_what_keeps_it_from_loading(monkeypatch):
    monkeypatch.setattr(_library, "_C", None)
    monkeypatch.setattr(_library, "_error", ImportError("undefined symbol: aoti_torch_something"))
    assert not _library.load()
    with pytest.raises(
        RuntimeError, match=r"(?s)did not load: ImportError: undefined symbol.*\nbuilt: .*\nhere:  .*"
    ) as raised:
        _library.require(SimpleNamespace(is_cuda=False))
    assert isinstance(raised.value.__cause__, ImportError)


def test_cuda_tensor_given_to_a_cpu_build(monkeypatch):
    monkeypatch.setattr(_library, "_cuda_built", False)
    message = (
        r"(?s)a CUDA tensor was given to a build without CUDA\nbuilt: .*\nhere:  .*\nfix:   .*FORCE_CUDA=1 .*pip"
        r" install"
    )
    with pytest.raises(RuntimeError, match=message):
        _library.require(SimpleNamespace(is_cuda=True))


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_names_every_command(arguments, capsys):
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in ("train", "reproduce", "report", "demo", "bench", "info"))


def test_no_command_is_an_error(capsys):
    assert cli.main([]) == 2
    assert "usage: ssmkernels" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ssmkernels {ssmkernels.__version__}\n"


def test_unknown_command(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "ssmkernels: there is no command 'trian'; did you mean train?\n"
    assert cli.main(["xyz"]) == 2
    commands = "train, evaluate, predict, export, reproduce, report, demo, bench, info"
    assert capsys.readouterr().err == f"ssmkernels: there is no command 'xyz'; it should be one of {commands}\n"


@pytest.mark.parametrize(
    ("command", "module", "package"),
    [
        ("train", "tqdm", '"ssmkernels[train]"'),
        ("reproduce", "matplotlib.pyplot", '"ssmkernels[train]"'),
        ("bench", "matplotlib", '"ssmkernels[bench]"'),
        ("demo", "torch", "torch"),
    ],
)
def test_a_missing_package_is_one_line(command, module, package, monkeypatch, capsys):
    def missing(_):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert cli.main([command]) == 1
    expected = f"ssmkernels {command}: {module} is not installed; pip install {package}\n"
    assert capsys.readouterr().err == expected


def test_every_extra_exists(source_tree):
    project = (source_tree / "pyproject.toml").read_text()
    assert all(f"\n{command.extra} = [" in project for command in cli.COMMANDS.values())


def test_interrupt_is_130_without_traceback(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "main", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "\nssmkernels: interrupted\n"


def test_what_is_loaded_is_asked_in_this_process(monkeypatch):
    monkeypatch.setattr(info.subprocess, "run", lambda *command, **options: pytest.fail("another process"))
    assert info._answer("torch", info.torch_here)["threads"] == torch.get_num_threads()
    assert "baseline" in info._answer("ssmkernels._C", info.library_here)["available"]

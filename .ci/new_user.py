# SPDX-License-Identifier: BSD-3-Clause
"""Does what README says, in its order, as four new users do, each with the packages that pip would give that user and
no others: install; an op in a training loop; a table of a paper and its report; a benchmark.

python .ci/new_user.py WHEEL    with the Python of an environment that has the packages of the extras train and bench

A fresh virtual environment, an empty home, no variable of this environment, an empty folder to work in. There is no
network: the commands run in a network namespace of their own where this machine allows one (unshare), else with a
proxy that nobody answers; pip has no index either way.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NO_NETWORK = ["unshare", "--net", "--map-root-user"]
NOBODY = "http://127.0.0.1:9"
LOOP = """
from ssmkernels import reference
network = torch.nn.Linear(128, 128)
optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
images, losses = strong.detach(), []
for step in range(20):
    strong = torch.nn.functional.normalize(network(images), dim=1)
    optimizer.zero_grad()
    exec(of_readme)
    optimizer.step()
    losses.append(loss.mean().item())
expected = reference.instance_matching(weak, strong, bank, bank_labels, probs_weak)
torch.testing.assert_close((pseudo_probs, loss), expected, rtol=1e-4, atol=1e-5)
assert losses[-1] < losses[0] - 0.1, losses
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps; the last step agrees with the reference")
"""


def blocks_of_readme(language: str) -> list[str]:
    return [block[2] for block in BLOCK.finditer(README.read_text(encoding="utf-8")) if block[1] == language]


def command_of_readme(start: str) -> list[str]:
    """The words of the one command in README's shell blocks that begins with ``start``, without its comment."""
    lines = [line for block in blocks_of_readme("sh") for line in block.splitlines() if line.startswith(start)]
    if len(lines) != 1:
        raise SystemExit(f"README has {len(lines)} commands {start!r}; a new user is expected to find one")
    return lines[0].split("#")[0].replace('"', "").split()


def packages_for(requirements: list[str]) -> set[str]:
    """Names of the distributions here that pip would install for ``requirements``, and for theirs."""
    waiting = [Requirement(text) for text in requirements]
    done: set[tuple[str, str]] = set()
    names = set()
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            if (requirement.name, extra) in done:
                continue
            done.add((requirement.name, extra))
            try:
                package = distribution(requirement.name)
            except PackageNotFoundError:  # pip will say what misses it
                continue
            names.add(package.name)
            needed = [Requirement(text) for text in package.requires or ()]
            waiting += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]
    return names - {"ssmkernels"}


class Machine:
    """An environment with nothing in it: ``python`` runs there, in ``folder``."""

    def __init__(self, top: Path) -> None:
        self.folder, self.home, self.packages = top / "work", top / "home", top / "packages"
        for folder in (self.folder, self.home, self.packages):
            folder.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(top / "venv")], check=True)
        self.bin = top / "venv" / "bin"
        (site,) = (top / "venv" / "lib").glob("python*/site-packages")
        (site / "packages.pth").write_text(f"{self.packages}\n")
        allowed = subprocess.run([*NO_NETWORK, "true"], capture_output=True, check=False).returncode == 0
        self.prefix = NO_NETWORK if allowed else []
        self.offer(["pip"])
        print("no network: " + ("a network namespace of its own" if allowed else f"the proxy is {NOBODY}"), flush=True)

    def offer(self, requirements: list[str]) -> None:
        """Puts the packages that ``requirements`` bring where the environment sees them."""
        for name in packages_for(requirements):
            package = distribution(name)
            for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
                link, target = self.packages / top, Path(str(package.locate_file(top)))
                if target.exists() and not link.exists():
                    link.symlink_to(target)

    def run(self, *command: str, text: str = "") -> str:
        """What the command writes to standard output; a command that fails ends this program with all its output."""
        print("$ " + " ".join(command), flush=True)
        start = time.monotonic()
        variables = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.home), "PIP_NO_INDEX": "1"}
        variables |= dict.fromkeys(("http_proxy", "https_proxy"), NOBODY)
        result = subprocess.run(
            [*self.prefix, str(self.bin / command[0]), *command[1:]],
            cwd=self.folder,
            env=variables,
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise SystemExit(f"{result.stdout}\n{result.stderr}\nnew user: {command} ends with {result.returncode}")
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
        return result.stdout


def installs(machine: Machine, wheel: Path) -> None:
    """README installs from a clone; the wheel is what that makes."""
    assert command_of_readme("pip install .") == ["pip", "install", "."]
    machine.offer(requirements_of(wheel, ""))
    machine.run("python", "-m", "pip", "install", "--no-cache-dir", str(wheel))
    info = json.loads(machine.run("ssmkernels", "info", "--json"))
    assert not info["problems"], info["problems"]


def trains(machine: Machine) -> None:
    """README's example as it stands; then its last two lines, the op and backward(), in a loop over a network."""
    (block,) = blocks_of_readme("python")
    step = "\n".join(block.splitlines()[-2:])
    print("  " + machine.run("python", "-", text=f"{block}\nof_readme = {step!r}\n{LOOP}").strip())


def makes_a_table(machine: Machine, wheel: Path) -> None:
    assert command_of_readme('pip install --no-build-isolation ".[')[-1] == ".[train,bench]"
    machine.offer(requirements_of(wheel, "train"))
    machine.run("python", "-m", "pip", "install", "--no-cache-dir", f"{wheel}[train]")
    assert "--share" in machine.run("ssmkernels", "demo", "--help")
    column = "digits, pixels (1,797; 10 classes), 5 per class"
    quick = ["--budget", "smoke", "--data", "embedded", "--seeds", "1", "--columns", column]
    machine.run(*command_of_readme("ssmkernels reproduce"), *quick)
    (record,) = machine.folder.glob("runs/reproduce/*/record.json")
    values = {entry["row"]: entry["values"] for entry in json.loads(record.read_text())["entries"] if entry["values"]}
    assert 0.5 < values["ours"][0] <= 1, values  # chance is 0.1
    report = command_of_readme("ssmkernels report")
    machine.run(*report)
    page = (machine.folder / report[-1] / "report.html").read_text(encoding="utf-8")
    assert "Table 3" in page and f"{values['ours'][0]:.3f}" in page, page[:2000]
    print(f"  accuracy {values['ours'][0]:.3f}, in the report too")


def measures(machine: Machine, wheel: Path) -> None:
    machine.offer(requirements_of(wheel, "bench"))
    machine.run("python", "-m", "pip", "install", "--no-cache-dir", f"{wheel}[bench]")
    machine.run(*command_of_readme("ssmkernels bench"), "--op", "laplacian_solve", "--seconds", "0.1")
    results = json.loads((machine.folder / "runs/bench/cpu.json").read_text())["results"]
    assert results and all(result["ours"]["median"] > 0 and result["peers"] for result in results), results
    assert "laplacian_solve" in (machine.folder / "runs/bench/cpu.md").read_text(encoding="utf-8")
    assert (machine.folder / "runs/bench/cpu.png").stat().st_size > 10_000
    print(f"  {len(results)} cases, each beside {', '.join(results[0]['peers'])}")


def requirements_of(wheel: Path, extra: str) -> list[str]:
    """What the wheel requires, alone or with an extra."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(wheel, folder, "zip")
        (metadata,) = Path(folder).glob("*.dist-info/METADATA")
        texts = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(encoding="utf-8"), re.MULTILINE)
    requirements = [Requirement(text) for text in texts]
    return [str(one) for one in requirements if one.marker is None or one.marker.evaluate({"extra": extra})]


def main() -> None:
    wheel = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as top:
        machine = Machine(Path(top))
        installs(machine, wheel)
        trains(machine)
        makes_a_table(machine, wheel)
        measures(machine, wheel)
    print("a new user can do what README says")


if __name__ == "__main__":
    main()

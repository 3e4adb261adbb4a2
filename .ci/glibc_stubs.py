# SPDX-License-Identifier: BSD-3-Clause
"""Libraries to link against in place of this machine's libc and libm, so that a module needs no symbol of glibc that is
newer than 2.28: each symbol in the newest version up to there.

python .ci/glibc_stubs.py FOLDER    writes FOLDER/libc.so and libm.so; needs cc and readelf

Only names and versions are in them; they are never loaded. What glibc has had since a later version is not there at
all, so that the check of the finished module finds it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

NEWEST = (2, 28)
SYMBOL = re.compile(
    r"^\s*\d+: \w+\s+(?P<size>\d+|0x\w+) (?P<kind>FUNC|OBJECT|IFUNC|TLS|NOTYPE)\s+(?:GLOBAL|WEAK|UNIQUE)\s+DEFAULT\s+"
    r"(?!UND)\S+ (?P<name>[\w.]+)@@?GLIBC_(?P<version>[\d.]+)$",
    re.MULTILINE,
)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def symbols_of(library: str) -> dict[str, tuple[str, str]]:
    """name -> (kind, the newest version up to :data:`NEWEST`)."""
    path = subprocess.run(["cc", f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout
    table = subprocess.run(["readelf", "-W", "--dyn-syms", path.strip()], capture_output=True, text=True, check=True)
    newest: dict[str, tuple[str, str]] = {}
    for match in SYMBOL.finditer(table.stdout):
        name, version = match["name"], match["version"]
        if numbers(version) > NEWEST or (name in newest and numbers(newest[name][1]) >= numbers(version)):
            continue
        newest[name] = (match["kind"], version)
    return newest


def write_stub(library: str, folder: Path) -> None:
    """``folder``/libc.so for libc.so.6: every symbol is defined in an assembler file, its version by a script."""
    symbols = symbols_of(library)
    lines, nodes = [], {}
    for name, (kind, version) in symbols.items():
        section = {"OBJECT": ".data", "TLS": '.section .tdata,"awT",@progbits'}.get(kind, ".text")
        of_kind = {"OBJECT": "@object", "TLS": "@tls_object"}.get(kind, "@function")
        lines += [section, f".globl {name}", f".type {name}, {of_kind}", f"{name}: .quad 0", f".size {name}, 8"]
        nodes.setdefault(version, []).append(name)
    stem = library.split(".")[0]
    source, script, stub = (folder / f"{stem}{suffix}" for suffix in (".s", ".map", ".so"))
    source.write_text("\n".join(lines) + "\n")
    with script.open("w") as file:
        for version, names in nodes.items():
            file.write(f"GLIBC_{version} {{ {'; '.join(names)}; }};\n")
    command = ["cc", "-shared", "-nostdlib", f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
    subprocess.run([*command, "-o", str(stub), str(source)], check=True)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for library in ("libc.so.6", "libm.so.6"):
        write_stub(library, folder)


if __name__ == "__main__":
    main()

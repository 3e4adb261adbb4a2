# SPDX-License-Identifier: BSD-3-Clause
"""Libraries to link against in place of this machine's libc and libm, so that a module needs no symbol of glibc that is
newer than 2.28: each symbol in the newest version up to there.

python .ci/glibc_stubs.py FOLDER    writes FOLDER/libc.so, libc.so.6 and libm.so; needs cc and readelf

Only names and versions are in them; they are never loaded. What a program has of its own from glibc (atexit, which
CUDA's runtime calls) comes from this machine's libc_nonshared.a, as it does by its own libc.so. What glibc has had
since a later version is not there at all, so that the check of the finished module finds it.
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


def place_of(library: str) -> str:
    command = ["cc", f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def symbols_of(library: str) -> dict[str, tuple[str, str]]:
    """name -> (kind, the newest version up to :data:`NEWEST`)."""
    command = ["readelf", "-W", "--dyn-syms", place_of(library)]
    table = subprocess.run(command, capture_output=True, text=True, check=True)
    newest: dict[str, tuple[str, str]] = {}
    for match in SYMBOL.finditer(table.stdout):
        name, version = match["name"], match["version"]
        if numbers(version) > NEWEST or (name in newest and numbers(newest[name][1]) >= numbers(version)):
            continue
        newest[name] = (match["kind"], version)
    return newest


def write_stub(library: str, folder: Path, name: str) -> None:
    """``folder``/``name`` for a library: every symbol is defined in an assembler file, its version by a script."""
    symbols = symbols_of(library)
    lines, nodes = [], {}
    for symbol, (kind, version) in symbols.items():
        section = {"OBJECT": ".data", "TLS": '.section .tdata,"awT",@progbits'}.get(kind, ".text")
        of_kind = {"OBJECT": "@object", "TLS": "@tls_object"}.get(kind, "@function")
        lines += [section, f".globl {symbol}", f".type {symbol}, {of_kind}", f"{symbol}: .quad 0"]
        lines.append(f".size {symbol}, 8")
        nodes.setdefault(version, []).append(symbol)
    source, script = folder / f"{library}.s", folder / f"{library}.map"
    source.write_text("\n".join(lines) + "\n")
    with script.open("w") as file:
        for version, names in nodes.items():
            file.write(f"GLIBC_{version} {{ {'; '.join(names)}; }};\n")
    command = ["cc", "-shared", "-nostdlib", f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
    subprocess.run([*command, "-o", str(folder / name), str(source)], check=True)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write_stub("libm.so.6", folder, "libm.so")
    write_stub("libc.so.6", folder, "libc.so.6")
    (folder / "libc.so").write_text(f"GROUP ( {folder.resolve() / 'libc.so.6'} {place_of('libc_nonshared.a')} )\n")


if __name__ == "__main__":
    main()

"""What this machine is: its processor, the instructions that decide how int8 runs, its memory. Changes nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import msgspec

INTEGER_DOT_PRODUCT = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Instructions that add products of 8-bit integers into 32 bits; without one, u8 x s8 saturates at 16 bits on x86."""

_TELLING = ("avx2", "fma", "avx512f", *INTEGER_DOT_PRODUCT, "amx_bf16", "asimd", "asimdhp", "sve", "neon")


class Machine(msgspec.Struct, frozen=True):
    """The facts that a measurement has to be read with."""

    cpu: str
    arch: str
    cores: int
    memory_mib: int
    flags: tuple[str, ...]
    system: str
    python: str

    @property
    def integer_dot_product(self) -> str:
        """Name the instruction that int8 kernels will use, empty for none."""
        return next((flag for flag in INTEGER_DOT_PRODUCT if flag in self.flags), "")


def describe(root: Path = Path("/")) -> Machine:
    """Read the machine whose ``/proc`` lies under ``root``; what cannot be read stays empty or 0."""
    info = _fields(root / "proc/cpuinfo")
    words = f"{info.get('flags', '')} {info.get('Features', '')}".split()
    return Machine(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        arch=platform.machine(),
        cores=usable_cores(),
        memory_mib=_leading_number(_fields(root / "proc/meminfo").get("MemTotal", "")) // 1024,
        flags=tuple(flag for flag in _TELLING if flag in words),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def usable_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fields(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _leading_number(text: str) -> int:
    first = text.partition(" ")[0]
    return int(first) if first.isdecimal() else 0

"""What a variant needs of a device, and whether this one has it. Does no I/O and knows no engine.

What a device has is handed in: `ota` may not look at what runs models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.manifest import Variant

ISA = "isa"


@dataclass(frozen=True)
class Capabilities:
    """What a device has: the formats that an engine runs here, versions and sizes by name, instructions.

    ``versions`` are of engines, systems and file formats, as ``onnxruntime`` 1.31.1 or ``memory_mib`` 3800; what is
    here in a version that nobody knows is empty.
    """

    formats: frozenset[str]
    versions: Mapping[str, str] = field(default_factory=dict)
    instructions: frozenset[str] = frozenset()


def lacks(variant: Variant, here: Capabilities | None) -> str:
    """Say what a variant needs and this device has not; empty where nothing is known to be missing.

    Its engine, what its ``requires`` names (``>=1.20`` and ``1.20`` are the least that will do), and under ``isa`` the
    instructions, by names that `Capabilities` has too, with blanks between. ``here`` ``None``: nobody looked.
    """
    if here is None:
        return ""
    missing = [] if variant.format in here.formats else [f"no engine runs {variant.format} here"]
    for name, needed in variant.requires.items():
        if name == ISA:
            missing += [f"the processor has no {one}" for one in needed.split() if one not in here.instructions]
        elif name not in here.versions:
            missing.append(f"it needs {name} {needed}, which is not here")
        elif here.versions[name] and not _is_enough(here.versions[name], needed):
            missing.append(f"it needs {name} {needed}, here is {here.versions[name]}")
    return "; ".join(missing)


def _is_enough(have: str, needed: str) -> bool:
    return _numbers(have) >= _numbers(needed)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, without the zeros at its end: 1.20 is 1.20.0."""
    found = re.search(r"\d+(\.\d+)*", version)
    numbers = [int(one) for one in found.group().split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)

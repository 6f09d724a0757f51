"""Whether a sample stands in two splits that must not share it. Knows no file and no array.

``test`` shares with nothing, ``validation`` with nothing that steers or trains; ``calibration`` may be part of
``train``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

GUARDED = {"test": ("validation", "calibration", "train"), "validation": ("calibration", "train")}
"""Splits that judge, and those which may not hold one of their samples."""


def refuse_shared(keys: Mapping[str, Sequence[str]], shown: Callable[[str, int], str], way_out: str) -> None:
    """Raise UsageError where two splits share a key; ``shown`` names the sample of a split at a number."""
    for judge, others in GUARDED.items():
        seen = {key: number for number, key in enumerate(keys.get(judge, ()))}
        for other in others:
            for number, key in enumerate(keys.get(other, ())):
                if key in seen:
                    raise UsageError(
                        f"{shown(judge, seen[key])} of the {judge} split is in the {other} split too, as "
                        f"{shown(other, number)}",
                        f"a figure on known samples says nothing; {way_out}",
                    )


def kept(keys: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Return the numbers of each split's samples that no split which judges has; ``test`` keeps all of its own."""
    found = {}
    for split, own in keys.items():
        judged = {key for judge, others in GUARDED.items() if split in others for key in keys.get(judge, ())}
        found[split] = [number for number, key in enumerate(own) if key not in judged]
    return found

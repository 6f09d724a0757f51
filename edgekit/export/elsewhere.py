"""Does the file answer the same on the processor that it is for? Asks an emulated one, where this machine is better."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from edgekit.device_profiles import machine
from edgekit.errors import HealthError, ParityError
from edgekit.export.golden import golden_count
from edgekit.manifest import Elsewhere
from edgekit.runtime import emulation

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.parity import Reference
    from edgekit.manifest import Variant
    from edgekit.tensors import Array

INTEGERS = ("int", "w", "mixed")
DECIDES = "not verified on this instruction set; the device's own trial decides"


def looks_at_sums(profile: DeviceProfile) -> bool:
    """Say whether a file for an x86 without 8-bit dot products is run on such a one here: emulated, or this machine."""
    if not profile.emulate or profile.arch != "x86_64":
        return False
    return not machine.describe().integer_dot_product or not emulation.lacking(emulation.isa_named(profile.emulate))


def ask(
    profile: DeviceProfile, variant: Variant, outputs: Mapping[str, Array], *, folder: Path, reference: Reference
) -> Elsewhere | None:
    """Compare what a file answered here with what it answers on the profile's processor; ``None``: there is no other.

    Raises:
        ParityError: the answers lie apart by more than devices are granted (`Variant.expected`).
    """
    here = platform.machine()
    is_foreign = profile.arch not in ("any", here)
    isa = emulation.isa_named(profile.emulate) if profile.emulate else None
    if is_foreign and (isa is None or variant.format not in emulation.FORMATS):
        return Elsewhere(isa=profile.arch, status="unverified", reason=f"exported on {here}: {DECIDES}")
    is_integer = variant.precision.startswith(INTEGERS)
    if isa is None or not (is_foreign or (is_integer and machine.describe().integer_dot_product)):
        return None
    if emulation.lacking(isa):
        return Elsewhere(isa=isa.name, status="unverified", reason=f"{emulation.lacking(isa)}; {DECIDES}")
    count = golden_count(reference)
    native = {name: array[:count] for name, array in outputs.items()}
    samples = reference.inputs.head(count).inputs
    try:
        found = emulation.answers(folder, variant, reference.contract, inputs=samples, isa=isa)
    except HealthError as error:
        raise ParityError(f"{variant.name}: {error.message}", error.hint) from error
    figures = emulation.figures_of(isa.name, found, native)
    if not emulation.holds(figures, variant):
        raise ParityError(
            f"{variant.main} answers otherwise on {isa.name} ({isa.has}) than here: SQNR {figures.sqnr_db:.1f} dB"
            f" (at least {variant.expected.min_sqnr_db if variant.expected else 0:g})"
            + ("" if figures.top1_agreement is None else f", same top-1 {figures.top1_agreement:.3f}"),
            "the engine's kernels there compute something else: try another precision, or keep the layer in float"
            if is_foreign
            else f'sums of its products leave 16 bits there: set target = "{profile.name}" in the pass quantize, which'
            " gives such layers weights of 7 bits",
        )
    return figures

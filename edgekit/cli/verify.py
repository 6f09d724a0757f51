"""``edgekit verify``: run a bundle's files again, here or on another instruction set, and compare the answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli._terminal import Terminal, command

if TYPE_CHECKING:
    from edgekit.bundle import Bundle
    from edgekit.manifest import Elsewhere, Variant
    from edgekit.runtime.emulation import Isa

HERE = "this machine"
COLUMNS = ("variant", "where", "status", "SQNR dB", "same top-1", "max error", "verdict")


@command(
    name="verify",
    short_help="Run a bundle's files again, also on another instruction set.",
    help="""Run the golden samples of BUNDLE through its files again, and compare with what they gave at export.

    With --isa, run them as well on another processor, emulated by QEMU, and compare its answers with this machine's:
    int8 on x86 without 8-bit dot products may saturate, and an engine built for ARM has kernels of its own (edgekit
    emulator makes that one). The exit code is 6 where one lies too far off, and where nothing could be verified.
    """,
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--variant", "variants", multiple=True, help="Variant to verify; all by default. Repeatable.")
@click.option("--isa", "isas", multiple=True, help="Processor: haswell, cortex-a76, …. Repeatable.")
def COMMAND(terminal: Terminal, *, bundle: Path, variants: tuple[str, ...], isas: tuple[str, ...]) -> None:  # noqa: N802  # the name is the plugin's
    """Check the bytes, run, compare."""
    from edgekit import bundle as bundles
    from edgekit.errors import ParityError
    from edgekit.runtime import emulation

    wanted = [emulation.isa_named(name) for name in isas]
    opened = bundles.read(bundle)
    manifest = opened.manifest
    chosen = [manifest.variant(name) for name in variants] or list(manifest.variants)
    rows: list[tuple[Variant, Elsewhere, bool]] = []
    for number, variant in enumerate(chosen):
        terminal.progress(f"verify {variant.name}", number, len(chosen))
        rows += _verified(bundle, opened, variant, wanted)
    _tell(terminal, rows, opened.digest)
    lost = [(variant, found) for variant, found, is_good in rows if not is_good]
    for variant, found in lost:
        far = f"answers otherwise: SQNR {found.sqnr_db} dB; quantize with such a hardware class as target: layers that"
        terminal.warn(f"{variant.name} on {found.isa}: {found.reason or far + ' saturate there get weights of 7 bits'}")
    if not any(found.status == "checked" for _, found, _ in rows):
        terminal.warn(f"nothing of {bundle} could be verified here")
        lost = lost or [rows[0][:2]]
    if lost:
        click.get_current_context().exit(ParityError.exit_code)


def _verified(folder: Path, opened: Bundle, variant: Variant, isas: list[Isa]) -> list[tuple[Variant, Elsewhere, bool]]:
    """Run one variant here, beside what it gave at export, and on each instruction set, beside what it gives here."""
    from edgekit.errors import EdgekitError
    from edgekit.manifest import Elsewhere
    from edgekit.runtime import backends, emulation
    from edgekit.runtime.acceptance import golden_arrays
    from edgekit.runtime.opening import contract_of

    places: list[Isa | None] = [None, *isas]

    def unverified(why: str, places: list[Isa | None]) -> list[tuple[Variant, Elsewhere, bool]]:
        named = [place.name if place else HERE for place in places]
        return [(variant, Elsewhere(isa=name, status="unverified", reason=why), True) for name in named]

    manifest = opened.manifest
    if manifest.task == "text-generation":
        return unverified("a language model's answers are compared by the device's trial", places)
    if why := backends.absence(variant.format):
        return unverified(why, places)
    inputs, native = golden_arrays(folder, manifest.golden, variant)
    if variant.expected is None:
        return unverified("the file never ran where it was exported, so there is nothing to compare with", places)
    rows: list[tuple[Variant, Elsewhere, bool]] = []
    contract = contract_of(opened)
    for place in places:
        try:
            found = emulation.answers(folder, variant, contract, inputs=inputs, isa=place)
        except EdgekitError as error:
            rows += [(v, told, place is not None) for v, told, _ in unverified(error.message, [place])]
            continue
        told = emulation.figures_of(place.name if place else HERE, found, native)
        native = found if place is None else native
        rows.append((variant, told, emulation.holds(told, variant)))
    return rows


def _tell(terminal: Terminal, rows: list[tuple[Variant, Elsewhere, bool]], digest: str) -> None:
    import msgspec

    terminal.table(COLUMNS, [_cells(*row) for row in rows])
    for variant, found, is_good in rows:
        if found.reason and is_good:
            terminal.say(f"{variant.name} on {found.isa}: {found.reason}")
    listed = [
        {"variant": variant.name, "holds": is_good, **msgspec.to_builtins(found)} for variant, found, is_good in rows
    ]
    terminal.result({"digest": digest, "verified": listed})


def _cells(variant: Variant, found: Elsewhere, is_good: bool) -> tuple[str, ...]:
    figures = (found.sqnr_db, found.top1_agreement, found.max_abs_error)
    verdict = "-" if found.status != "checked" else "holds" if is_good else "TOO FAR OFF"
    cells = ("-" if value is None else f"{value:.4g}" for value in figures)
    return (variant.name, found.isa, found.status, *cells, verdict)

"""Chooses which variant of a bundle runs here, and opens it. Knows no engine's package."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgekit import bundle, device_profiles, plugins
from edgekit import manifest as manifests
from edgekit.errors import BundleError, MissingExtra, UsageError
from edgekit.manifest import EngineBuild
from edgekit.plugins import extra
from edgekit.runtime import backends, ports
from edgekit.runtime.backends import EngineOptions, OwnEngine
from edgekit.runtime.session import Contract, Session, TextSession

if TYPE_CHECKING:
    from edgekit.manifest import Manifest, Variant
    from edgekit.runtime.backends import Backend, Engine, TextEngine
    from edgekit.tensors import Array

PACKAGE = backends.__name__
SAMPLES = 4
"""So many random samples stand for golden inputs where a bundle has none."""


def load(
    path: str | Path, *, variant: str | None = None, threads: int = 0, engines: Path | None = None
) -> Session | TextSession:
    """Open a bundle, check its bytes, and return a warm session.

    The variant is the named one; else the one of the detected hardware class; else the first whose engine is
    installed. ``threads`` 0 means one a core. ``engines``: the folder of engines that this device builds for itself
    while the model serves already (TensorRT); ``None`` builds and uses none.

    Raises:
        UsageError: no bundle there, or nothing in it can run here.
        UnknownName: the bundle has no such variant.
        BundleError: a byte is not the sealed one.
        MissingExtra: the engine is not installed; names the pip command.
        HealthError: the engine refuses the file.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    missing: MissingExtra | None = None
    for candidate, choice in candidates(folder, manifest, variant):
        checked = bundle.read(folder, candidate.name)
        try:
            contract = contract_of(checked)
            own = None if engines is None else _own_engine(folder, checked.manifest, candidate, engines)
            return open_variant(folder, candidate, contract, EngineOptions(threads, own=own), choice=choice)
        except MissingExtra as error:
            missing = missing or error
    if missing:
        raise missing
    runnable = [v.main for v in manifest.variants if v.format in plugins.names(PACKAGE)]
    if runnable:  # and yet no candidate: their files are not here
        raise BundleError(f"{runnable[0]} is missing from the bundle {folder}", "fetch or export the bundle again")
    formats = sorted({v.format for v in manifest.variants})
    raise UsageError(
        f"nothing in {folder} runs here: it holds {', '.join(formats)}",
        f"export it for one of: {', '.join(plugins.names(PACKAGE))}",
    )


def candidates(folder: Path, manifest: Manifest, wanted: str | None) -> list[tuple[Variant, str]]:
    """List the variants to try, best first, each with the reason; only those with a backend and their file here.

    Raises:
        UnknownName: the bundle has no variant of that name.
        UsageError: no backend runs the named variant's format.
    """
    if wanted is not None:
        named = manifest.variant(wanted)
        if named.format not in plugins.names(PACKAGE):
            runnable = [v.name for v in manifest.variants if v.format in plugins.names(PACKAGE)]
            raise UsageError(
                f"no engine runs {named.format} here (variant {wanted})",
                f"variants that can run: {', '.join(runnable) or 'none'}",
            )
        return [(named, "named by the caller")]
    here = [v for v in manifest.variants if v.format in plugins.names(PACKAGE) and (folder / v.main).is_file()]
    profile = device_profiles.detect()
    detected = [(v, "the detected hardware class") for v in here if profile and v.name == profile.name]
    others = [(v, f"first whose engine ({v.format}) is installed") for v in here if v not in [d for d, _ in detected]]
    return [*detected, *others]


def open_variant(
    folder: Path, variant: Variant, contract: Contract, options: EngineOptions | None = None, *, choice: str = ""
) -> Session | TextSession:
    """Open one variant whose files lie under ``folder``, sealed or not yet, and warm it.

    Raises:
        UnknownName: no backend runs that format.
        MissingExtra: the engine is not installed.
        HealthError: the engine refuses the file or fails on zeros.
    """
    backend = cast("Backend", plugins.load(PACKAGE, variant.format, "engine"))
    with extra(backend.extra):
        import numpy as np
    del np
    engine = backend.open(folder / variant.main, options or EngineOptions())
    session: Session | TextSession
    if contract.task == "text-generation":
        session = TextSession(cast("TextEngine", engine), variant, contract, choice)
    else:
        session = Session(cast("Engine", engine), variant, contract, choice)
    session.warm()
    return session


def _own_engine(folder: Path, manifest: Manifest, variant: Variant, engines: Path) -> OwnEngine:
    """Gather what a device's own engine of a variant depends on, and by what it is judged."""
    hashes = "".join(
        sorted(f"{entry.path} {entry.sha256}\n" for entry in manifest.files if entry.path in variant.files)
    )

    def samples() -> dict[str, Array]:
        from edgekit.runtime.acceptance import golden_arrays

        inputs, _ = golden_arrays(folder, manifest.golden, variant)
        given = inputs or ports.noise(manifest.inputs, batch=variant.batch if variant.batch > 0 else SAMPLES)
        return ports.to_file(given, ports.ports_for(manifest.inputs, variant.inputs))

    wanted = variant.expected
    return OwnEngine(
        folder=engines,
        model=manifest.name,
        digest=hashlib.sha256(hashes.encode()).hexdigest(),
        how=variant.engine or EngineBuild(),
        samples=samples,
        min_sqnr_db=wanted.min_sqnr_db if wanted else 25.0,
        min_top1_agreement=wanted.min_top1_agreement if wanted else 0.85,
    )


def contract_of(opened: bundle.Bundle) -> Contract:
    """Take from a bundle what a session needs."""
    manifest = opened.manifest
    return Contract(
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        task=manifest.task,
        name=manifest.name,
        version=manifest.version,
        preprocess=manifest.preprocess,
        text=manifest.text,
        postprocess=manifest.postprocess,
        detection=manifest.detection,
        embedding=manifest.embedding,
        digest=opened.digest,
        folder=opened.folder,
    )


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest without checking its files.

    Raises:
        UsageError: there is no bundle at that path.
        BundleError: it is no manifest.
    """
    path = folder / bundle.MANIFEST
    if not path.is_file():
        raise UsageError(f"{folder} is no bundle: it has no {bundle.MANIFEST}", "make one with: edgekit export")
    with path.open("rb") as file:
        return manifests.decode(file.read(manifests.MAX_MANIFEST_BYTES + 1))

"""Chooses which variant of a bundle runs here, and opens it. Knows no engine's package."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgekit import baseline as baselines
from edgekit import bundle, device_profiles, guards, plugins
from edgekit.device_profiles import RuntimeSettings
from edgekit.errors import BundleError, EngineCrashed, HealthError, MissingExtra, UsageError
from edgekit.manifest import EngineBuild
from edgekit.plugins import extra
from edgekit.runtime import backends, ports, series
from edgekit.runtime.backends import EngineOptions, OwnEngine
from edgekit.runtime.isolation import crashes
from edgekit.runtime.session import Contract, Session, TextSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.baseline import Baseline
    from edgekit.device_profiles import DeviceProfile
    from edgekit.manifest import Manifest, Variant
    from edgekit.runtime.backends import Backend, Engine, TextEngine
    from edgekit.runtime.isolation import Isolation
    from edgekit.runtime.isolation.engine import IsolatedEngine, IsolatedText
    from edgekit.tensors import Array

    Reasons = list[tuple[Variant, str]]
    Told = list[tuple[str, str]]
    Opener = Callable[[Variant, str], Session | TextSession]

log = logging.getLogger(__name__)

PACKAGE = backends.__name__
SAMPLES = 4
"""So many random samples stand for golden inputs where a bundle has none."""


def load(  # noqa: PLR0913  # all but the first by their names
    path: str | Path,
    *,
    variant: str | None = None,
    threads: int = 0,
    context: int = 0,
    engines: Path | None = None,
    profile: str | None = None,
    isolated: bool | Isolation = False,
) -> Session | TextSession:
    """Open a bundle, check its bytes, and return a warm session.

    The variant is the named one; else the one of this hardware class; else the first whose engine is installed and
    takes it: one that does not open is left for the next, with a warning. ``session.considered`` tells what became of
    each.

    The hardware class is ``profile`` (a name, or a ``.toml`` file), else the detected one; how an engine runs is taken
    from it, or from the class that the variant is called by. ``threads`` 0 means one a core, and at most as many as
    the class has. ``context``: the tokens of a conversation with a language model; 0 means what it was trained for,
    where an eighth of the memory holds that. ``engines``: the folder of engines that this device builds for itself
    while the model serves already (TensorRT); ``None`` builds and uses none. ``isolated``: the engine gets a process of
    its own, which is started anew where it crashes; how it is watched, or ``True`` for the usual way.

    Raises:
        UsageError: no bundle there, or nothing in it can run here.
        UnknownName: the bundle has no such variant, or there is no such class.
        BundleError: a byte is not the sealed one.
        MissingExtra: the engine is not installed; names the pip command.
        HealthError: the format's guard or the engine refuses the file.
        EngineCrashed: the engine's own process died when it opened the file.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    given = device_profiles.load(profile) if profile else None

    def opened(candidate: Variant, choice: str) -> Session | TextSession:
        checked = bundle.read(folder, candidate.name)
        contract = contract_of(checked)
        if isolated:
            options = replace(options_for(candidate, given, threads), context=context)
            return _warmed(_isolated(contract, candidate, (options, engines), isolated), candidate, contract, choice)
        own = None if engines is None else own_engine(folder, checked.manifest, candidate, engines)
        options = replace(options_for(candidate, given, threads, own), context=context)
        return open_variant(folder, candidate, contract, options, choice=choice)

    tried, left = candidates(folder, manifest, variant, given)
    if not tried:
        raise _nothing_runs(folder, manifest)
    if variant is not None:
        session = opened(*tried[0])
        session.considered += tuple(left)
        return session
    return _first_that_opens(tried, left, opened)


def _first_that_opens(tried: Reasons, left: Told, opened: Opener) -> Session | TextSession:
    """Open the first variant whose engine is here and takes it.

    Raises:
        HealthError: no engine takes its file; the first refusal.
        MissingExtra: no engine is installed.
    """
    failures: list[MissingExtra | HealthError] = []
    told: Told = []
    for place, (candidate, choice) in enumerate(tried):
        try:
            session = opened(candidate, choice)
        except MissingExtra as error:
            failures.append(error)
            told.append((candidate.name, error.message))
        except HealthError as error:
            if place < len(tried) - 1:
                log.warning("variant %s does not open, the next one is tried: %s", candidate.name, error.message)
            failures.append(error)
            told.append((candidate.name, error.message))
        else:
            after = [(one.name, f"comes after {candidate.name}") for one, _ in tried[place + 1 :]]
            session.considered = (*told, *session.considered, *after, *left)
            return session
    # what fails on this device says more than what is not installed
    raise next((one for one in failures if isinstance(one, HealthError)), failures[0])


def _nothing_runs(folder: Path, manifest: Manifest) -> BundleError | UsageError:
    """Say why a bundle has no candidate."""
    absences = {v.format: backends.absence(v.format) for v in manifest.variants}
    runnable = [v.main for v in manifest.variants if not absences[v.format]]
    if runnable:  # and yet no candidate: their files are not here
        return BundleError(f"{runnable[0]} is missing from the bundle {folder}", "fetch or export the bundle again")
    return UsageError(
        f"nothing in {folder} runs here: it holds {', '.join(sorted(absences))}; {'; '.join(absences.values())}",
        f"export it for one of: {', '.join(name for name in plugins.names(PACKAGE) if not backends.absence(name))}",
    )


def candidates(
    folder: Path, manifest: Manifest, wanted: str | None, profile: DeviceProfile | None = None
) -> tuple[Reasons, Told]:
    """List the variants to try, best first, each with the reason; and the others by name, with why not.

    Tried are: the one named alone; else that of the hardware class ``profile``, by default the detected one; then the
    others in the order of the manifest. None without an engine for this machine, or without its file here.

    Raises:
        UnknownName: the bundle has no variant of that name.
        UsageError: no engine runs the named variant's format on this machine.
    """
    if wanted is not None:
        named = manifest.variant(wanted)
        _refuse_absent(named, manifest)
        return [(named, "named by the caller")], [
            (v.name, f"{wanted} was named") for v in manifest.variants if v.name != wanted
        ]
    absences = {v.name: backends.absence(v.format) or _without_file(folder, v) for v in manifest.variants}
    which = "given" if profile else "detected"
    profile = profile or device_profiles.detect()
    here = [v for v in manifest.variants if not absences[v.name]]
    first = [(v, f"the {which} hardware class") for v in here if profile and v.name == profile.name]
    rest = [(v, f"first whose engine ({v.format}) is installed") for v in here if not profile or v.name != profile.name]
    return [*first, *rest], [(name, why) for name, why in absences.items() if why]


def _without_file(folder: Path, variant: Variant) -> str:
    return "" if (folder / variant.main).is_file() else "its file is not in this folder"


def _refuse_absent(named: Variant, manifest: Manifest) -> None:
    why = backends.absence(named.format)
    if why:
        runnable = [v.name for v in manifest.variants if not backends.absence(v.format)]
        raise UsageError(
            f"no engine runs {named.format} here (variant {named.name}): {why}",
            f"variants that can run: {', '.join(runnable) or 'none'}",
        )


def options_for(
    variant: Variant, profile: DeviceProfile | None, threads: int = 0, own: OwnEngine | None = None
) -> EngineOptions:
    """Return what an engine is told of the hardware class: the given one, the variant's, or the detected one."""
    classes = [name for name in (variant.name, variant.name.partition(".")[0]) if name in device_profiles.names()]
    known = device_profiles.load(classes[0]) if classes else None
    found = profile or known or device_profiles.detect()
    if found is None:
        return EngineOptions(threads, runtime=RuntimeSettings(), own=own)
    return EngineOptions(threads, most_threads=found.threads, runtime=found.runtime, own=own)


def open_variant(
    folder: Path, variant: Variant, contract: Contract, options: EngineOptions | None = None, *, choice: str = ""
) -> Session | TextSession:
    """Open one variant whose files lie under ``folder``, sealed or not yet, and warm it.

    Raises:
        UnknownName: no backend runs that format.
        MissingExtra: the engine is not installed.
        HealthError: the guard or the engine refuses the file, or fails on zeros.
    """
    return _warmed(open_engine(folder, variant, options or EngineOptions()), variant, contract, choice)


def open_engine(folder: Path, variant: Variant, options: EngineOptions) -> Engine | TextEngine:
    """Open the engine of one variant, in this process, once its format's guard has looked at the file.

    Raises:
        UnknownName: no backend runs that format.
        MissingExtra: the engine is not installed.
        HealthError: the guard or the engine refuses the file.
    """
    backend = cast("Backend", plugins.load(PACKAGE, variant.format, "engine"))
    try:
        guards.check(folder, variant)
    except BundleError as error:  # its bytes are the sealed ones: to fetch them again would change nothing
        raise HealthError(f"edgekit refuses {error.message}", error.hint) from error
    with extra(backend.extra):
        import numpy as np
    del np
    return backend.open(folder / variant.main, options)


def _isolated(
    contract: Contract, variant: Variant, given: tuple[EngineOptions, Path | None], isolated: bool | Isolation
) -> IsolatedEngine | IsolatedText:
    from edgekit.runtime.isolation import Isolation
    from edgekit.runtime.isolation.engine import IsolatedEngine, IsolatedText
    from edgekit.runtime.isolation.lanes import Start

    assert contract.folder is not None  # noqa: S101  # of a bundle that was opened
    options, engines = given
    start = Start(
        folder=str(contract.folder.resolve()),
        variant=variant,
        threads=options.threads,
        most_threads=options.most_threads,
        runtime=options.runtime,
        context=options.context,
        engines=None if engines is None else str(engines.resolve()),
    )
    kind = IsolatedText if contract.task == "text-generation" else IsolatedEngine
    return kind(start, contract.digest, isolated if isinstance(isolated, Isolation) else Isolation())


def _warmed(engine: Engine | TextEngine, variant: Variant, contract: Contract, choice: str) -> Session | TextSession:
    session: Session | TextSession
    if contract.task == "text-generation":
        session = TextSession(cast("TextEngine", engine), variant, contract, choice)
    else:
        session = Session(cast("Engine", engine), variant, contract, choice)
    try:
        session.warm()
    except EngineCrashed as error:
        condition = session.condition()
        session.close()
        how = " and ".join(map(crashes.told, condition.crashes)) if condition else ""
        raise EngineCrashed(f"the engine of {contract.name} did not survive its first input: it {how}") from error
    except BaseException:
        session.close()  # so that no process is left over
        raise
    return session


def own_engine(folder: Path, manifest: Manifest, variant: Variant, engines: Path) -> OwnEngine:
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
        baseline=_baseline(opened),
        digest=opened.digest,
        folder=opened.folder,
    )


def _baseline(opened: bundle.Bundle) -> Baseline | None:
    """Read what the model's data looked like, and refuse what is not drawn as this runtime draws it."""
    manifest = opened.manifest
    if manifest.baseline is None:
        return None
    found = baselines.decode(opened.path(manifest.baseline).read_bytes(), manifest.inputs, manifest.outputs)
    shapes = {(role, spec.name): spec.shape for role in ("input", "output") for spec in getattr(manifest, f"{role}s")}
    for observed in found.tensors:
        drawn = series.names(observed, shapes[observed.role, observed.tensor])
        if tuple(one.name for one in observed.series) != drawn:
            raise BundleError(f"the baseline of {observed.tensor!r} has other series than {', '.join(drawn[:4])}, …")
    return found


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest without checking its files.

    Raises:
        UsageError: there is no bundle at that path.
        BundleError: it is no manifest.
    """
    return bundle.read_manifest(folder)

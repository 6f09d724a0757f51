"""From a model to one sealed bundle with a file for every hardware class, each compared with the model first.

Knows no format: exporters are found by the name a device profile gives.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from edgekit import baseline as baseline_file
from edgekit import bundle as bundles
from edgekit import device_profiles, plugins
from edgekit.durable import no_room
from edgekit.errors import EdgekitError, ExportError, ParityError, UsageError, from_os, out_of_memory
from edgekit.export import alone, documents, elsewhere, locating, parity, targets
from edgekit.export.baselines import baseline_of, shifts_of
from edgekit.export.golden import expected_of, golden_count, golden_of, reference_of
from edgekit.export.refusal import REFUSALS, UnsupportedOperator, reason
from edgekit.manifest import Manifest, Parity, Variant
from edgekit.model import GgufFile, LlamaFolder, Model, TorchNetwork
from edgekit.plan import halves
from edgekit.progress import Progress, silent
from edgekit.workload import huggingface_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekit.bundle import Bundle
    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.parity import Reference
    from edgekit.export.targets import Artifact, Exporter

PACKAGE = targets.__name__


@dataclass(frozen=True)
class TargetResult:
    """What became of one hardware class: its variant and size in bytes, or the error that stopped it.

    ``shifts``: how far the file's answers lie from the model's, by series of the baseline.
    """

    target: str
    format: str
    variant: Variant | None = None
    size: int = 0
    shifts: Mapping[str, float] = field(default_factory=dict)
    error: EdgekitError | None = None


@dataclass(frozen=True)
class ExportResult:
    """The sealed bundle, ``None`` where no target succeeded, and one row a target."""

    bundle: Bundle | None
    rows: tuple[TargetResult, ...]

    @property
    def first_error(self) -> EdgekitError | None:
        """The error of the first target that failed."""
        return next((row.error for row in self.rows if row.error), None)


def export(  # noqa: PLR0913  # three positional; the rest are keywords with a default
    model: Model,
    profiles: Sequence[DeviceProfile],
    folder: Path,
    *,
    version: str = "1",
    name: str | None = None,
    precision: str | None = None,
    progress: Progress = silent,
) -> ExportResult:
    """Write the model for every profile, compare each file with the model, and seal one bundle in ``folder``.

    A target that fails leaves the others; nothing is written if all fail. The same input gives the same digest.
    ``precision``: ``fp32`` ignores the plan, ``fp16`` makes halves of a float network; for language models the tensor
    type (``f16``, ``q8_0``, …).

    Raises:
        UsageError: no target, one given twice, a name that is no file name, a licence that is no SPDX expression, a
            folder of something else, no calibration data, or a precision the model has no plan for.
        ExportError: the model takes or gives complex numbers, which no format does.
        ResourceError: the bundle has no room on its disk.
    """
    documents.check_license(model.license)
    _refuse_names(name or model.name, version, [profile.name for profile in profiles])
    _refuse_complex_ends(model)
    bundles.refuse_foreign(folder)
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as source:
        model = _with_precision(_as_language_model(model, profiles, Path(source)), precision)
        reference = reference_of(model, name or model.name, version)
        progress("baseline", 0, 0)
        reference = replace(reference, baseline=baseline_of(model, reference.contract))
        rows = tuple(
            _export_one(model, _adapted(profile, precision), reference, scratch=Path(scratch), progress=progress)
            for profile in profiles
        )
        rows = _with_holders(rows, model, progress)
        done = [row for row in rows if row.variant]
        if not done:
            return ExportResult(None, rows)
        return ExportResult(_seal(model, reference, done, scratch=Path(scratch), folder=folder), rows)


def _refuse_names(name: str, version: str, given: Sequence[str]) -> None:
    if not given or len(set(given)) != len(given):
        raise UsageError(f"give each target once, these are {', '.join(given) or 'none'}")
    for word in (name, *given):
        # Names become paths in the bundle; golden/ is taken.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", word) or word == "golden":
            raise UsageError(f"{word!r} cannot name a bundle or target", "use letters, digits, dot, dash, underscore")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,99}", version):
        raise UsageError(f"{version!r} cannot be a version", "write it as 1, 1.2.0 or 2026-05-01")


def _refuse_complex_ends(model: Model) -> None:
    for spec in (*model.inputs, *model.outputs):
        if spec.dtype.startswith("complex"):
            raise ExportError(
                f"{spec.name!r} of {model.name} is {spec.dtype}, and no format takes or gives complex numbers",
                "let the network take and give real and imaginary parts as floats (torch.view_as_real)",
            )


def _as_language_model(model: Model, profiles: Sequence[DeviceProfile], folder: Path) -> Model:
    """Write a network that came from a Hugging Face folder as one again, where every target is llama.cpp."""
    if not isinstance(model.network, TorchNetwork) or model.network.folder is None:
        return model
    if any(profile.format != "gguf" for profile in profiles):
        return model
    huggingface_folder(model, folder)
    network = LlamaFolder(folder)
    return replace(model, network=network, task="text-generation", inputs=(), outputs=(), plan=None)


def _with_precision(model: Model, precision: str | None) -> Model:
    if isinstance(model.network, GgufFile) and precision:
        raise UsageError(
            f"{model.name} is a finished GGUF file, sealed as it stands", "drop --precision, or give the float folder"
        )
    if isinstance(model.network, LlamaFolder) or precision in (None, model.precision):
        return model
    if precision == "fp16" and model.plan is None:
        return replace(model, plan=halves())
    if precision == "fp32":
        return replace(model, plan=None)
    raise UsageError(
        f"{model.name} is {model.precision}, it cannot be exported as {precision}",
        "compress it with a recipe that quantizes to that, or give --precision fp32",
    )


def _adapted(profile: DeviceProfile, precision: str | None) -> DeviceProfile:
    if precision is None:
        return profile
    return msgspec.structs.replace(profile, options={**profile.options, "precision": precision})


def _export_one(
    model: Model, profile: DeviceProfile, reference: Reference, *, scratch: Path, progress: Progress
) -> TargetResult:
    progress(f"export {profile.name}", 0, 0)
    folder = scratch / profile.name
    shifts: dict[str, float] = {}
    try:
        folder.mkdir()
        _refuse_small_disk(model, scratch)
        exporter = cast("Exporter", plugins.load(PACKAGE, profile.format, "format"))
        artifact = exporter.export(model, profile, folder, progress)
        variant = _variant(profile, artifact)
        _refuse_too_large(profile, variant, scratch)
        progress(f"parity {profile.name}", 0, 0)
        try:
            proof = parity.check(exporter, variant, scratch, reference)
        except ParityError as error:
            raise _located(error, model, profile, variant) from error.__cause__
        variant = msgspec.structs.replace(variant, parity=proof.parity)
        if proof.outputs:
            variant = msgspec.structs.replace(
                variant, expected=expected_of(variant, proof.outputs, scratch, golden_count(reference))
            )
            shifts = shifts_of(reference, proof.outputs)
            progress(f"parity {profile.name} on its instruction set", 0, 0)
            asked = elsewhere.ask(profile, variant, proof.outputs, folder=scratch, reference=reference)
            variant = msgspec.structs.replace(variant, elsewhere=asked)
    except EdgekitError as error:
        return _failed(profile, out_of_memory(error) or error, folder)
    except OSError as error:
        return _failed(profile, no_room(scratch, profile.name, error=error) or from_os(error, "export"), folder)
    except (*REFUSALS, MemoryError) as error:  # of an exporter, a stranger's among them: the other targets go on
        return _failed(profile, out_of_memory(error) or _fault(profile, error), folder)
    size = sum((scratch / path).stat().st_size for path in variant.files)
    return TargetResult(profile.name, profile.format, variant, size, shifts)


def _refuse_small_disk(model: Model, scratch: Path) -> None:
    """Stop before a converter does: LiteRT's ends the process on a full disk, Core ML's leaves its half file."""
    if not isinstance(model.network, TorchNetwork):
        return
    needed = sum(one.numel() * one.element_size() for one in model.network.module.parameters())
    if lack := no_room(scratch, f"the weights of {model.name}", needed):
        raise lack


def _failed(profile: DeviceProfile, error: EdgekitError, folder: Path) -> TargetResult:
    """Keep the error of one target, and free what it has written for the targets behind it.

    Engines written in C++ say of a full disk what they like.
    """
    error = no_room(folder, profile.name) or error
    shutil.rmtree(folder, ignore_errors=True)
    return TargetResult(profile.name, profile.format, error=error)


def _fault(profile: DeviceProfile, error: BaseException) -> ExportError:
    made = ExportError(
        f"the exporter of {profile.format} failed: {type(error).__name__}: {reason(error)}",
        "this is a fault of the exporter; use another target, and report it with the trace that --debug shows",
    )
    made.__cause__ = error
    return made


def _with_holders(rows: tuple[TargetResult, ...], model: Model, progress: Progress) -> tuple[TargetResult, ...]:
    """Say with each operator that a format lacks which formats hold it; each is asked for that operator alone."""
    known = {row.format for row in rows if row.variant}
    asked: dict[str, set[str]] = {}

    def told(row: TargetResult) -> TargetResult:
        error = row.error
        if not isinstance(error, UnsupportedOperator) or not error.nodes:
            return row
        lacking = {one.format for one in rows if isinstance(one.error, UnsupportedOperator) and
                   set(one.error.nodes) & set(error.nodes)}  # fmt: skip
        node = error.nodes[0]
        if node not in asked:
            others = [name for name in plugins.names(PACKAGE) if name not in known | lacking]
            asked[node] = _holders(model, node, others, progress) | known
        holders = ", ".join(sorted(asked[node])) or "none of the formats here"
        hint = f"{error.hint}; it is held by: {holders}"
        return replace(row, error=UnsupportedOperator(error.message, hint, error.nodes))

    return tuple(map(told, rows))


def _holders(model: Model, node: str, formats: Sequence[str], progress: Progress) -> set[str]:
    """Return the formats that hold the part of the network around one node, in float, and compute it."""
    part = alone.part_of(model, node)
    if part is None:
        return set()
    reference = reference_of(part, "part", "1")
    found = set()
    for number, name in enumerate(formats):
        progress(f"ask which formats hold {node}", number, len(formats))
        with tempfile.TemporaryDirectory() as scratch:
            row = _export_one(part, device_profiles.of_format(name), reference, scratch=Path(scratch), progress=silent)
        if row.variant and row.variant.parity.status != "unverified":
            found.add(name)
    return found


def _refuse_too_large(profile: DeviceProfile, variant: Variant, scratch: Path) -> None:
    size = sum((scratch / path).stat().st_size for path in variant.files)
    if profile.memory_mb and size > profile.memory_mb * 2**20:
        raise ExportError(
            f"{variant.main} has {size / 2**20:.0f} MiB, and {profile.name} has {profile.memory_mb} MiB of memory",
            "quantize it to fewer bits, or choose a larger class (edgekit devices list)",
        )


def _located(error: ParityError, model: Model, profile: DeviceProfile, variant: Variant) -> ParityError:
    """Say in an error at which layer the file breaks, where that can be found out."""
    limit = parity.limit_of(variant.precision)
    broken = locating.first_broken(model, profile, _variant, limit.sqnr_db) if limit else None
    return ParityError(f"{error.message}; {broken}", error.hint) if broken else error


def _variant(profile: DeviceProfile, artifact: Artifact) -> Variant:
    return Variant(
        name=profile.name,
        format=profile.format,
        precision=artifact.precision,
        main=f"{profile.name}/{artifact.main}",
        files=tuple(sorted(f"{profile.name}/{path}" for path in artifact.files)),
        parity=Parity(status="unverified", reason="not compared yet"),
        inputs=artifact.inputs,
        outputs=artifact.outputs,
        batch=artifact.batch,
        requires=dict(sorted(artifact.requires.items())),
        operators=dict(sorted(artifact.operators.items())),
        weights=dict(artifact.weights),
        notes=artifact.notes,
        engine=artifact.engine,
    )


def _seal(model: Model, reference: Reference, rows: Sequence[TargetResult], *, scratch: Path, folder: Path) -> Bundle:
    variants, sources = _stored_once([row.variant for row in rows if row.variant], scratch)
    golden, golden_files = golden_of(reference, variants, scratch)
    contract = reference.contract
    if contract.text and model.data and model.data.text:
        sources[contract.text.tokenizer] = model.data.text.tokenizer
    if reference.baseline:
        shifts = {row.target: dict(sorted(row.shifts.items())) for row in rows if row.shifts}
        told = msgspec.structs.replace(reference.baseline, shifts=shifts)
        sources[baseline_file.FILE] = baseline_file.encode(told)
    draft = Manifest(
        name=contract.name,
        version=contract.version,
        task=contract.task,
        inputs=contract.inputs,
        outputs=contract.outputs,
        preprocess=contract.preprocess,
        text=contract.text,
        postprocess=contract.postprocess,
        detection=contract.detection,
        embedding=contract.embedding,
        variants=variants,
        golden=golden,
        lineage=model.lineage,
        license=model.license,
        baseline=baseline_file.FILE if reference.baseline else None,
        files=(),
    )
    found = documents.documents_of(model, draft, {**sources, **golden_files})
    named = {documents.PATHS[document]: content for document, content in found.items()}
    draft = msgspec.structs.replace(draft, documents={document: documents.PATHS[document] for document in found})
    return bundles.seal(folder, draft, {**sources, **golden_files, **named})


def _stored_once(variants: Sequence[Variant], scratch: Path) -> tuple[tuple[Variant, ...], dict[str, Path | bytes]]:
    """Let variants whose single files are equal share one file."""
    sources: dict[str, Path | bytes] = {}
    first: dict[str, str] = {}
    kept = []
    for variant in variants:
        path = variant.main
        if len(variant.files) == 1:
            path = first.setdefault(bundles.hash_file(scratch / path), path)
            variant = msgspec.structs.replace(variant, main=path, files=(path,))  # noqa: PLW2901  # the shared one
        sources |= {file: scratch / file for file in variant.claims}
        kept.append(variant)
    return tuple(kept), sources

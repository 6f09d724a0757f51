"""Does the written file compute what the compressed model computes? Measures and judges; writes nothing.

An engine that runs here answers it (``checked``), else the exporter's own reading of the file (``evaluated``),
else nobody (``unverified``, with the reason).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import msgspec

from edgekit.errors import ExportError, HealthError, MissingExtra, ParityError
from edgekit.export import labelled, spoken
from edgekit.export.quiet import silence
from edgekit.export.targets import Evaluator
from edgekit.manifest import Parity
from edgekit.model import run_batched
from edgekit.runtime import Contract, Session, backends, open_variant
from edgekit.runtime.backends import EngineOptions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.baseline import Baseline
    from edgekit.export.labelled import Labels
    from edgekit.export.targets import Exporter
    from edgekit.manifest import Labelled, Variant
    from edgekit.model import Split
    from edgekit.tensors import Array

BATCH = 16
FEW, SMALL = 6, (1, 3)
"""How many samples are run again in smaller batches where a file takes any size: one, and one that nothing divides."""
CAP_DB = 200.0

Status = Literal["checked", "evaluated"]


@dataclass(frozen=True)
class Limit:
    """What a file of some precision must hold: signal over error in dB, and how often the best class is the same."""

    sqnr_db: float
    top1: float


LIMITS = {
    "fp32": Limit(60.0, 0.99),
    "fp16": Limit(30.0, 0.97),
    "f32": Limit(60.0, 0.99),
    "f16": Limit(40.0, 0.97),
    "q8_0": Limit(25.0, 0.80),
    "bf16": Limit(30.0, 0.90),
    "q5_1": Limit(12.0, 0.30),
    "q5_0": Limit(12.0, 0.30),
    "q4_1": Limit(6.0, 0.10),
    "q4_0": Limit(6.0, 0.10),
    "int8": Limit(10.0, 0.85),
    "int8-dynamic": Limit(10.0, 0.85),
    "int8-weights": Limit(15.0, 0.85),
    "w4a8": Limit(3.0, 0.30),
    "wmixeda8": Limit(3.0, 0.30),
    "int4-weights": Limit(3.0, 0.30),
    "int4-dynamic": Limit(3.0, 0.30),
    "mixed-weights": Limit(3.0, 0.30),
    "mixed-dynamic": Limit(3.0, 0.30),
}
"""By precision. A faithful file is far above: fp32 100 dB and more, fp16 50, int8 20 to 30. The limits catch a wrong
layout, scale or operator, which falls to 0 dB, not a model that quantizes badly: the validation data judges that.
Language models are compared on tokens without sense, whose best successor hangs by a thread: there SQNR tells."""


@dataclass(frozen=True)
class Proof:
    """What was measured, and what the file answered where it ran in its engine here."""

    parity: Parity
    outputs: Mapping[str, Array] | None = None


@dataclass(frozen=True)
class Reference:
    """Inputs with the outputs of the compressed float model. ``scores`` names the output whose best entry counts."""

    inputs: Split
    outputs: Mapping[str, Array]
    contract: Contract
    scores: str | None = None
    labels: Labels | None = None
    baseline: Baseline | None = None


def check(exporter: Exporter, variant: Variant, folder: Path, reference: Reference) -> Proof:
    """Run the variant's file, which lies under ``folder``, on the reference and judge the figures.

    Raises:
        ParityError: the figures are below the limits of the variant's precision, or the engine refuses the file.
    """
    missing = f"no engine for {variant.format} runs on this machine"
    if reference.contract.task == "text-generation":
        loaded = _loads(variant, folder, reference)
        if not reference.outputs:
            return Proof(loaded)
    if _has_engine(variant, reference):
        try:
            outputs = _run(variant, folder, reference)
            judged = _judge(variant, reference, outputs, "checked")
            sizes = _same_in_small_batches(variant, folder, reference, outputs)
            judged = msgspec.structs.replace(judged, labelled=_labelled(variant, folder, reference))
            return Proof(msgspec.structs.replace(judged, batches=sizes), outputs)
        except MissingExtra as error:
            missing = error.message
        except HealthError as error:
            raise ParityError(f"{variant.name}: {error.message}", error.hint) from error
    if not isinstance(exporter, Evaluator):
        return Proof(Parity(status="unverified", reason=missing))
    try:
        outputs = exporter.evaluate(folder / variant.main, reference.inputs.inputs)
    except NotImplementedError as error:
        return Proof(Parity(status="unverified", reason=f"{missing}; {error}"))
    if variant.format == "gguf" and set(outputs) == {"logits"}:
        return Proof(_said(variant, folder, reference, outputs))
    if reference.labels is not None:
        missing += "; its metric on labelled data is not measured, which takes an engine"
    return Proof(_judge(variant, reference, outputs, "evaluated", reason=missing))


def _said(variant: Variant, folder: Path, reference: Reference, outputs: Mapping[str, Array]) -> Parity:
    """Judge what was computed from a language model's bytes, and ask llama.cpp whether it computes the same."""
    told = "logits were computed from the file's bytes in PyTorch"
    judged = _judge(variant, reference, outputs, "evaluated", reason=told)
    try:
        agreed = spoken.agreed(
            folder / variant.main, variant.precision, reference.inputs.inputs["input_ids"], outputs["logits"]
        )
    except MissingExtra as error:
        return msgspec.structs.replace(judged, reason=f"{told}; {error.message}")
    except HealthError as error:
        raise ParityError(f"{variant.name}: {error.message}", error.hint) from error
    if not agreed:
        return judged
    return msgspec.structs.replace(judged, status="checked", reason=f"{told}; {agreed}")


def _labelled(variant: Variant, folder: Path, reference: Reference) -> Labelled | None:
    """Measure the file on labelled samples, where there are some.

    Raises:
        ParityError: it names the label less often than the model by more than its precision may cost.
    """
    if reference.labels is None:
        return None
    outputs = _run(variant, folder, replace(reference, inputs=reference.labels.split))
    found = labelled.measured(reference.labels, outputs, variant.precision)
    if found.model - found.file > found.max_loss:
        raise ParityError(
            f"{variant.main} loses too much on labelled data: {found}",
            "calibrate on data like the validation split, leave sensitive layers in float, or use more bits",
        )
    return found


def computed(exporter: Exporter, variant: Variant, folder: Path, reference: Reference) -> Mapping[str, Array]:
    """Return what the variant's file answers to the reference's inputs, in its engine or from its bytes; no verdict.

    Raises:
        MissingExtra, HealthError: the engine is not installed, or refuses the file.
        ExportError: nothing here computes the format.
    """
    if _has_engine(variant, reference):
        return _run(variant, folder, reference)
    if isinstance(exporter, Evaluator):
        return exporter.evaluate(folder / variant.main, reference.inputs.inputs)
    raise ExportError(f"nothing here computes {variant.format}")


def _loads(variant: Variant, folder: Path, reference: Reference) -> Parity:
    """Judge a file that is the model itself: there is nothing to compare it with, but its engine has to take it."""
    told = "the file is the model itself, sealed as it was given"
    try:
        with silence():
            open_variant(folder, variant, reference.contract, EngineOptions(threads=1, context=256)).close()
    except MissingExtra as error:
        return Parity(status="unverified", reason=f"{told}; {error.message}")
    except HealthError as error:
        raise ParityError(f"{variant.name}: {error.message}", error.hint) from error
    return Parity(status="checked", reason=f"{told}; its engine loads it")


def _has_engine(variant: Variant, reference: Reference) -> bool:
    return reference.contract.task != "text-generation" and not backends.absence(variant.format)


def _same_in_small_batches(
    variant: Variant, folder: Path, reference: Reference, outputs: Mapping[str, Array]
) -> tuple[int, ...]:
    """Run a few samples in small batches, where the file takes any size; return in which sizes it has run.

    Raises:
        ParityError: their answers lie further from those in large batches than the file may lie from the model, or the
            engine refuses the size.
    """
    if variant.batch != -1:
        return (variant.batch,)
    limit = limit_of(variant.precision)
    few = replace(
        reference,
        inputs=reference.inputs.head(FEW),
        outputs={name: outputs[name][:FEW] for name in reference.outputs},
        scores=None,
    )
    for size in SMALL:
        try:
            apart = measure(few, _run(variant, folder, few, size)).sqnr_db
        except HealthError as error:
            raise ParityError(f"{variant.main}, in batches of {size}: {error.message}", error.hint) from error
        if limit is not None and apart < limit.sqnr_db:
            raise ParityError(
                f"{variant.main} answers otherwise in batches of {size}: {apart:.1f} dB from its answers in batches of"
                f" {BATCH} (at least {limit.sqnr_db})",
                "the network mixes samples of a batch, or the exporter took a batch's size for a constant",
            )
    return (*SMALL, min(BATCH, len(reference.inputs)))


def _run(variant: Variant, folder: Path, reference: Reference, size: int = BATCH) -> dict[str, Array]:
    with silence():  # LiteRT announces its delegates on stderr
        session = open_variant(folder, variant, reference.contract, EngineOptions(threads=1))
    if not isinstance(session, Session):
        raise HealthError(f"the engine of {variant.format} gives text, the model gives tensors")
    with session:
        return run_batched(session, reference.inputs, size)


def _judge(
    variant: Variant, reference: Reference, outputs: Mapping[str, Array], status: Status, *, reason: str = ""
) -> Parity:
    limit = limit_of(variant.precision)
    if limit is None:
        raise ExportError(
            f"{variant.name}: nobody knows what a {variant.precision} file must hold",
            f"let the exporter say one of {', '.join(LIMITS)}",
        )
    figures = measure(reference, outputs)
    parity = Parity(
        status=status,
        reason=reason,
        samples=len(reference.inputs),
        max_abs_error=figures.max_abs_error,
        sqnr_db=figures.sqnr_db,
        top1_agreement=figures.top1,
        min_sqnr_db=limit.sqnr_db,
        min_top1_agreement=None if figures.top1 is None else limit.top1,
    )
    if figures.sqnr_db < limit.sqnr_db or (figures.top1 is not None and figures.top1 < limit.top1):
        top1 = "" if figures.top1 is None else f", top-1 agreement {figures.top1:.3f} (at least {limit.top1})"
        raise ParityError(
            f"{variant.main} computes something else: SQNR {figures.sqnr_db:.1f} dB (at least {limit.sqnr_db}){top1}",
            _way_out(reference),
        )
    return parity


def limit_of(precision: str) -> Limit | None:
    """Return what a file must hold; 5 and 6 bits are judged as 4 are, fewer than 4 only by running at all."""
    if precision in LIMITS:
        return LIMITS[precision]
    if mixture := re.fullmatch(r"i?q(\d)_.*", precision):  # llama.cpp's: five and six bits as Q5_0, four as Q4_0
        return LIMITS[f"q{min(5, int(mixture[1]))}_0"] if int(mixture[1]) >= 4 else Limit(0.0, 0.0)
    if mixed := re.fullmatch(r"([\d.]+)bpw", precision):  # by its bits a weight, as the plain type below it
        return LIMITS["q8_0" if float(mixed[1]) >= 8.5 else "q5_0" if float(mixed[1]) >= 5.5 else "q4_0"]
    found = re.fullmatch(r"(?:int|w)(\d)(a8|-weights|-dynamic)", precision)
    if found is None:
        return None
    return LIMITS["w4a8"] if int(found[1]) >= 4 else Limit(0.0, 0.0)


def _way_out(reference: Reference) -> str:
    if reference.contract.task == "text-generation":
        return "choose a wider type: --precision q8_0 or f16"
    return "calibrate on data like the real one, leave sensitive layers in float, or use another target"


@dataclass(frozen=True)
class Figures:
    """How far outputs lie from the reference; the worst output counts.

    ``top1``: the share of equal best classes, or equal integers; ``None`` where there are neither.
    """

    max_abs_error: float
    sqnr_db: float
    top1: float | None


def measure(reference: Reference, outputs: Mapping[str, Array]) -> Figures:
    """Compare outputs with the reference: SQNR = 10 log10(sum of squares / sum of squared errors), capped at 200 dB.

    Figures are rounded, so that a manifest reads well. Outputs with NaN measure -200 dB.

    Raises:
        ParityError: an output has another shape than the reference's.
    """
    import numpy as np

    errors, sqnrs, same = [], [CAP_DB], []
    for name, want in reference.outputs.items():
        if outputs[name].shape != want.shape:
            raise ParityError(
                f"the file gives {name!r} of shape {list(outputs[name].shape)}, the model {list(want.shape)}",
                "use another target: this format computes an operator of the network otherwise",
            )
        if want.dtype.kind in "iub":
            same.append(float((np.asarray(outputs[name]) == want).mean()))
            continue
        error = np.asarray(outputs[name], np.float64) - want
        errors.append(float(np.abs(error).max()))
        sqnrs.append(_sqnr(float(np.square(want, dtype=np.float64).sum()), float(np.square(error).sum())))
    if reference.scores is not None:
        want, got = reference.outputs[reference.scores], outputs[reference.scores]
        same.append(float((want.argmax(-1) == got.argmax(-1)).mean()))
    top1 = round(min(same), 4) if same else None
    return Figures(float(f"{max(errors, default=0.0):.4g}"), round(min(sqnrs), 2), top1)


def _sqnr(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -CAP_DB
    if noise == 0:
        return CAP_DB
    return max(-CAP_DB, min(CAP_DB, 10 * math.log10(signal / noise))) if signal else -CAP_DB

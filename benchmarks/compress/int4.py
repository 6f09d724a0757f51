"""Int4 weights of image networks by post-training quantization, beside rounding to the nearest.

Weights have one scale a channel, some recipes a zero point besides; activations stay float unless the row says W4A8.
Data, seeds and judging pictures are those of int8.py; each recipe in `recipes/` says whether it was chosen on
validation pictures (`_choose.py`). A file is judged in ONNX Runtime where ONNX holds the plan, else the plan is
computed on the float network: the row says which.
Effective bits count the scales: bits of all planned weights, 32 for each scale and as many as a weight's for each zero
point, over the number of weights.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import _cifar
import numpy as np
from _setting import HERE, Row, gap, run, scores, sqnr, top1
from _subjects import EFFICIENTNET, PHOTOGRAPHS, Subject, cifar, efficientnet, wanted, write_onnx

from edgekit import grid
from edgekit.compress import compress, recipe
from edgekit.compress.layers import layers
from edgekit.compress.simulation import planned_network
from edgekit.errors import EdgekitError, ExportError
from edgekit.model import run_batched

if TYPE_CHECKING:
    from edgekit.model import Model
    from edgekit.tensors import Array

SEEDS = (0, 1, 2)
NAIVE = "round to nearest"


@dataclass(frozen=True)
class Trial:
    """One recipe on one network, with what it has to reach and whom it stands beside."""

    subject: str
    what: str
    recipe: str
    goal: str = ""
    bits_goal: str = ""


TRIALS = (
    Trial("resnet20", NAIVE, "int4-nearest"),
    Trial("resnet20", "edgekit", "int4-resnet", "value <= 0.8"),
    Trial("resnet20", "edgekit, W4A8", "w4a8-resnet"),
    Trial("resnet56", NAIVE, "int4-nearest"),
    Trial("resnet56", "edgekit", "int4-resnet", "value <= 0.5"),
    Trial("resnet56", "edgekit, W4A8", "w4a8-resnet"),
    Trial(EFFICIENTNET, NAIVE, "int4-nearest"),
    Trial(EFFICIENTNET, "edgekit", "int4-lite0", "value <= 3.0"),
    Trial(EFFICIENTNET, "edgekit, mixed 4 and 8 bit", "mixed-lite0", "value <= 1.0", "value <= 5.0"),
    Trial(EFFICIENTNET, "edgekit, W4A8", "w4a8-lite0"),
)


@dataclass(frozen=True)
class Found:
    """What one recipe gave: a value a seed."""

    drops: tuple[float, ...]
    noise: tuple[float, ...]
    seconds: float
    bits: float
    judged: str

    @property
    def drop(self) -> float:
        """The mean over the seeds, in points."""
        return round(float(np.mean(self.drops)), 4)


def main(quick: bool) -> list[Row]:
    rows: list[Row] = []
    for name in wanted(("resnet20",) if quick else ("resnet20", "resnet56", EFFICIENTNET)):
        subject = _subject(name)
        if subject is None:
            rows.append(gap(f"{name}: int4", "no data at hand: see EDGEKIT_BENCH_DATA"))
            continue
        rows += _rows(subject.smaller(500) if quick else subject, SEEDS[:1] if quick else SEEDS)
    return rows


def _subject(name: str) -> Subject | None:
    if name == EFFICIENTNET:
        return efficientnet(128) if PHOTOGRAPHS.is_file() else None
    return cifar(name) if _cifar.there() else None


def _rows(subject: Subject, seeds: tuple[int, ...]) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        reference = scores(subject.float_file(folder), subject.test.inputs)
        plain = top1(reference, _labels(subject))
        rows = [Row(f"{subject.name}: fp32 top-1 on {len(subject.test)} test pictures", plain, "%")]
        naive: Found | None = None
        for trial in (trial for trial in TRIALS if trial.subject == subject.name):
            try:
                found = _found(subject, trial, seeds if trial.what != NAIVE else seeds[:1], (folder, reference))
            except EdgekitError as error:
                rows.append(Row(f"{subject.name}: drop, {trial.what}", None, str(error)[:120], goal=trial.goal))
                continue
            rows += _trial_rows(trial, found, naive)
            naive = naive or found
    return rows


def _trial_rows(trial: Trial, found: Found, naive: Found | None) -> list[Row]:
    each = " ".join(f"{drop:.2f}" for drop in found.drops)
    noise = f"SQNR {np.mean(found.noise):.1f} dB"
    what = f"{trial.subject}: drop, {trial.what} (seeds {each}; {noise}; {found.bits:.2f} bits; {found.judged})"
    beside = (NAIVE, naive.drop) if naive else ("", None)
    rows = [Row(what, found.drop, "points", *beside, trial.goal)]
    if trial.bits_goal:
        rows.append(Row(f"{trial.subject}: effective bits, {trial.what}", found.bits, "bits", goal=trial.bits_goal))
    if naive:
        rows.append(Row(f"{trial.subject}: time of the passes, {trial.what}", found.seconds, "s", NAIVE, naive.seconds))
    return rows


def _found(subject: Subject, trial: Trial, seeds: tuple[int, ...], reference: tuple[Path, Array]) -> Found:
    passes = recipe.read(HERE / "recipes" / f"{trial.recipe}.toml")
    folder, plain = reference
    labels = _labels(subject)
    drops, noise, seconds, judged, bits = [], [], [], "", 0.0
    for seed in seeds:
        began = time.perf_counter()
        made = compress(subject.model(seed), passes.with_seed(seed))
        seconds.append(time.perf_counter() - began)
        given, judged = _judged(made, subject, folder)
        drops.append(top1(plain, labels) - top1(given, labels))
        noise.append(sqnr(given, plain))
        bits = effective_bits(made)
    return Found(tuple(drops), tuple(noise), min(seconds), bits, judged)


def _judged(made: Model, subject: Subject, folder: Path) -> tuple[Array, str]:
    try:
        path = write_onnx(made, folder / "try", folder / "try.onnx")
    except ExportError:
        found = run_batched(planned_network(made), subject.test, 100)
        return next(iter(found.values())), "as planned"
    return scores(path, subject.test.inputs), "ONNX Runtime"


def effective_bits(made: Model) -> float:
    """Return the mean bits of a planned weight, scales included."""
    assert made.plan is not None, "the recipe quantizes"
    values = {layer.weight: layer.values for layer in layers(made)}
    stored, count = 0, 0
    for name, rule in made.plan.weights.items():
        moved = np.moveaxis(values[name], 0, rule.axis)
        each = 32 + (rule.bits if rule.zeros else 0)
        stored += rule.bits * moved.size + each * grid.scales_of(moved, rule).size
        count += math.prod(moved.shape)
    return stored / count


def _labels(subject: Subject) -> Array:
    assert subject.test.labels is not None, "what judges has labels"
    return subject.test.labels


if __name__ == "__main__":
    run("Int4 weights of image networks, post-training", main)

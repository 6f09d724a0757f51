"""Int8 post-training quantization of image networks: accuracy, time and memory, beside everybody who does the same.

CIFAR-10 ResNets calibrate on 512 train pictures (edgekit's recipe takes 128 of them; one peer's row does the same) and
are judged on 10,000 test pictures; EfficientNet-Lite0 calibrates on 32 photographs and is judged on 600 that nothing
else saw. Three calibration seeds; a drop is the mean over them. Every contender begins at the same float ONNX file
(torchao at the module), gets the same samples, runs in a process of its own on one thread of one core, and its file is
judged in ONNX Runtime. Each recipe in `recipes/` says whether it was chosen on validation pictures (`_choose.py`).

Judged are the drop, alone and beside the best peer's; the lead of that peer, which is to be chance: below two standard
errors of the difference picture by picture; and the wall time to the file, imports and all, at most 0.7 times that of
the fastest peer that reaches our accuracy. Wall time wants an idle machine; CPU time, which is the same on a
loaded one, stands beside it without a goal, as do memory and the SQNR of the logits, which tells more than a drop of
less than 0.1 points. Peers that leave more than a tenth of the layers float are shown, and are no peers.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _cifar
import _peers
import numpy as np
from _setting import HERE, Row, gap, run, scores, sqnr, top1
from _subjects import EFFICIENTNET, PHOTOGRAPHS, Subject, cifar, efficientnet, wanted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgekit.tensors import Array

SEEDS = (0, 1, 2)
OURS = "edgekit"
UNSIGNED = {"activation_type": "QUInt8", "weight_type": "QInt8", "per_channel": True}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ORT, default": ("onnxruntime", {}),
    "ORT, u8s8 per channel": ("onnxruntime", UNSIGNED),
    "ORT, u8s8 per channel, 128 samples": ("onnxruntime", {**UNSIGNED, "samples": 128}),
    "ORT, u8s8 per channel, percentile": ("onnxruntime", {**UNSIGNED, "calibrate_method": "Percentile"}),
    "ORT, u8s8 per channel, entropy": ("onnxruntime", {**UNSIGNED, "calibrate_method": "Entropy"}),
    "NNCF, default (fast bias correction)": ("nncf", {}),
    "NNCF, full bias correction": ("nncf", {"fast_bias_correction": False}),
    "NNCF, mixed preset, min-max, full bias correction": (
        "nncf",
        {"preset": "MIXED", "minmax": True, "batch": 16, "fast_bias_correction": False},
    ),
    "NNCF, min-max, no bias correction": ("nncf", {"minmax": True, "uncorrected": True, "batch": 16}),
    "torchao PT2E, x86": ("torchao", {}),
}
GOALS = {EFFICIENTNET: 0.2}
WHOLE = 0.9
"""The share of convolutions and matrix products that have to be integers for a file to count as int8."""
NEAR = 0.05
"""Points: a peer whose mean drop is at most this much above ours reaches our accuracy, so its time counts."""


@dataclass(frozen=True)
class Found:
    """One contender on one network: a value a seed, and the pictures it got right on average over the seeds."""

    right: Array | None = None
    drops: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()
    seconds: float = 0
    cpu: float = 0
    own: float = 0
    peak: float = 0
    megabytes: float = 0
    layers: tuple[int, int] = (0, 0)
    error: str = ""

    @property
    def clear(self) -> float:
        """The mean signal over the noise of the logits, in dB."""
        return float(np.mean(self.noise))

    @property
    def drop(self) -> float:
        """The mean over the seeds, in points; digits that are no pictures cut away."""
        return round(float(np.mean(self.drops)), 4)


def main(quick: bool) -> list[Row]:
    rows: list[Row] = []
    for name, subject in _subjects(quick):
        if subject is None:
            rows.append(gap(f"{name}: int8", "no data at hand: see EDGEKIT_BENCH_DATA"))
            continue
        with tempfile.TemporaryDirectory() as scratch:
            rows += _rows(subject, _contest(subject, Path(scratch), SEEDS[:1] if quick else SEEDS))
    return rows


def _subjects(quick: bool) -> Iterator[tuple[str, Subject | None]]:
    for name in wanted(("resnet20",) if quick else (*_cifar.BUILDERS, EFFICIENTNET)):
        if name == EFFICIENTNET:
            yield name, efficientnet() if PHOTOGRAPHS.is_file() else None
            continue
        subject = cifar(name) if _cifar.there() else None
        yield name, subject.smaller(500) if subject and quick else subject


def _contest(subject: Subject, folder: Path, seeds: tuple[int, ...]) -> tuple[float, dict[str, Found]]:
    plain = subject.float_file(folder)
    reference = scores(plain, subject.test.inputs)
    np.save(folder / "judged.npy", subject.test.inputs[subject.input])
    for seed in seeds:
        np.save(folder / f"calibration-{seed}.npy", subject.calibration(seed))
    contenders = {OURS: ("edgekit", {"recipe": _recipe(subject.name)}), **PEERS}
    found = {
        name: _compete(subject, reference, [_job(subject, folder, seed, *contender) for seed in seeds])
        for name, contender in contenders.items()
    }
    return top1(reference, _labels(subject)), found


def _recipe(name: str) -> str:
    return (HERE / f"recipes/int8-{'lite0' if name == EFFICIENTNET else 'resnet'}.toml").read_text(encoding="utf-8")


def _labels(subject: Subject) -> Array:
    assert subject.test.labels is not None, "what judges has labels"
    return subject.test.labels


def _job(subject: Subject, folder: Path, seed: int, contender: str, options: dict[str, Any]) -> _peers.Job:
    return _peers.Job(
        contender=contender,
        onnx=str(subject.float_file(folder)),
        workload=subject.workload,
        checkpoint=str(subject.checkpoint) if subject.checkpoint else None,
        input=subject.input,
        calibration=str(folder / f"calibration-{seed}.npy"),
        judged=str(folder / "judged.npy"),
        out=str(folder / f"out-{contender}.onnx"),
        samples=options.get("samples"),
        options={key: value for key, value in options.items() if key != "samples"},
    )


def _compete(subject: Subject, reference: Array, jobs: list[_peers.Job]) -> Found:
    labels, right, drops, noise, done = _labels(subject), [], [], [], []
    for job in jobs:
        one = _peers.run_apart(job)
        if one.error:
            return Found(error=one.error)
        given = np.load(one.scores) if one.scores else scores(Path(job.out), subject.test.inputs)
        right.append(given.argmax(1) == labels)
        drops.append(top1(reference, labels) - top1(given, labels))
        noise.append(sqnr(given, reference))
        done.append(one)
    return Found(
        right=np.mean(right, axis=0),
        drops=tuple(drops),
        noise=tuple(noise),
        seconds=min(one.seconds for one in done),
        cpu=min(one.cpu_seconds for one in done),
        own=min(one.seconds - one.import_seconds for one in done),
        peak=max(one.peak_mib for one in done),
        megabytes=done[0].bytes / 1e6,
        layers=done[0].layers,
    )


def _rows(subject: Subject, contest: tuple[float, dict[str, Found]]) -> list[Row]:
    plain, found = contest
    name = subject.name
    rows = [Row(f"{name}: fp32 top-1 on {len(subject.test)} test pictures", plain, "%")]
    rows += [gap(f"{name}: {who}", one.error) for who, one in found.items() if one.error]
    done = {who: one for who, one in found.items() if not one.error}
    if OURS not in done:
        return [*rows, Row(f"{name}: drop, {OURS}", None, "points", goal="value <= 0")]
    ours, others = done.pop(OURS), done
    rows += [_drop_row(name, OURS, ours, f"value <= {GOALS.get(name, 0.1)}")]
    rows += [_drop_row(name, who, one, "") for who, one in others.items()]
    others = {who: one for who, one in others.items() if one.layers[0] >= WHOLE * one.layers[1]}
    if others:
        rows += _against(name, ours, others)
    return rows


def _drop_row(name: str, who: str, one: Found, goal: str) -> Row:
    each = " ".join(f"{drop:.2f}" for drop in one.drops)
    size = f"{one.megabytes:.2f} MB; {one.layers[0]}/{one.layers[1]} layers"
    what = f"{name}: drop, {who} (seeds {each}; SQNR {one.clear:.1f} dB; {size})"
    return Row(what, one.drop, "points", goal=goal)


def _lead(peer: Found, ours: Found) -> float:
    """Return by how many standard errors a peer is ahead, picture by picture: below 2 is chance."""
    assert peer.right is not None, "it has been judged"
    assert ours.right is not None, "it has been judged"
    ahead = peer.right - ours.right
    error = float(ahead.std()) / len(ahead) ** 0.5
    return float(ahead.mean()) / error if error else 0.0


def _against(name: str, ours: Found, others: dict[str, Found]) -> list[Row]:
    best = min(others, key=lambda who: others[who].drop)
    clearest = max(others, key=lambda who: others[who].clear)
    lead = round(_lead(others[best], ours), 2)
    rows = [
        Row(f"{name}: drop, {OURS}", ours.drop, "points", best, others[best].drop, "value <= peer"),
        Row(f"{name}: lead of the best peer, {best}, in standard errors", lead, "", goal="value <= 2"),
        Row(f"{name}: SQNR of the logits, {OURS}", ours.clear, "dB", clearest, others[clearest].clear),
    ]
    equal = {who: one for who, one in others.items() if one.drop <= ours.drop + NEAR} or others
    fastest = min(equal, key=lambda who: equal[who].seconds)
    quick, lean = equal[fastest], min(equal, key=lambda who: equal[who].peak)
    rows += [
        Row(f"{name}: wall time to the file, {OURS}", ours.seconds, "s", fastest, quick.seconds, "ratio <= 0.7"),
        Row(f"{name}: wall time without imports, {OURS}", ours.own, "s", fastest, quick.own),
        Row(f"{name}: CPU time to the file, {OURS}", ours.cpu, "s", fastest, quick.cpu),
        Row(f"{name}: peak memory, {OURS}", ours.peak, "MiB", lean, equal[lean].peak),
    ]
    rows += [Row(f"{name}: wall time to the file, {who}", one.seconds, "s") for who, one in others.items()]
    rows += [Row(f"{name}: CPU time to the file, {who}", one.cpu, "s") for who, one in others.items()]
    rows += [Row(f"{name}: peak memory, {who}", one.peak, "MiB") for who, one in others.items()]
    return rows


if __name__ == "__main__":
    run("Int8 post-training quantization of image networks, one thread", main)

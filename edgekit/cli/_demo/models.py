"""The first three chapters: a model learns to be small, goes to five hardware classes, and is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import edgekit
from edgekit import device_profiles, workload
from edgekit.cli._demo import plots
from edgekit.compress import compress, evaluate
from edgekit.compress import recipe as recipes
from edgekit.device_profiles import machine
from edgekit.errors import UsageError
from edgekit.export import export
from edgekit.runtime.measure import Contender, Settings, measure
from edgekit.runtime.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgekit.bundle import Bundle
    from edgekit.cli._demo.story import Story
    from edgekit.model import Data, Model
    from edgekit.runtime.measure import Measurement

MIB = 1 << 20
CLASSES = ("raspberry-pi-5", "jetson-orin-nano", "iphone-15", "pixel-8", "x86-64")


@dataclass(frozen=True)
class Workshop:
    """Where the demo works and where the example workloads lie."""

    out: Path
    examples: Path

    def example(self, name: str) -> str:
        """Name a function of an example as the command line does: ``digits.py:build``."""
        return str(self.examples / name)


def three_verbs(story: Story, shop: Workshop) -> None:
    """Train the digits network, then distill, prune and quantize it; judge the shipped files on labelled pictures."""
    story.chapter("Distill, prune, quantize: a small network on labelled digits")
    checkpoint = shop.out / "digits.safetensors"
    train: Callable[[Path], Path] = workload.named_object(shop.example("digits.py:write_checkpoint"))  # type: ignore[assignment]  # an example's own signature
    train(checkpoint)
    data = workload.load_data(shop.example("digits.py:data"))
    teacher = workload.load(shop.example("digits.py:build"), checkpoint, data)
    student = workload.load(shop.example("digits.py:build_student"), None, data)
    steps = _digit_recipes(shop.example("digits.py:build"), checkpoint)
    models = {"trained, fp32": teacher, "int8": compress(teacher, steps["int8"], story.terminal.progress)}
    models["half the channels, int8"] = compress(teacher, steps["prune"], story.terminal.progress)
    models["distilled student, int8"] = compress(student, steps["distill"], story.terminal.progress)
    rows = [_shipped(shop, name, model, data) for name, model in models.items()]
    story.table(
        ["network", "parameters", "file", "top-1 of the file on 400 test digits"],
        [(r.name, f"{r.parameters:,}", f"{r.size / 1024:.0f} KiB", f"{r.top1:.2%}") for r in rows],
    )
    whole, int8, pruned, distilled = rows
    story.check(
        "int8 costs at most half a point",
        f"{100 * (whole.top1 - int8.top1):+.2f} points",
        holds=int8.top1 >= whole.top1 - 0.005,
    )
    story.check(
        "every compressed file stays above 95 %",
        f"{min(r.top1 for r in rows):.2%}",
        holds=min(r.top1 for r in rows) > 0.95,
    )
    ratio = whole.size / min(pruned.size, distilled.size)
    story.check("the smallest file is at most a fifth", f"1/{ratio:.0f} of fp32", holds=ratio >= 5)


@dataclass(frozen=True)
class _Shipped:
    name: str
    parameters: int
    size: int
    top1: float


def _digit_recipes(teacher: str, checkpoint: Path) -> dict[str, recipes.Recipe]:
    prune = '[[pass]]\nname = "prune"\nratio = 0.5\nround_to = 4\nepochs = 15\nlr = 0.003\n'
    distill = f'[[pass]]\nname = "distill"\nteacher = "{teacher}"\nteacher_checkpoint = "{checkpoint}"\nepochs = 25\n'
    quantize = '[[pass]]\nname = "quantize"\n'
    parts = {"int8": quantize, "prune": prune + quantize, "distill": distill + quantize}
    return {name: recipes.decode("version = 1\n" + text) for name, text in parts.items()}


def _shipped(shop: Workshop, name: str, model: Model, data: Data) -> _Shipped:
    """Export, load the bundle as a device would, and judge what the file itself answers."""
    bundle = bundle_of(model, ["x86-64"], shop.out / "digits" / f"{name.replace(', ', '-').replace(' ', '-')}.edgekit")
    if data.test is None or data.test.labels is None:
        raise UsageError("the digits have no labelled test split")
    with edgekit.load(bundle.folder, variant="x86-64") as session:
        if not isinstance(session, Session):
            raise UsageError(f"{bundle.folder} holds a language model")
        scores = session.run(dict(data.test.inputs))["scores"]
        size = bundle.path(session.variant.main).stat().st_size
    top1 = float((scores.argmax(1) == data.test.labels).mean())
    return _Shipped(name, evaluate.parameters(model), size, top1)


def bundle_of(model: Model, targets: list[str] | tuple[str, ...], folder: Path, **names: str) -> Bundle:
    """Export and return the bundle; the first target that failed is raised."""
    result = export(model, [device_profiles.load(t) for t in targets], folder, **names)  # type: ignore[arg-type]  # name and version are strings
    for row in result.rows:
        if row.error is not None:
            raise row.error
    if result.bundle is None:
        raise UsageError(f"{folder} was not written: no target given")
    return result.bundle


def five_classes(story: Story, shop: Workshop) -> tuple[Bundle, Bundle]:
    """Quantize EfficientNet-Lite0 to int8 and export it for five hardware classes; return fp32's and int8's bundle."""
    story.chapter("EfficientNet-Lite0 with ImageNet weights, to int8, for five hardware classes")
    data = workload.load_data(shop.example("efficientnet.py:data"))
    model = workload.load(shop.example("efficientnet.py:build"), None, data)
    small = compress(model, recipes.default(), story.terminal.progress)
    workload.save(small, shop.out / "efficientnet-int8")
    small = workload.load(str(shop.out / "efficientnet-int8"))  # as `edgekit export` takes it, for the same digest
    story.tell(f"Calibrated with {len(data.calibration)} crops of photographs; no label was needed.")
    names = {"name": "efficientnet-lite0"}
    whole = bundle_of(model, ["raspberry-pi-5"], shop.out / "efficientnet-v1.edgekit", version="1", **names)
    bundle = bundle_of(small, CLASSES, shop.out / "efficientnet-v2.edgekit", version="2", **names)
    rows = [
        (v.name, v.format, v.precision, _size(bundle, v.files), v.parity.status, _decibel(v.parity.sqnr_db))
        for v in bundle.manifest.variants
    ]
    story.table(["target", "format", "precision", "MiB", "parity", "SQNR"], rows)
    story.tell("SQNR is signal over error of the scores: at 20 dB the error is a tenth of the signal.")
    for variant in bundle.manifest.variants:
        if variant.parity.reason:
            story.tell(f"{variant.name} is {variant.parity.status}: {variant.parity.reason}")
    checked = [v for v in bundle.manifest.variants if v.parity.status != "unverified"]
    story.check(
        "every file was run or computed from its bytes here, and compared with the model",
        f"{len(checked)} of {len(CLASSES)}",
        holds=len(checked) == len(CLASSES),
    )
    _compare_sizes(story, whole, bundle)
    same, count = _same_choices(whole, bundle, data)
    story.check(
        "the int8 file chooses fp32's class on photographs it never saw",
        f"{same} of {count}",
        holds=same >= 0.8 * count,
    )
    return whole, bundle


def _same_choices(whole: Bundle, small: Bundle, data: Data) -> tuple[int, int]:
    """Count the test photographs on which both shipped files choose the same class."""
    if data.test is None:
        raise UsageError("the photographs have no test split")
    chosen = []
    for bundle in (whole, small):
        with edgekit.load(bundle.folder, variant="raspberry-pi-5") as session:
            if not isinstance(session, Session):
                raise UsageError(f"{bundle.folder} holds a language model")
            chosen.append(session.run(dict(data.test.inputs))["scores"].argmax(1))
    return int((chosen[0] == chosen[1]).sum()), len(chosen[0])


def _compare_sizes(story: Story, whole: Bundle, small: Bundle) -> None:
    sizes = {"fp32 ONNX": _bytes(whole, whole.manifest.variants[0].files) / MIB}
    sizes |= {f"int8 {v.format}, {v.name}": _bytes(small, v.files) / MIB for v in small.manifest.variants}
    story.show("File size for each hardware class", plots.bars(sizes, "MiB"))
    share = sizes["int8 onnx, raspberry-pi-5"] / sizes["fp32 ONNX"]
    story.check("int8 takes at most 0.30 of fp32's bytes", f"{share:.3f}", holds=share <= 0.30)


def side_by_side(story: Story, whole: Bundle, small: Bundle) -> None:
    """Measure fp32 and int8 in turns, one thread."""
    story.chapter("fp32 and int8 side by side on this machine")
    contenders = [
        Contender(str(whole.folder), "raspberry-pi-5"),
        Contender(str(small.folder), "raspberry-pi-5"),
    ]
    first, second = measure(contenders, Settings(threads=1, seconds=6.0), story.terminal.progress)
    rows = [
        (
            m.precision,
            *(f"{ms:.2f}" for ms in _percentiles(m).values()),
            *(f"{n:.0f}" for n in (m.per_second, m.load_ms, m.rss_mib)),
        )
        for m in (first, second)
    ]
    story.table(["model", "p50 ms", "p90 ms", "p99 ms", "images/s", "load ms", "RSS MiB"], rows)
    times = {f"{m.precision} {name}": value for m in (first, second) for name, value in _percentiles(m).items()}
    story.show("Latency of one picture, one thread", plots.bars(times, "ms"))
    story.tell("One thread, taking turns in short rounds, each in a process of its own.")
    if machine.describe().integer_dot_product:
        claim, seen, most = "int8 answers in at most 0.65 of fp32's median time", second.ratio, 0.65
    else:
        story.tell(
            "This processor has no 8-bit dot products: int8 saves memory here, not time"
            f" ({second.ratio:.2f} of fp32's)."
        )
        claim, seen, most = "int8 takes at most 0.80 of fp32's memory", second.rss_mib / first.rss_mib, 0.80
    story.check(claim, f"{seen:.2f}", holds=seen <= most)


def _percentiles(measured: Measurement) -> dict[str, float]:
    return {"p50": measured.p50_ms, "p90": measured.p90_ms, "p99": measured.p99_ms}


def _bytes(bundle: Bundle, files: tuple[str, ...]) -> int:
    return sum(bundle.path(path).stat().st_size for path in files)


def _size(bundle: Bundle, files: tuple[str, ...]) -> str:
    return f"{_bytes(bundle, files) / MIB:.2f}"


def _decibel(value: float | None) -> str:
    return "-" if value is None or math.isinf(value) else f"{value:.1f} dB"

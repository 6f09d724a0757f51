"""`edgekit inspect`: check every byte of a bundle, and show what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli._terminal import Terminal, command

if TYPE_CHECKING:
    from edgekit.bundle import Bundle
    from edgekit.manifest import Detection, FileEntry, Manifest, Parity, Port, Step, Variant
    from edgekit.plan import WeightRule


@command(name="inspect", short_help="Check a bundle's bytes and show what is in it.")
@click.argument("bundle", type=click.Path(path_type=Path))
def COMMAND(terminal: Terminal, *, bundle: Path) -> None:  # noqa: N802  # the name is the plugin's
    """Check every byte of BUNDLE, and show its files, tensors, variants and lineage."""
    import msgspec

    from edgekit import bundle as bundles

    opened = bundles.read(bundle)
    _tell(terminal, opened)
    terminal.result({"digest": opened.digest, "size": opened.size, "manifest": msgspec.to_builtins(opened.manifest)})


def _tell(terminal: Terminal, opened: Bundle) -> None:
    manifest = opened.manifest
    terminal.say(f"{manifest.name} {manifest.version}  ({manifest.task})")
    terminal.say(f"digest  {opened.digest}")
    terminal.say(f"size    {_size(opened.size)} in {len(manifest.files)} files, every byte checked")
    terminal.say(f"licence {manifest.license or 'not told'}\n")
    _tell_tensors(terminal, manifest)
    columns = ("variant", "format", "precision", "size", "batch", "parity", "SQNR dB", "same top-1", "main file")
    terminal.table(columns, [_variant_cells(manifest, name) for name in [v.name for v in manifest.variants]])
    for variant in manifest.variants:
        _tell_variant(terminal, variant)
    for variant in manifest.variants:
        if variant.weights:
            terminal.say(f"\n{variant.name}: weights in the file")
            terminal.table(("weight", "stored as"), list(variant.weights.items()))
    _tell_weights(terminal, opened)
    _tell_baseline(terminal, opened)
    terminal.say("\nfiles")
    for line in _tree(manifest.files):
        terminal.say(f"  {line}")
    terminal.say("\nlineage" if manifest.lineage else "\nlineage: none recorded")
    for number, step in enumerate(manifest.lineage, 1):
        terminal.say(f"  {number}. {_step(step)}")


def _tell_variant(terminal: Terminal, variant: Variant) -> None:
    if variant.requires:
        needs = ", ".join(f"{name} {version}" for name, version in variant.requires.items())
        terminal.say(f"{variant.name}: needs {needs}")
    for line in (*variant.notes, *filter(None, [variant.parity.reason])):
        terminal.say(f"{variant.name}: {line}")
    if variant.parity.labelled:
        terminal.say(f"{variant.name}: {variant.parity.labelled}")
    if variant.elsewhere:
        terminal.say(f"{variant.name}: {variant.elsewhere}")
    for port in (*variant.inputs, *variant.outputs):
        if told := _port(port):
            terminal.say(f"{variant.name}: {told}")
    if variant.operators:
        terminal.say(f"{variant.name}: operators {_most_first(variant.operators)}")


def _port(port: Port) -> str:
    """Say how a tensor lies in the file where that is not as it is given: another order of axes, integers."""
    order = f"axes {', '.join(map(str, port.axes))}" if port.axes != tuple(range(len(port.axes))) else ""
    integers = f"{port.dtype}, value (integer - {port.zero}) * {port.scale:.6g}" if port.scale else ""
    told = "; ".join(filter(None, [order, integers]))
    return told and f"{port.name} lies in the file as {port.key}: {told}"


def _most_first(operators: dict[str, int]) -> str:
    ordered = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {name}" for name, count in ordered)


def _tell_weights(terminal: Terminal, opened: Bundle) -> None:
    """Show the planned bits of every weight, where the plan travels in the bundle (devices do not fetch it)."""
    import msgspec

    from edgekit.errors import BundleError
    from edgekit.plan import FILE, QuantizationPlan

    path = opened.manifest.documents.get(FILE)
    if path is None or not opened.path(path).is_file():
        return
    try:
        plan = msgspec.json.decode(opened.path(path).read_bytes(), type=QuantizationPlan)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is no quantization plan: {error}", "export the bundle again") from error
    terminal.say(f"\nplan    {plan.precision}, {plan.scheme}, {len(plan.activations)} activations with a range")
    rows = [(name, str(rule.bits), _scales(rule)) for name, rule in plan.weights.items()]
    if rows:
        terminal.table(("weight", "bits", "scales"), rows)


def _tell_baseline(terminal: Terminal, opened: Bundle) -> None:
    """Show what live requests are held against, where the bundle says it."""
    from edgekit import baseline as baselines

    manifest = opened.manifest
    if manifest.baseline is None:
        return
    data = opened.path(manifest.baseline).read_bytes()
    found = baselines.decode(data, manifest.inputs, manifest.outputs)
    terminal.say(f"\nbaseline of drift: {found.samples} samples of the {found.split} split")
    rows = [(one.role, one.tensor, ", ".join(s.name for s in one.series[:8]) + (", …" if len(one.series) > 8 else ""))
            for one in found.tensors]  # fmt: skip
    terminal.table(("watched", "tensor", "by"), rows)


def _scales(rule: WeightRule) -> str:
    return {"channel": "one a channel", "tensor": "one", "group": f"one for {rule.group} neighbours"}[rule.granularity]


def _tell_tensors(terminal: Terminal, manifest: Manifest) -> None:
    for title, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            terminal.say(f"{title:<7} {spec}")
    if manifest.preprocess:
        p = manifest.preprocess
        fits = {"crop": f"shorter side {p.resize}, crop {p.crop}", "stretch": f"stretched to {p.crop} x {p.crop}",
                "pad": f"longer side {p.crop}, padded with {p.fill}"}  # fmt: skip
        terminal.say(f"picture {p.mode}, {fits[p.fit]}, {p.interpolation}, into {p.input}")
    if manifest.text:
        into = " and ".join(manifest.text.inputs)
        terminal.say(f"text    by {manifest.text.tokenizer}, {manifest.text.tokens} tokens, into {into}")
    if manifest.postprocess:
        softmax = " by softmax" if manifest.postprocess.softmax else ""
        own = manifest.postprocess
        terminal.say(f"labels  {len(own.labels)}, from {own.output}{softmax}, best {own.top_k}")
    if manifest.detection:
        terminal.say(f"objects {_detection(manifest.detection)}")
    if manifest.embedding:
        vector = manifest.embedding
        length = ", of length 1" if vector.normalize else ""
        terminal.say(f"vectors from {vector.output}, pooling {vector.pooling}{length}")
    for prompt, answer in manifest.golden.prompts:
        terminal.say(f"golden  {prompt!r} -> {answer!r}")
    terminal.say()


def _detection(how: Detection) -> str:
    where = " and ".join(dict.fromkeys([how.boxes, how.scores]))
    limits = f"scores from {how.score_threshold:g}, overlap (IoU) up to {how.iou_threshold:g}"
    return f"of {len(how.labels)} labels, from {where} as {how.box_format}, {limits}, at most {how.max_detections}"


def _variant_cells(manifest: Manifest, name: str) -> tuple[str, ...]:
    variant = manifest.variant(name)
    size = sum(entry.size for entry in manifest.files if entry.path in variant.files)
    batch = "any" if variant.batch < 0 else str(variant.batch)
    return (name, variant.format, variant.precision, _size(size), batch, *_proof(variant.parity), variant.main)


def _proof(parity: Parity) -> tuple[str, str, str]:
    sqnr = _held(parity.sqnr_db, parity.min_sqnr_db, ".1f")
    return (parity.status, sqnr, _held(parity.top1_agreement, parity.min_top1_agreement, ".3f"))


def _held(value: float | None, least: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" + ("" if least is None else f" (>= {least:g})")


def _tree(files: tuple[FileEntry, ...]) -> list[str]:
    """Draw folders once, files under them with size and hash."""
    lines: list[str] = []
    shown: tuple[str, ...] = ()
    for entry in sorted(files, key=lambda e: e.path.split("/")):
        *folders, name = entry.path.split("/")
        for depth, folder in enumerate(folders):
            if shown[: depth + 1] != tuple(folders[: depth + 1]):
                lines.append("  " * depth + folder + "/")
        shown = tuple(folders)
        lines.append(f"{'  ' * len(folders) + name:<44} {_size(entry.size):>10}  {entry.sha256[:12]}")
    return lines


def _step(step: Step) -> str:
    options = ", ".join(f"{key}={_short(value)}" for key, value in step.options.items())
    measured = ", ".join(f"{key} {value:.4g}" for key, value in step.measured.items())
    return f"{step.name}" + (f" ({options})" if options else "") + (f": {measured}" if measured else "")


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _size(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    return f"{count / 1024:.1f} KiB" if count < 2**20 else f"{count / 2**20:.2f} MiB"

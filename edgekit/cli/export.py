"""`edgekit export`: a model and hardware classes in; one sealed bundle out, with what was proved of every file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli._terminal import Terminal, command

if TYPE_CHECKING:
    from edgekit.errors import EdgekitError
    from edgekit.export import ExportResult, TargetResult

COLUMNS = ("target", "format", "precision", "MiB", "parity", "SQNR dB", "same top-1", "max error")


@command(
    name="export",
    short_help="Write a model for hardware classes, into one bundle.",
    help="""Write a model for hardware classes, compare every file with the model, and seal one bundle.

    SOURCE is a folder that `edgekit compress` wrote, file.py:build or package.module:build, an .onnx file, a
    Hugging Face folder (of a language model, or without --data of any architecture that optimum knows), or a .gguf
    file. A target that fails leaves the others; the exit code is that of the first failure.
    """,
)
@click.argument("source", required=False)
@click.option("--target", "targets", multiple=True, help="Hardware class, or a profile.toml of your own. Repeatable.")
@click.option(
    "--format", "formats", multiple=True, help="File format, for no hardware class in particular. Repeatable."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the bundle to write; replaces a bundle that is there.",
)
@click.option("--name", help="Name of the bundle; default: the model's.")
@click.option("--version", default="1", show_default=True, help="Version of the bundle.")
@click.option(
    "--precision",
    help="fp32 ignores the plan, fp16 makes halves of a float network;"
    " language models: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, 4.8bpw to choose"
    " types within so many bits a weight, or with"
    " llama-cpp-python q6_k, q4_k_m, iq4_xs and llama.cpp's others.",
)
@click.option("--license", "spdx", default="", help="SPDX licence expression of the model, as Apache-2.0.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Weights for file.py:build: .safetensors, .pt, .pt2."
)
@click.option(
    "--data", "data_source", help="Data: file.py:function, an .npz, a data.toml, or a folder of pictures with one."
)
@click.option("--list", "list_only", is_flag=True, help="Show the targets and what they need, and stop.")
def COMMAND(  # noqa: N802, PLR0913  # the name is the plugin's; each parameter is an option of the command line
    terminal: Terminal,
    *,
    source: str | None,
    targets: tuple[str, ...],
    formats: tuple[str, ...],
    output: Path | None,
    name: str | None,
    version: str,
    precision: str | None,
    spdx: str,
    checkpoint: Path | None,
    data_source: str | None,
    list_only: bool,
) -> None:
    """Load, lower, compare, seal."""
    if list_only:
        _list(terminal)
        return
    from edgekit import architectures, device_profiles, workload
    from edgekit import bundle as bundles
    from edgekit.cli._targets import known_format
    from edgekit.errors import UsageError
    from edgekit.export import documents, export
    from edgekit.model import TorchNetwork

    if source is None or output is None or not (targets or formats):
        raise UsageError(
            "SOURCE, --target or --format, and -o are needed", "edgekit export SOURCE --target x86-64 -o BUNDLE"
        )
    profiles = [device_profiles.load(target) for target in targets]
    profiles += [device_profiles.of_format(known_format(name)) for name in formats]
    bundles.refuse_foreign(output)
    documents.check_license(spdx)
    data = workload.load_data(data_source) if data_source else None
    as_text = all(profile.format == "gguf" for profile in profiles)
    model = workload.load(source, checkpoint, data, invent=architectures.invented, as_text=as_text)
    if data is None and isinstance(model.network, TorchNetwork) and model.network.folder:
        terminal.warn(f"no --data: {model.name} was compared on inputs at random, which says nothing of how good it is")
    result = export(
        replace(model, license=spdx),
        profiles,
        output,
        version=version,
        name=name,
        precision=precision,
        progress=terminal.progress,
    )
    _report(terminal, result, output)


def _report(terminal: Terminal, result: ExportResult, output: Path) -> None:
    terminal.table(COLUMNS, [_cells(row) for row in result.rows])
    for row in result.rows:
        for note in row.variant.notes if row.variant else ():
            terminal.say(f"{row.target}: {note}")
        if row.variant and row.variant.parity.status != "checked":
            terminal.say(f"{row.target}: {row.variant.parity.status}: {row.variant.parity.reason}")
        if row.variant and row.variant.parity.labelled:
            terminal.say(f"{row.target}: {row.variant.parity.labelled}")
        if row.variant and row.variant.elsewhere:
            terminal.say(f"{row.target}: {row.variant.elsewhere}")
        if row.error:
            terminal.warn(f"{row.target}: {row.error.message}" + (f" ({row.error.hint})" if row.error.hint else ""))
    if result.bundle:
        size = result.bundle.size / 2**20
        terminal.say(f"\nwrote {output}  ({size:.2f} MiB, digest {result.bundle.digest[:16]}…)")
    terminal.result(_document(result, output))
    if result.first_error:
        click.get_current_context().exit(result.first_error.exit_code)


def _cells(row: TargetResult) -> tuple[str, ...]:
    if row.variant is None:
        return (row.target, row.format, "-", "-", f"failed: {_kind(row.error)}", "-", "-", "-")
    parity = row.variant.parity
    size = f"{row.size / 2**20:.2f}" if row.size >= 2**19 else f"{row.size / 2**20:.3f}"
    figures = (parity.sqnr_db, parity.top1_agreement, parity.max_abs_error)
    return (row.target, row.format, row.variant.precision, size, parity.status, *map(_number, figures))


def _kind(error: EdgekitError | None) -> str:
    """Say in two words why a target failed; the whole message stands below the table."""
    from edgekit.errors import MissingExtra, ParityError, ResourceError
    from edgekit.export.refusal import UnsupportedOperator

    words = {
        UnsupportedOperator: "operator missing",
        ParityError: "computes otherwise",
        MissingExtra: "not installed",
        ResourceError: "no room",
    }
    return next((told for kind, told in words.items() if isinstance(error, kind)), "cannot hold it")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _document(result: ExportResult, output: Path) -> dict[str, object]:
    import msgspec

    rows = [
        {
            "target": row.target,
            "format": row.format,
            "size": row.size,
            "variant": msgspec.to_builtins(row.variant),
            "error": {"kind": type(row.error).__name__, "message": row.error.message, "hint": row.error.hint}
            if row.error
            else None,
        }
        for row in result.rows
    ]
    bundle = result.bundle
    written = {"bundle": str(output), "digest": bundle.digest, "size": bundle.size} if bundle else {"bundle": None}
    return {**written, "targets": rows}


def _list(terminal: Terminal) -> None:
    from edgekit import device_profiles
    from edgekit.cli._targets import ability, format_names

    profiles = [device_profiles.load(name) for name in device_profiles.names()]
    rows = [(p.name, p.title, p.format, *ability(p)) for p in profiles]
    terminal.table(("target", "hardware", "format", "can be written here", "checked by"), rows)
    keys = ("target", "title", "format", "export", "parity")
    formats = [(name, *ability(device_profiles.of_format(name))) for name in format_names()]
    terminal.say()
    terminal.table(("format", "can be written here", "checked by"), formats)
    terminal.result(
        {
            "targets": [dict(zip(keys, row, strict=True)) for row in rows],
            "formats": [dict(zip(("format", *keys[3:]), row, strict=True)) for row in formats],
        }
    )

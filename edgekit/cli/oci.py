"""``edgekit oci``: a bundle as an OCI image layout and back, so that any container registry can hold it."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli._terminal import Terminal, command


@click.group(name="oci")
def COMMAND() -> None:  # noqa: N802  # the name by which the frame finds a command
    """Hand bundles to container registries: write and read OCI layouts."""


@command(name="write")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the layout to write.")
def write_layout(terminal: Terminal, *, bundle: Path, output: Path) -> None:
    """Write BUNDLE as an OCI image layout, which oras and skopeo copy to a registry."""
    from edgekit import bundle as bundles
    from edgekit import oci

    opened = bundles.read(bundle)
    digest = oci.write(opened, output)
    terminal.say(f"wrote {output}  ({digest[:19]}…, bundle {opened.digest[:16]}…)")
    terminal.result({"layout": str(output), "image": digest, "bundle": opened.digest})


@command(name="read")
@click.argument("layout", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the bundle to write.")
@click.option("--tag", default="", help="Which image, where the layout holds several.")
def read_layout(terminal: Terminal, *, layout: Path, output: Path, tag: str) -> None:
    """Write the bundle that LAYOUT holds, every byte checked."""
    from edgekit import oci

    made = oci.read(layout, output, tag)
    terminal.say(f"wrote {output}  ({made.manifest.name} {made.manifest.version}, digest {made.digest[:16]}…)")
    terminal.result({"bundle": str(output), "digest": made.digest})


for _command in (write_layout, read_layout):
    COMMAND.add_command(_command)

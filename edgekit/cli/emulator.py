"""``edgekit emulator``: build the arm64 system in which export and verify run files as ARM boards do."""

from __future__ import annotations

from edgekit.cli._terminal import Terminal, command


@command(
    name="emulator",
    short_help="Build the arm64 system in which files for ARM are checked.",
    help="""Build a small arm64 system from Debian's packages and the engines' wheels, in the versions installed here.

    QEMU boots it where this machine is no ARM: export then checks files for ARM classes there, and verify --isa
    cortex-a76 runs a bundle in it. It lies below ~/.cache/edgekit, some 300 MiB; nothing else on this machine changes.
    Build it again after an engine was updated. Needs Debian's apt, qemu-system-arm and cpio.
    """,
)
def COMMAND(terminal: Terminal) -> None:  # noqa: N802  # the name is the plugin's
    """Build, and say where it lies."""
    from edgekit.runtime import arm64
    from edgekit.runtime.arm64.build import build

    folder = build(terminal.progress)
    versions = arm64.installed()
    size = sum(path.stat().st_size for path in folder.iterdir())
    terminal.say(f"built {folder}  ({size / 2**20:.0f} MiB; {', '.join(f'{n} {v}' for n, v in versions.items())})")
    terminal.result({"folder": str(folder), "bytes": size, "versions": versions})

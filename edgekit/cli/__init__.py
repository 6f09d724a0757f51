"""The command line: one file a command, found by its name and imported when asked for.

The only room that prints or exits. A command's module imports nothing heavy at its top, so that
``edgekit --help`` stays instant.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import click

import edgekit


class Commands(click.Group):
    """A group whose commands are the files of a package that do not begin with an underscore."""

    def __init__(self, package: str, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]  # click's own settings, handed through
        self.package = package

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the files."""
        del ctx
        folder = importlib.import_module(self.package).__path__
        return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(folder) if not m.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the file of that name and take its ``COMMAND``."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"{self.package}.{cmd_name.replace('-', '_')}").COMMAND
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Offer the nearest names where none matches."""
        from edgekit.errors import UnknownName

        name = args[0]
        if not name.startswith("-") and name not in self.list_commands(ctx):
            error = UnknownName("command", name, self.list_commands(ctx))
            ctx.fail(f"{error.message}; {error.hint}")
        return super().resolve_command(ctx, args)


EPILOG = (
    "Exit codes: 0 done, 1 internal error or a check that did not hold, 2 wrong call, 3 missing extra, 4 compression, "
    "5 export, 6 parity, 7 bundle, 8 transfer, 9 message, 10 trust, 11 health, 12 disk/port/memory, 13 budget missed, "
    "14 engine crashed, 15 cannot run here, 130 interrupted."
)

cli = Commands(
    "edgekit.cli",
    name="edgekit",
    help="Take a trained model to a healthy fleet: compress, export, serve, update over the air.",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
cli = click.version_option(edgekit.__version__, prog_name="edgekit")(cli)


def main() -> None:
    """Run the command line; errors become a message, a hint and an exit code."""
    # OpenMP threads that spin while they wait make a small training 20 times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = cli.main(prog_name="edgekit", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        _tell_program("UsageError", error.format_message(), error.exit_code)
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        _tell_program("Interrupted", "interrupted", 130)
        sys.exit(130)
    except OSError as error:  # of standard output, as --help into a full disk; the rest is caught where it happens
        click.echo(f"error: {error.strerror or error}", err=True)
        sys.exit(12)
    except Exception as error:  # noqa: BLE001  # the last line of defence: a person never meets a bare trace
        _report_bug(error)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _report_bug(error: Exception) -> None:
    import traceback

    if "--debug" in sys.argv:
        traceback.print_exception(error)
    click.echo(f"internal error: {type(error).__name__}: {error}", err=True)
    click.echo("hint: this is a bug in edgekit; run again with --debug for the trace, and report it", err=True)
    _tell_program(type(error).__name__, f"internal error: {error}", 1)


def _tell_program(kind: str, message: str, exit_code: int) -> None:
    """Print under ``--json`` the document of an error that no command could print."""
    import json

    if "--json" in sys.argv:
        error = {"kind": kind, "message": message, "hint": "", "exit_code": exit_code}
        click.echo(json.dumps({"error": error}, indent=2))

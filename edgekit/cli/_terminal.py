"""How a command speaks: text or JSON on stdout, progress and errors on stderr, exit codes by kind of error."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

import click

from edgekit.errors import EdgekitError, from_os, out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

BAR_WIDTH = 24
REDRAW_SECONDS = 0.1


class Terminal:
    """What a command writes through. ``as_json``: one JSON document at the end and nothing else on stdout."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._what = ""
        self._done = 0
        self._started = self._drawn = 0.0

    def say(self, text: str = "") -> None:
        """Tell a person something."""
        if not (self.as_json or self.quiet):
            self.wipe()
            click.echo(text)

    def warn(self, text: str) -> None:
        """Tell a person on stderr, also under ``--quiet``."""
        self.wipe()
        click.echo(f"warning: {text}", err=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print a Markdown table whose columns line up."""
        self.say(markdown_table(columns, rows))

    def result(self, document: Mapping[str, object]) -> None:
        """Print the result for a program; silent unless ``--json`` was given."""
        if self.as_json:
            click.echo(json.dumps(document, indent=2, default=str))

    def progress(self, what: str, done: int, total: int) -> None:
        """Draw a bar with the time left on stderr; silent where stderr is no terminal."""
        if self.quiet or not sys.stderr.isatty():
            return
        now = time.monotonic()
        work = what.partition(":")[0]  # behind the colon stand figures that change, as the loss
        if work != self._what or done < self._done:
            self._what, self._started, self._drawn = work, now, 0.0
        self._done = done
        if total and done >= total:
            self.wipe()
        elif now - self._drawn >= REDRAW_SECONDS:
            self._drawn = now
            width = shutil.get_terminal_size().columns - 1
            click.echo(f"\r\x1b[K{bar(what, done, total, now - self._started)[:width]}", err=True, nl=False)

    def wipe(self) -> None:
        """Take the bar away."""
        if self._what:
            self._what = ""
            click.echo("\r\x1b[K", err=True, nl=False)


def bar(what: str, done: int, total: int, elapsed: float) -> str:
    """Return one line of progress; without a total it counts and shows the time that passed."""
    if not total:
        return f"{what} … {done or ''} {_clock(elapsed)}"
    filled = BAR_WIDTH * done // total
    left = f"{_clock(elapsed / done * (total - done))} left" if done else ""
    return f"{what:<34.34} [{'#' * filled}{'-' * (BAR_WIDTH - filled)}] {done}/{total} {left}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table whose columns line up when read as text."""
    cells = [[str(c) for c in columns], *[[str(v) for v in row] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def command(**settings: Any) -> Callable[[Callable[..., None]], click.Command]:  # noqa: ANN401  # click's own settings
    """Make a click command whose function gets a `Terminal` first; adds --json, --quiet and --debug.

    Errors of edgekit and of the operating system become a message, a hint and an exit code.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(*, as_json: bool, quiet: bool, debug: bool, **parameters: object) -> None:
            terminal = Terminal(as_json=as_json, quiet=quiet)
            try:
                function(terminal, **parameters)
            except EdgekitError as error:
                fail(terminal, out_of_memory(error) or error, debug=debug)
            except BrokenPipeError:  # `edgekit … | head` is no error: click ends it quietly
                raise
            except OSError as error:
                fail(terminal, from_os(error, click.get_current_context().info_name or "edgekit"), debug=debug)
            except (MemoryError, RuntimeError) as error:
                lack = out_of_memory(error)
                if lack is None:
                    raise
                fail(terminal, lack, debug=debug)

        made: click.Command = click.command(**settings)(run)
        made.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document instead of text."),
            click.Option(["--quiet"], is_flag=True, help="Print errors only."),
            click.Option(["--debug"], is_flag=True, help="Show the trace of an error."),
        ]
        return made

    return decorate


def finite(_context: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    """Refuse, as the callback of an option, what a range of floats lets pass: NaN and infinity."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number")
    return value


def fail(terminal: Terminal, error: EdgekitError, *, debug: bool = False) -> None:
    """Print the error and its hint, and leave with its exit code."""
    terminal.wipe()
    if debug:
        traceback.print_exception(error)
    click.echo(f"error: {error.message}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    kind = type(error).__name__
    with contextlib.suppress(OSError):  # standard output may be the disk that is full
        terminal.result(
            {"error": {"kind": kind, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}}
        )
    sys.exit(error.exit_code)

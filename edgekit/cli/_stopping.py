"""What a long command says and leaves with when somebody stops it: one line, 143 for SIGTERM, 130 for Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from edgekit.cli._terminal import Terminal


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextlib.contextmanager
def told_when_stopped(terminal: Terminal, told: str) -> Iterator[None]:
    """Let the block end in order when the process is asked to stop, and say ``told`` behind "interrupted"."""
    is_main = threading.current_thread() is threading.main_thread()  # others may set no handler
    before = signal.signal(signal.SIGTERM, _terminate) if is_main else None
    try:
        yield
    except KeyboardInterrupt as error:
        code = 143 if isinstance(error, Terminated) else 130
        terminal.wipe()
        click.echo(f"interrupted: {told}", err=True)
        document = {"kind": "Interrupted", "message": "interrupted", "hint": told, "exit_code": code}
        terminal.result({"error": document})
        sys.exit(code)
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise Terminated

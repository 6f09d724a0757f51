"""Keeps the converters' chatter off the terminal. Hides no exception."""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Muted(io.TextIOBase):
    """Stands for ``sys.stdout`` or ``sys.stderr`` in a block; loggers that keep it write to that one afterwards."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.is_muted = True

    def write(self, text: str) -> int:
        """Drop the text while the block lasts."""
        return len(text) if self.is_muted else int(getattr(sys, self.stream).write(text))


@contextmanager
def silence() -> Iterator[None]:
    """Send stdout, stderr, warnings and log lines of the block to nowhere, also those that C++ writes."""
    sys.stdout.flush()
    sys.stderr.flush()
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    kept = (os.dup(1), os.dup(2))
    out, err = _Muted("stdout"), _Muted("stderr")
    try:
        with tempfile.TemporaryFile("w") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            # Python's own streams need not write to 1 and 2: click and pytest put others in their place.
            with redirect_stdout(out), redirect_stderr(err):
                yield
    finally:
        out.is_muted = err.is_muted = False
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        logging.disable(level)

"""Keeps the converters' chatter off the terminal. Hides no exception."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def silence() -> Iterator[None]:
    """Send stdout, stderr, warnings and log lines of the block to nowhere, also those that C++ writes."""
    sys.stdout.flush()
    sys.stderr.flush()
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    kept = (os.dup(1), os.dup(2))
    try:
        with tempfile.TemporaryFile("w") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            # Python's own streams need not write to 1 and 2: click and pytest put others in their place.
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        logging.disable(level)

"""An error of edgekit on its way from one process to another: as a message, and back. Knows no process."""

from __future__ import annotations

import msgspec

from edgekit import errors
from edgekit.errors import EdgekitError


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """An error of edgekit; ``kind`` is its class."""

    kind: str
    message: str
    hint: str


def told(error: EdgekitError) -> Failed:
    """Return the message of an error."""
    return Failed(kind=type(error).__name__, message=error.message, hint=error.hint)


def rebuilt(failed: Failed, name: str = "") -> EdgekitError:
    """Return the error that a message tells of, with ``name`` in front where it does not hold it."""
    kind = getattr(errors, failed.kind, EdgekitError)
    error: EdgekitError = kind.__new__(kind)  # not the constructor: MissingExtra and UnknownName make their own text
    error.message = failed.message if name in failed.message else f"{name}: {failed.message}"
    error.hint = failed.hint
    error.args = (error.message,)
    return error

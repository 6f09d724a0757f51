"""What converters raise where they cannot hold a model, and how that is said in one line. Knows no converter."""

from __future__ import annotations

from edgekit.sources import first_line

REFUSALS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError, NotImplementedError)
"""They share no class: litert-torch, coremltools and torch.export raise any of these for an operator they lack."""


def reason(error: BaseException) -> str:
    """Return the first line of the deepest cause, at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)

"""How long work tells where it stands. Draws nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with what is done now, how much of it, and out of how much (0: unknown)."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take note; must be cheap."""
        ...


def silent(what: str, done: int, total: int) -> None:
    """Ignore all progress."""

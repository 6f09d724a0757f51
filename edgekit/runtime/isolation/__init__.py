"""An engine in a process of its own, so that one that crashes takes no request but its own with it (docs/adr/0014).

`engine` is what a session runs and starts the process anew, `process` the parent's end of it, `worker` the process
itself, `lanes` what both speak, `crashes` when a process is started again and when that is given up. This file knows
what a caller may ask for and what he is told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def _to_nobody(reason: str) -> None:
    del reason


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """How an engine of its own process is watched.

    One that gives no answer, or no piece of a text, within ``seconds`` is killed, which counts as a crash.
    ``on_broken`` is told of the third crash within `crashes.WINDOW_SECONDS`, and of each further one, with the reason;
    it is called in the thread that starts the process anew, and has to return at once.
    """

    seconds: float = 60.0
    on_broken: Callable[[str], None] = _to_nobody


@dataclass(frozen=True, kw_only=True)
class Condition:
    """How an engine's process does: its ``pid``, None while there is none; restarts; crashes by what ended them."""

    pid: int | None
    restarts: int = 0
    crashes: Mapping[str, int] = field(default_factory=dict)
    is_broken: bool = False

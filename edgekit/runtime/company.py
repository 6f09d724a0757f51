"""Finds out whether texts are generated sooner together or one after the other, and lets them in accordingly.

A processor reads the weights once for several conversations, and gains by company where its kernels for a few rows are
good. Where they are not it loses: llama.cpp took 2.9 times as long for two rows of Q8_0 as for one on an AMD EPYC, and
1.4 times on an Intel Xeon. Knows no engine and no clock but the one it is given.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from edgekit.runtime.telemetry import percentile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENOUGH = 24
"""So many pieces of text, each behind another one, tell how long one takes."""
WORTH = 0.95
"""Together must take less than so many times what the same takes one after the other."""
PATIENCE = 10.0
"""After so many seconds a text is begun in company, whatever it costs: a long one must not hold up another."""


class Turn:
    """One text that is generated; `piece` is to be called as each part of its text comes, and for nothing else."""

    def __init__(self, company: Company) -> None:
        self._company = company
        self.begun = False
        self._last: tuple[float, int] | None = None

    def piece(self) -> None:
        """Note that a part has come from the engine."""
        now = self._company.clock()
        together = self._company.heard(self)
        if self._last and together and self._last[1] == together:
            self._company.note(together, now - self._last[0])
        self._last = (now, together)


class Company:
    """Lets up to ``most`` texts be generated at once, as long as that takes less time than one after the other.

    First one alone is measured, then two together; what is slower is given up until the model is loaded again.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.most = most
        self._changed = threading.Condition()
        self._turns: list[Turn] = []
        self._waiting: list[Turn] = []
        self._seconds: dict[int, deque[float]] = {1: deque(maxlen=ENOUGH), 2: deque(maxlen=ENOUGH)}
        self._gains: bool | None = None

    @property
    def gains(self) -> bool | None:
        """Say whether company is worth it; None before it is known."""
        return self._gains

    @contextlib.contextmanager
    def turn(self, is_given_up: Callable[[], bool]) -> Iterator[Turn | None]:
        """Wait for a place, behind those who came before; None where nobody wants the text any more."""
        mine = Turn(self)

        def may_begin() -> bool:
            return is_given_up() or (self._waiting[0] is mine and len(self._turns) < self._places())

        with self._changed:
            self._waiting.append(mine)
            self._changed.wait_for(may_begin, PATIENCE)
            self._waiting.remove(mine)
            self._turns.append(mine)
            self._changed.notify_all()
        try:
            yield None if is_given_up() else mine
        finally:
            with self._changed:
                self._turns.remove(mine)
                self._changed.notify_all()

    def look_again(self) -> None:
        """Let those who wait ask whether they are given up."""
        with self._changed:
            self._changed.notify_all()

    def heard(self, turn: Turn) -> int:
        """Return how many are generated together; 0 while a prompt is computed, which takes the others' time."""
        with self._changed:
            turn.begun = True
            return len(self._turns) if all(one.begun for one in self._turns) else 0

    def note(self, together: int, seconds: float) -> None:
        """Note how long a piece took in such company."""
        with self._changed:
            found = self._seconds.get(together)
            if found is None or self._gains is not None or seconds <= 0:
                return
            found.append(seconds)
            alone, two = (self._seconds[count] for count in (1, 2))
            if len(alone) == len(two) == ENOUGH:
                self._gains = percentile(sorted(two), 50) < WORTH * 2 * percentile(sorted(alone), 50)
            if len(alone) == ENOUGH:
                self._changed.notify_all()

    def _places(self) -> int:
        if self._gains is None:
            return min(self.most, 2) if len(self._seconds[1]) == ENOUGH else 1
        return self.most if self._gains else 1

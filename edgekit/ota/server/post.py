"""A worker's post among those that share a database: who is there, and who of them leads. Knows no rollout.

Who leads advances rollouts and says what devices should run; all take reports and answer block requests. The lead is
a lease in the database by the database's time, and has a number that grows with each holder (its epoch): a worker that
was held up finds another number in the transaction in which it wanted to write, and does not lead any more.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.ota.server.store import Lease, Store

LEASE_SECONDS = 10.0
"""So long a worker that was killed still counts as there."""
RENEWALS = 5
"""So often a lease is renewed while it lasts."""
LEAD, AGAIN = "lead", "again"


class Post:
    """One worker's. ``leads`` and ``is_fresh`` are what it knew when it last asked the database."""

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        seconds: float = LEASE_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.name = name
        self.leads = False
        self._seconds = seconds
        self._monotonic = monotonic
        self._holder = f"{name}/{secrets.token_hex(8)}"  # another process of the same name is another holder
        self._epoch = 0
        self._fresh_until = self._renew_at = float("-inf")
        self._heard = -1

    def renew(self) -> None:
        """Say that this worker is there, and take the lead if nobody has it; does nothing until it is time again."""
        asked = self._monotonic()
        if asked < self._renew_at:
            return
        with self.store.transaction():
            now, leases = self.store.now(), self.store.leases()
            mine = leases.get(self._row)
            if mine is not None and mine.holder != self._holder:
                self.ask_again()  # one of this name was here, and took reports perhaps that nobody has written
            self.store.lease(self._row, self._holder, 0, now + self._seconds)
            self._take_lead(leases.get(LEAD), now)
            if self.leads:
                self._bury(leases, now)
        self._fresh_until = asked + self._seconds
        self._renew_at = asked + self._seconds / RENEWALS

    def confirm(self) -> bool:
        """Say, inside the transaction that is about to write, whether this worker still leads."""
        lead = self.store.leases().get(LEAD)
        if self.leads and (lead is None or (lead.holder, lead.epoch) != (self._holder, self._epoch)):
            self.leads = False
            self._renew_at = float("-inf")
            self.ask_again()  # what was said before this was known may have come after the new leader's words
        return self.leads

    def is_fresh(self) -> bool:
        """Say whether nobody else can lead yet, as far as this machine's clock tells."""
        return self.leads and self._monotonic() < self._fresh_until

    def is_asked_again(self) -> bool:
        """Say whether somebody has asked, since the last call, that all wishes be said again."""
        again = self.store.leases().get(AGAIN)
        heard, self._heard = self._heard, again.epoch if again else 0
        return heard != self._heard

    def ask_again(self) -> None:
        """Have the leader say all wishes again: devices answer with their last word, which may have been lost."""
        with self.store.transaction():
            again = self.store.leases().get(AGAIN)
            self.store.lease(AGAIN, self._holder, (again.epoch if again else 0) + 1, 0.0)

    def resign(self) -> None:
        """Leave in good order: another leads with its next step, and nobody waits for this worker."""
        with self.store.transaction():
            if self.confirm():
                self.store.lease(LEAD, "", self._epoch, 0.0)
            self.store.release(self._row)
        self.leads = False
        self._fresh_until = float("-inf")

    @property
    def _row(self) -> str:
        return f"worker/{self.name}"

    def _take_lead(self, lead: Lease | None, now: float) -> None:
        is_mine = lead is not None and (lead.holder, lead.epoch) == (self._holder, self._epoch)
        if lead is not None and not is_mine and lead.holder and lead.until > now:
            self.leads = False
            return
        if not is_mine:
            self._epoch = (lead.epoch if lead else 0) + 1
        self.leads = True
        self.store.lease(LEAD, self._holder, self._epoch, now + self._seconds)

    def _bury(self, leases: dict[str, Lease], now: float) -> None:
        """Forget workers that went without a word; what they had taken and not written is asked for again."""
        gone = [name for name, lease in leases.items() if name.startswith("worker/") and lease.until <= now]
        for name in gone:
            if name != self._row:
                self.store.release(name)
                self.store.note(name.removeprefix("worker/"), "this worker went without a word", now)
                self.ask_again()

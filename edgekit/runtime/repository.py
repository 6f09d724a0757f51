"""Several models by their names, within a budget of memory: who was not asked for the longest makes room.

Knows no HTTP and no engine.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from edgekit.errors import ResourceError, UsageError
from edgekit.runtime import memory
from edgekit.runtime.host import Host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgekit.runtime.batching import Batching
    from edgekit.runtime.session import Session, TextSession
    from edgekit.runtime.watch import Watch

log = logging.getLogger(__name__)


class Repository:
    """Hosts by the names of their models.

    ``budget_mib`` bounds what the loaded models add to this process, as measured when each was loaded; without, all
    stay. The first model is the default one, which is meant where a request names none. ``watch`` looks at what all of
    them answer.
    """

    def __init__(
        self, budget_mib: float | None = None, batching: Batching | None = None, watch: Watch | None = None
    ) -> None:
        self.budget_mib = budget_mib
        self._watch = watch
        self._batching = batching
        self._hosts: dict[str, Host] = {}
        self._costs: dict[str, float] = {}
        self._lock = threading.RLock()

    @classmethod
    def of(cls, host: Host) -> Repository:
        """Return the repository of a single host, whose model may be swapped for one of another name."""
        made = cls()
        made._hosts[""] = host
        return made

    def add(self, open_model: Callable[[], Session | TextSession]) -> Host:
        """Load a model, and free others where the budget wants it; ``open_model`` loads it again when it is asked for.

        Raises:
            UsageError: a model of that name is here already.
            ResourceError: it alone is larger than the budget.
        """
        with self._lock:
            before = memory.rss_mib()
            session = open_model()
            memory.give_back()
            name = session.contract.name
            cost = max(memory.rss_mib() - before, 0.0)
            if name in self._hosts:
                session.close()
                raise UsageError(f"two of the bundles hold a model called {name!r}", "serve one of them elsewhere")
            if self.budget_mib is not None and cost > self.budget_mib:
                session.close()
                raise ResourceError(
                    f"the model {name!r} takes {cost:.0f} MiB, the budget is {self.budget_mib:g} MiB",
                    "give a larger --memory-budget",
                )
            host = Host(session, lambda: self._open(name, open_model), batching=self._batching, watch=self._watch)
            self._hosts[name], self._costs[name] = host, cost
            self._make_room(name)
        return host

    def __iter__(self) -> Iterator[Host]:
        return iter(tuple(self._hosts.values()))

    @property
    def default(self) -> Host:
        """The model that is meant where a request names none."""
        return next(iter(self))

    def get(self, name: str) -> Host | None:
        """Return the host whose model has that name now."""
        host = self._hosts.get(name)
        if host is not None:
            return host
        return next((one for one in self if one.session.contract.name == name), None)

    @property
    def loaded_mib(self) -> float:
        """What the models that are loaded now added to this process when they were."""
        return sum(self._costs[name] for name, host in self._hosts.items() if name in self._costs and host.is_loaded)

    def close(self) -> None:
        """Refuse new requests; each model is closed after the last one in flight."""
        for host in self:
            host.close()

    def load(self, host: Host) -> None:
        """Load a model that may have been unloaded, without a request.

        Raises:
            EdgekitError: it does not load.
        """
        with host.lease():
            pass

    def unload(self, host: Host) -> None:
        """Free a model until it is asked for again.

        Raises:
            InputError: it cannot be loaded again.
        """
        host.unload()  # not under the lock: a host that loads its model holds itself first, and then asks for this
        memory.give_back()

    def _open(self, name: str, open_model: Callable[[], Session | TextSession]) -> Session | TextSession:
        with self._lock:
            self._make_room(name)
            before = memory.rss_mib()
            session = open_model()
            memory.give_back()
            # What was freed before is often used again, so the difference can only be too small.
            self._costs[name] = max(self._costs[name], memory.rss_mib() - before)
        return session

    def _make_room(self, name: str) -> None:
        """Unload the least recently used of the others until the named one fits beside the rest."""
        if self.budget_mib is None:
            return
        others = [(one, host) for one, host in self._hosts.items() if one != name and host.is_loaded]
        others.sort(key=lambda pair: pair[1].idle_seconds)
        wanted = self._costs[name] + sum(self._costs[one] for one, _ in others)
        while others and wanted > self.budget_mib:
            victim, host = others.pop()
            if host.yields():
                wanted -= self._costs[victim]
                log.info("the model %s is unloaded to make room for %s", victim, name)
                memory.give_back()

"""By which way the blobs of a release come: from the URL that it names, and from where its metadata came if that fails.

Knows fetchers, not what they deliver.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgekit.errors import TransferError
from edgekit.ota.device.fetchers import MissingFile, Patience
from edgekit.ota.device.https import HttpFetcher

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

    from edgekit.ota.device.fetchers import Fetcher
    from edgekit.ota.release import Release

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Https:
    """How this device reads URLs: whom it believes and who it is (``None``: the system's authorities, nobody)."""

    context: ssl.SSLContext | None = None
    patience: Patience = field(default_factory=Patience)

    def at(self, url: str, is_stopped: Callable[[], bool] = lambda: False) -> HttpFetcher:
        """Return a fetcher of the repository that lies at a URL."""
        return HttpFetcher(url.rstrip("/") + "/", self.patience, self.context, is_stopped)

    def blobs(self, release: Release, other: Fetcher, is_stopped: Callable[[], bool]) -> Fetcher:
        """Return the preferred way to a release's blobs; ``other`` where the release names no URL, or it fails."""
        return Fallback(self.at(release.url, is_stopped), other) if release.url else other


def ways(fetcher: Fetcher) -> list[Fetcher]:
    """List a fetcher, then what is left of it without its first way, and so on: the last has one way alone."""
    return [fetcher, *ways(fetcher.rest())] if isinstance(fetcher, Fallback) else [fetcher]


class Fallback:
    """Reads from the first fetcher until that fails, then goes on at that very byte with the second, for good.

    What the first does not have comes from the second; it is asked for the next file all the same.
    """

    def __init__(self, first: Fetcher, second: Fetcher) -> None:
        self._first: Fetcher | None = first
        self._second = second

    def rest(self) -> Fetcher:
        """Return the second alone."""
        return self._second

    def stream(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes asked for; see `Fetcher`."""
        if self._first is not None:
            try:
                for piece in self._first.stream(path, start, end):
                    start += len(piece)
                    yield piece
            except TransferError as error:
                if isinstance(error, MissingFile) and path.startswith("metadata/"):
                    raise  # TUF asks for the next root until there is none
                log.warning("%s; what is missing comes over the other way, from byte %d on", error, start)
                if not isinstance(error, MissingFile):  # it may lack this file alone
                    self._first = None
            else:
                return
        yield from self._second.stream(path, start, end)

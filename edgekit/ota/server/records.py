"""How one bundle did on one device, summed up over its health reports. Does no I/O and reads no clock."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from edgekit.ota.messages import Digest

if TYPE_CHECKING:
    from edgekit.ota.messages import Health

REMEMBERED = 48
"""From so many reports on the older ones count for half: a record tells of the last days, not of last year."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``reports`` with requests in them, those, how many failed, and the mean of the logarithms of the p95 (ms)."""

    bundle: Digest
    reports: int = 0
    requests: float = 0.0
    errors: float = 0.0
    log_p95: float = 0.0

    @property
    def error_rate(self) -> float:
        """The share of requests that failed; a little above zero where none did, for few requests prove little."""
        return (self.errors + 0.5) / (self.requests + 1.0)


def added(record: Record, health: Health) -> Record:
    """Return the record with one report more; one without requests says nothing."""
    if not health.requests or not 0 < health.p95_ms < math.inf:
        return record
    if record.reports >= REMEMBERED:
        record = msgspec.structs.replace(
            record, reports=record.reports // 2, requests=record.requests / 2, errors=record.errors / 2
        )
    reports = record.reports + 1
    return Record(
        bundle=record.bundle,
        reports=reports,
        requests=record.requests + health.requests,
        errors=record.errors + min(health.errors, health.requests),
        log_p95=record.log_p95 + (math.log(health.p95_ms) - record.log_p95) / reports,
    )

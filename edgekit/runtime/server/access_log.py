"""One line of JSON a request, with the caller's trace where it told one (W3C Trace Context). Knows no route."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

LOG = logging.getLogger("edgekit.access")
_PARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


class Trace(msgspec.Struct, frozen=True):
    """The caller's trace, the span that asks, and ours within it, in hexadecimal; ``sampled`` as the caller decided."""

    trace_id: str
    parent_id: str
    span_id: str
    sampled: bool

    @property
    def answer(self) -> tuple[bytes, bytes]:
        """The header that tells the caller our span."""
        return b"traceresponse", f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}".encode()


def trace_of(headers: Mapping[bytes, bytes]) -> Trace | None:
    """Read ``traceparent``; None where there is none, or no valid one."""
    found = _PARENT.match(headers.get(b"traceparent", b""))
    if found is None:
        return None
    trace, parent, flags = (part.decode() for part in found.groups())
    if not int(trace, 16) or not int(parent, 16):
        return None
    return Trace(trace, parent, secrets.token_hex(8), bool(int(flags, 16) & 1))


def write(method: str, path: tuple[str, ...], status: int, *, started: float, trace: Trace | None) -> None:
    """Log a request that was answered; ``started`` is by `time.perf_counter`."""
    told: dict[str, object] = {
        "time": round(time.time(), 3),
        "method": method,
        "path": f"/{'/'.join(path)}",
        "status": status,
        "ms": round(1000 * (time.perf_counter() - started), 3),
    }
    if trace:
        told |= {"trace_id": trace.trace_id, "parent_id": trace.parent_id, "span_id": trace.span_id}
    LOG.info("%s", msgspec.json.encode(told).decode())

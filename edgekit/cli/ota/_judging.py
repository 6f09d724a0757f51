"""Holds what was measured of a new model against the limits that its release signs.

A limit that could not be measured does not hold. Knows neither how models are loaded nor how they are swapped.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from edgekit.errors import HealthError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgekit.ota.release import Limits
    from edgekit.runtime.comparison import Agreement
    from edgekit.runtime.host import Host
    from edgekit.runtime.session import Session, TextSession
    from edgekit.runtime.telemetry import Statistics

POLL_SECONDS = 0.05
SETTLE_SECONDS = 10.0
"""So long may the other model lag behind before nothing counts as compared."""
UNITS = {"ms": "ms", "mib": "MiB"}
FIRST = ""
"""Why nothing was compared where no model served before: then agreement is not judged."""


def accept(measured: Mapping[str, float], limits: Limits) -> None:
    """Hold the limits that are signed for the try-out.

    Raises:
        HealthError: one does not hold, or was not measured.
    """
    load_ms = None if limits.max_load_seconds is None else 1000 * limits.max_load_seconds
    held = {"p95_ms": limits.max_p95_ms, "peak_rss_mib": limits.max_rss_mib, "load_ms": load_ms}
    for name, limit in held.items():
        if limit is None or measured.get(name, math.inf) <= limit:
            continue
        what, unit = name.rsplit("_", 1)
        found = f"is {measured[name]:.4g} {UNITS[unit]}" if name in measured else "was not measured"
        why = " (the bundle has no golden inputs)" if name == "p95_ms" and name not in measured else ""
        raise HealthError(f"{what} of the try-out {found}{why}, limit {limit:g} {UNITS[unit]}", measured=measured)


def probation(host: Host, limits: Limits, is_stopped: Callable[[], bool], uncompared: str) -> dict[str, float]:
    """Watch live requests until there are enough, or the time is over; judge and return what was measured.

    ``uncompared``: why no answer could be compared with the model before, where none was.

    Raises:
        HealthError: a limit does not hold, or was not measured although requests came.
        ResourceError: it is being stopped.
    """
    start, deadline = host.statistics(), time.monotonic() + limits.probation_seconds
    while time.monotonic() < deadline and _seen(host, start) < limits.probation_requests:
        time.sleep(POLL_SECONDS)  # not Event.wait: the handler of a signal would wait for its lock
        if is_stopped():
            raise ResourceError("stopped during the probation", "it goes on after the next start")
        refuse_broken(host.session, "in its probation")
        if host.statistics().non_finite > start.non_finite:
            break
    refuse_broken(host.session, "in its probation")
    requests = _seen(host, start)
    agreement = _compared(host) if requests and limits.min_agreement is not None else host.agreement()
    figures = _figures(host, start, requests, agreement)
    if requests:
        _hold(figures, limits, uncompared)
    return figures


def shadow(
    host: Host, candidate: Session | TextSession, limits: Limits, is_stopped: Callable[[], bool]
) -> dict[str, float]:
    """Watch a candidate compute what the old model answers; judge and return what was measured.

    Raises:
        HealthError: it fails or disagrees too often, or was compared with nothing although requests came.
        ResourceError: it is being stopped.
    """
    start, deadline = host.statistics(), time.monotonic() + limits.shadow_seconds
    while time.monotonic() < deadline and _tried(host.agreement()) < limits.shadow_requests:
        time.sleep(POLL_SECONDS)
        if is_stopped():
            raise ResourceError("stopped while the new model ran in the shadow", "it begins anew after the next start")
        refuse_broken(candidate, "in the shadow")
    refuse_broken(candidate, "in the shadow")
    requests = _seen(host, start)
    found = _compared(host) if requests else host.agreement()
    figures = {"shadow_requests": float(requests), "shadow_compared": float(found.samples)}
    if _tried(found):
        figures["shadow_error_rate"] = found.failed / _tried(found)
    if found.samples:
        figures["shadow_agreement"] = found.share
    if requests:
        least = 0.0 if limits.min_agreement is None else limits.min_agreement
        if not figures.get("shadow_error_rate", 0.0) <= limits.max_error_rate:
            raise _broken(figures, "shadow_error_rate", f"at most {limits.max_error_rate:g}")
        if not figures.get("shadow_agreement", -math.inf) >= least:
            raise _broken(figures, "shadow_agreement", f"at least {least:g}", "it was busy, or answers in text")
    return figures


def _tried(found: Agreement) -> int:
    return found.samples + found.failed


def refuse_broken(session: Session | TextSession, when: str) -> None:
    """Raise HealthError where the engine's own process died too often."""
    condition = session.condition()
    if condition is not None and condition.is_broken:
        told = ", ".join(f"{count} times {how}" for how, count in condition.crashes.items())
        raise HealthError(f"{when} the engine crashed too often: {told}")


def _compared(host: Host) -> Agreement:
    """Wait for the first comparison: a request counts a little before it is handed on to be compared."""
    from edgekit.runtime.session import Session

    found, deadline = host.agreement(), time.monotonic() + SETTLE_SECONDS
    if not (host.is_paired and isinstance(host.session, Session)):
        return found
    while (left := deadline - time.monotonic()) > 0:
        found = host.settled(left)
        if found.samples or found.skipped:
            break
        time.sleep(POLL_SECONDS)
    return found


def _seen(host: Host, start: Statistics) -> int:
    """Count the requests that say something of the model: a caller's mistakes must not dilute its errors."""
    now = host.statistics()
    return (now.requests - now.refused) - (start.requests - start.refused)


def _figures(host: Host, start: Statistics, requests: int, agreement: Agreement) -> dict[str, float]:
    """Return what was measured; what was not is left out, for a 0 would look like a good figure."""
    now, figures = host.statistics(), {"requests": float(requests)}
    if requests:
        figures["error_rate"] = (now.errors - start.errors) / requests
        figures["non_finite"] = float(now.non_finite - start.non_finite)
    if requests > now.errors - start.errors:
        figures["p95_live_ms"] = now.p95_ms
    if agreement.samples:
        figures |= {"agreement": agreement.share, "compared": float(agreement.samples)}
    return figures


def _hold(figures: Mapping[str, float], limits: Limits, uncompared: str) -> None:
    most = {"non_finite": 0.0, "error_rate": limits.max_error_rate, "p95_live_ms": limits.max_p95_ms}
    for name, limit in most.items():
        if limit is not None and not figures.get(name, math.inf) <= limit:
            wanted = f"at most {limit:g}" if limit else "no NaN or infinity" if name == "non_finite" else "none"
            raise _broken(figures, name, wanted)
    least = limits.min_agreement
    if least is not None and uncompared and not figures.get("agreement", -math.inf) >= least:
        raise _broken(figures, "agreement", f"at least {least:g}", uncompared)


def _broken(figures: Mapping[str, float], name: str, wanted: str, why: str = "") -> HealthError:
    found = f"is {figures[name]:.4g}" if name in figures else f"was not measured{why and f' ({why})'}"
    told = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
    when = "in the shadow" if name.startswith("shadow") else "in its probation"
    return HealthError(f"{when} {name} {found}, {wanted} is wanted ({told})", measured=figures)

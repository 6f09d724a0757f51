"""What runs models under the OTA agent: a `Host`, its HTTP server, and the judge of a new model's probation.

Here the update channel and the runtime meet; neither imports the other.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from edgekit.errors import BundleError, EdgekitError, HealthError, MissingExtra, ResourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from edgekit.bundle import Bundle
    from edgekit.ota.device.agent import Vitals
    from edgekit.ota.release import Limits, Release
    from edgekit.runtime.host import Host
    from edgekit.runtime.server import Options, Running
    from edgekit.runtime.session import Session, TextSession
    from edgekit.runtime.telemetry import Statistics

POLL_SECONDS = 0.05


class HostServing:
    """The agent's `Serving`: tries bundles out in a child process, swaps them in the host, judges live traffic.

    ``port`` ``None`` serves in-process only; 0 takes a free port. ``host`` and ``server`` are ``None`` until
    something is installed.
    """

    def __init__(self, profile: str, port: int | None = None, threads: int = 0, engines: Path | None = None) -> None:
        self.profile = profile
        self.port = port
        self.threads = threads
        self.engines = engines
        self.listening: Options | None = None
        self.tell: Callable[[str], None] = lambda _: None
        self.host: Host | None = None
        self.server: Running | None = None
        self._tried = ""  # digest of the candidate; anything else that is activated is a way back
        self._before = ""  # digest of the model that shadows, ready to come back
        self._counted: Statistics | None = None
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Cut a probation short and stop serving; the next start takes the probation up again."""
        self._stopping.set()

    def close(self) -> None:
        """Stop the server, then free the model."""
        if self.server is not None:
            self.server.stop()
            self.server = None
        if self.host is not None:
            self.host.close()
            self.host = None

    def try_out(self, bundle: Bundle, release: Release) -> Mapping[str, float]:
        """Run the golden inputs in a child process; see `Serving`."""
        from edgekit.runtime import acceptance

        self.tell(f"trying out version {release.version}")
        try:
            measured = acceptance.try_out(bundle.folder, self.profile, self.threads)
        except (UsageError, BundleError) as error:  # its bytes were checked: fetching it again would change nothing
            raise HealthError(f"the bundle cannot run here: {error.message}", error.hint) from error
        limit, p95 = release.limits.max_p95_ms, measured.get("p95_ms", 0.0)
        if limit is not None and p95 > limit:
            raise HealthError(f"p95 of the try-out is {p95:.4g} ms, limit {limit:g} ms")
        self._tried = bundle.digest
        return measured

    def activate(self, bundle: Bundle | None) -> None:
        """Swap without dropping a request; what served before shadows until the probation ends; see `Serving`."""
        if bundle is None:
            self.close()
        elif self.host is None:
            self._begin(self._load(bundle))
        elif bundle.digest == self.host.digest:
            return
        elif bundle.digest == self._before:
            self._before = ""
            self.host.roll_back()
        else:
            shadow = bundle.digest == self._tried
            before = self.host.digest if shadow else ""
            self.host.swap(self._load(bundle), shadow=shadow)
            self._before = before

    def probation(self, release: Release) -> Mapping[str, float]:
        """Watch live requests until there are enough, or the time is over; see `Serving`.

        A device that nobody asks keeps the release on the strength of its try-out: ``requests`` is 0 then, and
        nothing else is reported of the probation.
        """
        host = self._need_host()
        limits, start = release.limits, host.statistics()
        self.tell(
            f"version {release.version} serves on probation: {limits.probation_requests} live requests, "
            f"or {limits.probation_seconds:g} s"
        )
        deadline = time.monotonic() + limits.probation_seconds
        while time.monotonic() < deadline and _seen(host, start) < limits.probation_requests:
            time.sleep(POLL_SECONDS)  # not Event.wait: the handler of a signal would wait for its lock
            if self._stopping.is_set():
                raise ResourceError("stopped during the probation", "it goes on after the next start")
            if host.statistics().non_finite > start.non_finite:
                break
        figures = _figures(host, start)
        _judge(figures, limits)
        self._before = ""
        host.end_shadow()
        return figures

    def vitals(self) -> Vitals:
        """Count requests and errors since the last call; the 95th percentile is of the last answers, in ms."""
        from edgekit.ota.device.agent import Vitals
        from edgekit.runtime.memory import rss_mib

        host, before = self.host, self._counted
        if host is None:
            return Vitals(requests=0, errors=0, p95_ms=0.0, rss_mib=rss_mib())
        now = self._counted = host.statistics()
        requests, errors = now.requests, now.errors
        if before is not None and before.digest == now.digest and before.requests <= requests:
            requests, errors = requests - before.requests, errors - before.errors
        return Vitals(requests=requests, errors=max(errors, 0), p95_ms=now.p95_ms, rss_mib=rss_mib())

    def _load(self, bundle: Bundle) -> Session | TextSession:
        from edgekit.runtime.opening import load

        try:
            return load(bundle.folder, variant=self.profile, threads=self.threads, engines=self.engines)
        except (UsageError, BundleError, MissingExtra) as error:
            raise HealthError(f"the bundle does not load: {error.message}", error.hint) from error

    def _begin(self, session: Session | TextSession) -> None:
        from edgekit.runtime.host import Host
        from edgekit.runtime.server import serve_in_thread

        host = Host(session)
        try:
            self.server = None if self.port is None else serve_in_thread(host, self.port, self.listening)
        except EdgekitError:
            host.close()  # so that the next try begins anew, instead of serving without its port
            raise
        self.host = host

    def _need_host(self) -> Host:
        if self.host is None:
            raise HealthError("nothing serves that could be watched")
        return self.host


def _seen(host: Host, start: Statistics) -> int:
    """Count the requests that say something of the model: a caller's mistakes must not dilute its errors."""
    now = host.statistics()
    return (now.requests - now.refused) - (start.requests - start.refused)


def _figures(host: Host, start: Statistics) -> dict[str, float]:
    """Return what was measured; what was not is left out, for a 0 would look like a good figure."""
    requests, now, agreement = _seen(host, start), host.statistics(), host.agreement()
    figures = {"requests": float(requests)}
    if requests:
        figures["error_rate"] = (now.errors - start.errors) / requests
        figures["non_finite"] = float(now.non_finite - start.non_finite)
    if requests > now.errors - start.errors:
        figures["p95_live_ms"] = now.p95_ms
    if agreement.samples:
        figures["agreement"] = agreement.share
    return figures


def _judge(figures: Mapping[str, float], limits: Limits) -> None:
    broken = [
        ("non_finite", figures.get("non_finite", 0.0) > 0, "no NaN or infinity"),
        ("error_rate", figures.get("error_rate", 0.0) > limits.max_error_rate, f"at most {limits.max_error_rate:g}"),
        (
            "p95_live_ms",
            limits.max_p95_ms is not None and figures.get("p95_live_ms", 0.0) > limits.max_p95_ms,
            f"at most {limits.max_p95_ms} ms",
        ),
        (
            "agreement",
            limits.min_agreement is not None and figures.get("agreement", 1.0) < limits.min_agreement,
            f"at least {limits.min_agreement}",
        ),
    ]
    for name, is_broken, wanted in broken:
        if is_broken:
            told = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
            raise HealthError(f"in its probation {name} is {figures[name]:.4g}, {wanted} is wanted ({told})")

"""What runs models under the OTA agent: a `Host`, its HTTP server, and the judge of a new model's probation.

Here the update channel and the runtime meet; neither imports the other.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from edgekit.cli.ota import _judging
from edgekit.durable import MIB
from edgekit.errors import BundleError, EdgekitError, HealthError, MissingExtra, ResourceError, Unrunnable, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from edgekit.bundle import Bundle
    from edgekit.ota import messages
    from edgekit.ota.device.agent import Vitals
    from edgekit.ota.release import Release
    from edgekit.runtime.drift import Alert
    from edgekit.runtime.host import Host
    from edgekit.runtime.isolation import Isolation
    from edgekit.runtime.server import Options, Running
    from edgekit.runtime.session import Session, TextSession
    from edgekit.runtime.telemetry import Statistics
    from edgekit.runtime.watch import Watch

log = logging.getLogger(__name__)

WHILE_LOADING = 3
"""A model takes so many times its file's size while it is loaded: EfficientNet-Lite0 of 18.7 MB 47 MiB, measured."""
SPARE_MIB = 32
"""What has to be left for everybody else on the device."""
_OLD_LAGS = "the old model was busy, failed, or answers in text"


class HostServing:
    """The agent's `Serving`: tries bundles out in a child process, swaps them in the host, judges live traffic.

    ``port`` ``None`` serves in-process only; 0 takes a free port. ``host`` and ``server`` are ``None`` until
    something is installed. With ``isolation`` engines have processes of their own, and ``on_broken`` is told which
    bundle's crashes too often, and why.
    """

    def __init__(self, profile: str, port: int | None = None, threads: int = 0, engines: Path | None = None) -> None:
        self.profile = profile
        self.port = port
        self.threads = threads
        self.engines = engines
        self.listening: Options | None = None
        self.watch: Watch | None = None
        self.isolation: Isolation | None = None  # the engine runs in this process
        self.on_broken: Callable[[str, str], None] = lambda _bundle, _reason: None
        self.is_shut_in = True  # a model that is tried out reaches nothing of the device
        self.scratch: Path | None = None  # where it writes: on a disk, where the device has said which
        self.tell: Callable[[str], None] = lambda _: None
        self.host: Host | None = None
        self.server: Running | None = None
        self._serves = ""  # the variant
        self._tried = ""  # digest of the candidate; anything else that is activated is a way back
        self._back: Callable[[], Session | TextSession] | None = None  # loads what serves
        self._before = ""  # digest of the model that shadows, ready to come back
        self._uncompared = _judging.FIRST
        self._cramped = ""  # digest of a candidate that found no room beside what serves
        self._hopeless: tuple[str, str] = ("", "")  # a candidate that found none with nothing else loaded
        self._waiting = ""  # digest of the candidate that computes what the old model answers
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
        """Run the golden inputs in a child process, beside what serves or in its place, and then in its shadow."""
        from edgekit.runtime import acceptance

        if self._waiting:  # it passed, and could not be written down
            self._give_up_waiting()
        self.tell(f"trying out version {release.version}")
        try:
            measured = self._golden(bundle, release)
        except acceptance.NoRoom as lack:
            measured = self._in_its_place(bundle, release, lack)
        _judging.accept(measured, release.limits)
        self._tried = bundle.digest
        return (
            {**measured, **self._in_shadow(bundle, release, measured)} if release.limits.shadow_requests else measured
        )

    def _golden(self, bundle: Bundle, release: Release) -> dict[str, float]:
        from edgekit.runtime import acceptance

        allowed = acceptance.Allowance(
            memory_mib=release.limits.max_rss_mib or 0.0, is_shut_in=self.is_shut_in, place=self.scratch
        )
        try:
            return acceptance.try_out(bundle.folder, self._variant(bundle), self.threads, allowed)
        except UsageError as error:
            raise Unrunnable(f"the bundle cannot run here: {error.message}", error.hint) from error
        except BundleError as error:  # its bytes were checked: fetching it again would change nothing
            raise HealthError(f"the bundle cannot run here: {error.message}", error.hint) from error

    def _in_its_place(self, bundle: Bundle, release: Release, lack: ResourceError) -> dict[str, float]:
        """Try a bundle out where the serving model lay; requests wait, and then that model answers again.

        Raises:
            ResourceError: that does not hold it either, or the serving model does not open again: no fault of it.
        """
        host, back = self.host, self._back
        if host is None or back is None or self._hopeless == (bundle.digest, bundle.variant):
            raise lack
        told = f"{lack.message}: version {release.version} is tried out in the serving model's place, requests wait"
        self.tell(told)
        log.warning("%s", told)
        began = time.perf_counter()
        try:
            measured = host.aside(lambda: self._alone(bundle, release), back)
        except HealthError as error:
            if not host.is_loaded:
                raise ResourceError(f"the model that served does not open again yet: {error.message}") from error
            error.measured["in_place_seconds"] = time.perf_counter() - began
            raise
        finally:
            seconds = time.perf_counter() - began
            self.tell(f"requests waited for {seconds:.1f} s")
        self._cramped = bundle.digest
        return {**measured, "in_place_seconds": seconds}

    def _alone(self, bundle: Bundle, release: Release) -> dict[str, float]:
        from edgekit.runtime import acceptance, memory

        memory.give_back()
        try:
            return self._golden(bundle, release)
        except acceptance.NoRoom as error:
            self._hopeless = (bundle.digest, bundle.variant)  # it would cost a gap each time that it is tried again
            raise ResourceError(f"{error.message}, with no other model loaded", error.hint) from error

    def activate(self, bundle: Bundle | None) -> None:
        """Swap without dropping a request; what served before shadows until the probation ends; see `Serving`."""
        if self._waiting and (bundle is None or bundle.digest != self._waiting):
            self._give_up_waiting()
        if bundle is None:
            self.close()
        elif self.host is None:
            self._begin(self._load(bundle))
            self._uncompared = _judging.FIRST
        elif self._waiting:
            self._before, self._waiting, self._uncompared = self.host.digest, "", _OLD_LAGS
            self.host.split(1.0)
        elif (bundle.digest, bundle.variant) == (self.host.digest, self._serves):
            if not self._before:
                self._uncompared = _judging.FIRST  # a new release of the very same bundle agrees with it
            return
        elif bundle.digest == self._before:
            self._before = ""
            self.host.roll_back()
        elif self._fits_beside(bundle):
            shadow = bundle.digest == self._tried
            before = self.host.digest if shadow else ""
            self.host.swap(self._load(bundle), shadow=shadow)
            self._before, self._uncompared = before, _OLD_LAGS
        else:
            gap = self.host.replace(lambda: self._load(bundle), self._back)
            self._before, self._uncompared = "", "the memory holds one model alone"
            self.tell(f"the memory holds one model alone: requests waited for {gap:.1f} s")
        self._back = functools.partial(self._load, bundle) if bundle else None
        self._serves = bundle.variant if bundle else ""

    def probation(self, release: Release) -> Mapping[str, float]:
        """Watch live requests until there are enough, or the time is over; see `Serving`.

        A device that nobody asks keeps the release on the strength of its try-out: ``requests`` is 0 then, and
        nothing else is reported of the probation.
        """
        host, limits = self._need_host(), release.limits
        self.tell(
            f"version {release.version} serves on probation: {limits.probation_requests} live requests, "
            f"or {limits.probation_seconds:g} s"
        )
        figures = _judging.probation(host, limits, self._stopping.is_set, self._uncompared)
        self._before = ""
        host.end_shadow()
        return figures

    def vitals(self) -> Vitals:
        """Count requests and errors since the last call; the 95th percentile is of the last answers, in ms.

        The memory is this process's, and that of the engine's own.
        """
        from edgekit.ota.device.agent import Vitals
        from edgekit.runtime.memory import rss_mib

        host, before = self.host, self._counted
        if host is None:
            return Vitals(requests=0, errors=0, p95_ms=0.0, rss_mib=rss_mib())
        now = self._counted = host.statistics()
        requests, errors = now.requests, now.errors
        if before is not None and before.digest == now.digest and before.requests <= requests:
            requests, errors = requests - before.requests, errors - before.errors
        condition = host.session.condition()
        apart = rss_mib(condition.pid) if condition is not None and condition.pid is not None else 0.0
        memory = rss_mib() + apart
        return Vitals(requests, max(errors, 0), now.p95_ms, memory, tuple(map(_alert, host.alerts)))

    def _in_shadow(self, bundle: Bundle, release: Release, measured: Mapping[str, float]) -> dict[str, float]:
        """Let the candidate compute what the old model answers; where it passes it waits there, ready to take over."""
        host, limits = self.host, release.limits
        if host is None or (bundle.digest, bundle.variant) == (host.digest, self._serves):
            return {}  # nothing to be compared with
        if not self._fits_beside(bundle):
            raise HealthError("it was to run in the shadow, and the memory holds one model alone", measured=measured)
        self.tell(
            f"version {release.version} runs in the shadow, the old one answers: {limits.shadow_requests} live "
            f"requests, or {limits.shadow_seconds:g} s"
        )
        candidate = self._load(bundle)
        host.swap(candidate, share=0.0)
        self._waiting = bundle.digest
        try:
            return _judging.shadow(host, candidate, limits, self._stopping.is_set)
        except BaseException as error:
            self._give_up_waiting()
            if isinstance(error, HealthError):
                error.measured = {**measured, **error.measured}
            raise

    def _give_up_waiting(self) -> None:
        self._waiting = ""
        if self.host is not None:
            self.host.roll_back()

    def _fits_beside(self, bundle: Bundle) -> bool:
        """Say whether the memory holds a bundle's model beside the one that serves."""
        from edgekit.runtime import memory

        if bundle.digest == self._cramped:
            return False
        mine = self._variant(bundle)
        files = {path for one in bundle.manifest.variants if one.name == mine for path in one.files}
        size = sum(entry.size for entry in bundle.manifest.files if entry.path in files)
        return memory.available_mib() > WHILE_LOADING * size / MIB + SPARE_MIB

    def _variant(self, bundle: Bundle) -> str:
        return bundle.variant or self.profile

    def _load(self, bundle: Bundle) -> Session | TextSession:
        from edgekit.runtime.opening import load

        how = self.isolation
        isolated = how is not None and replace(how, on_broken=lambda reason: self.on_broken(bundle.digest, reason))
        try:
            return load(
                bundle.folder,
                variant=self._variant(bundle),
                threads=self.threads,
                engines=self.engines,
                isolated=isolated,
            )
        except (UsageError, BundleError, MissingExtra) as error:
            raise HealthError(f"the bundle does not load: {error.message}", error.hint) from error

    def _begin(self, session: Session | TextSession) -> None:
        from edgekit import device_profiles
        from edgekit.runtime.batching import of_class
        from edgekit.runtime.host import Host
        from edgekit.runtime.server import Options, serve_in_thread

        known = device_profiles.load(self.profile) if self.profile in device_profiles.names() else None
        batching = of_class(known or device_profiles.detect(), self.threads)
        host = Host(session, batching=batching, watch=self.watch)
        options = self.listening or Options()
        if batching:
            options = replace(options, limits=options.limits.for_batches(batching.workers))
        try:
            self.server = None if self.port is None else serve_in_thread(host, self.port, options)
        except EdgekitError:
            host.close()  # so that the next try begins anew, instead of serving without its port
            raise
        self.host = host

    def _need_host(self) -> Host:
        if self.host is None:
            raise HealthError("nothing serves that could be watched")
        return self.host


def _alert(found: Alert) -> messages.Alert:
    from edgekit.ota import messages

    return messages.Alert(
        kind=found.kind, what=found.what[:200], value=found.value, limit=found.limit, since=found.since
    )

"""One update, straight down: trust, stage, try out, commit, take over, probation; and back where it misbehaves.

Knows no channel: what is wanted comes in, what happened goes out as a report. Raises only what may be tried
again; everything final is a report and stands in ``state.json`` before it is told. Nothing that somebody without a key
can bring about is final.
"""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import msgspec

from edgekit.errors import BundleError, HealthError, ResourceError, TrustError, Unrunnable, UsageError
from edgekit.ota.device import clock, marks, slots, trust
from edgekit.ota.device.gate import Gate
from edgekit.ota.device.needs import lacks
from edgekit.ota.device.sources import Fallback
from edgekit.ota.device.staging import stage
from edgekit.ota.messages import Desired, Identifier, Installed, Refused, RolledBack
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    from edgekit.bundle import Bundle
    from edgekit.ota.device.factory import Factory
    from edgekit.ota.device.fetchers import Fetcher
    from edgekit.ota.device.needs import Capabilities
    from edgekit.ota.device.slots import Choice, Outcome, State
    from edgekit.ota.device.sources import Https
    from edgekit.ota.device.trust import Found
    from edgekit.ota.release import Release
    from edgekit.progress import Progress

log = logging.getLogger(__name__)

MAX_TRIES = 3
"""So often may one release fail on this device, or take its agent down, before it is not tried again."""
MAX_STARTS = 1
"""So often may a probation be taken up again after a restart or a bug; once more is a crash loop."""


class Serving(Protocol):
    """What runs models on this device; handed in, because OTA knows no engine."""

    def try_out(self, bundle: Bundle, release: Release) -> Mapping[str, float]:
        """Load the candidate (``bundle.variant``) beside what serves, run its golden inputs, return what was measured.

        Where memory does not hold both it may take the other's place meanwhile.

        Raises:
            Unrunnable: this device cannot run that variant; the next one in the signed order may run.
            HealthError: it does not load, answers wrongly, or breaks the release's limits.
        """
        ...

    def activate(self, bundle: Bundle | None) -> None:
        """Let this bundle take over without losing a request; ``None``: serve nothing.

        Raises:
            HealthError: it cannot take over.
        """
        ...

    def probation(self, release: Release) -> Mapping[str, float]:
        """Watch the live traffic for as long as the release's limits say, and return what was measured.

        Raises:
            HealthError: the limits were broken.
        """
        ...


@dataclass(frozen=True)
class Device:
    """Who this device is, where it keeps its bundles, what it has that a variant may need, and what may happen when.

    ``https``: how it reads the URLs that releases name; ``None`` takes everything from where the metadata came.
    """

    name: str
    profile: str
    state: Path
    serving: Serving
    capabilities: Capabilities | None = None
    clock_is_set: Callable[[], bool] = lambda: True
    factory: Factory | None = None
    gate: Gate = field(default_factory=Gate)
    https: Https | None = None

    def __post_init__(self) -> None:
        """Refuse names that could change a topic or a path, and that ``state.json`` would not take back."""
        require_identifier(self.name)
        require_identifier(self.profile)

    def way_to(self, release: Release, other: Fetcher) -> Fetcher:
        """Return where the blobs of a release come from: its URL where it has one, else ``other``."""
        return self.https.blobs(release, other, self.gate.is_stopped) if self.https else other


def update(
    device: Device, desired: Desired, fetcher: Fetcher, now: datetime, *, progress: Progress = silent
) -> Outcome:
    """Bring the device to the desired release and return what became of it.

    A word that was given before, for the same deployment and attempt, is given again without work.

    Raises:
        Held: the device's policy says not now.
        TransferError, ResourceError, BundleError, OSError: the bytes did not come or do not fit; call again.
        Unproven: what came is not what was signed: raise the alarm, and call again.
    """
    state = _settled(device)
    if state.outcome is not None and _same_wish(state, state.outcome, desired):
        slots.collect(device.state, state)  # a kill or a power cut may have come before it
        return state.outcome
    if slots.failures(state, desired.release) >= MAX_TRIES:
        reason = f"failed {MAX_TRIES} times on this device: it is not tried again, a newer one is"
        return _told(device, state, desired, _rolled_back(device, desired, reason))
    try:
        found = _trusted(device, state, desired, fetcher, now=now)
        if found is None:
            slots.collect(device.state, state)
            return _told(device, state, desired, _installed(device, desired, state.current, {}))
        return _tried_in_order(device, desired, found, fetcher, progress=progress)
    except trust.Unproven:
        raise
    except TrustError as error:
        return _told(device, slots.load(device.state), desired, _refused(device, desired, error))


def _settled(device: Device) -> State:
    """Settle a probation that something cut short, and return the state: nothing is installed before that.

    Raises:
        ResourceError: it cannot be, the disk takes no writes; what serves now is not proven, what is told not final.
    """
    slots.mend(device.state)
    if slots.load(device.state).trial is not None:
        recover(device)
    state = slots.load(device.state)
    if state.trial is not None:
        path = state.current.path if state.current else ""
        raise ResourceError(
            f"{device.state} cannot be written: the probation of {path} is not settled, nothing is installed before",
            "free disk space, or see why the disk takes no writes; it is tried again",
        )
    return state


def _tried_in_order(device: Device, desired: Desired, found: Found, fetcher: Fetcher, *, progress: Progress) -> Outcome:
    """Take the first variant, in the signed order, that this device can run and that passes its try-out."""
    release, left, received = found.release, dict[str, str](), 0
    known = slots.load(device.state).unrunnable.get(release.path, {})
    for variant in release.order:
        left[variant] = known.get(variant) or lacks(found.manifest.variant(variant), device.capabilities)
        if left[variant]:
            continue
        bundle, came = stage(device, found, variant, fetcher, progress=progress)
        received += came
        device.gate.require()
        try:
            measured = {"downloaded_bytes": float(received), **_try_out(device, bundle, release)}
        except Unrunnable as error:
            left[variant] = error.message[:500] or "it does not run"
            slots.save(device.state, slots.passed_over(slots.load(device.state), release, variant, left[variant]))
            log.warning("%s of %s does not run here: %s", variant, release.path, error.message)
            continue
        except HealthError as error:
            return _go_back(device, desired, release, error)
        del left[variant]
        return _take_over(
            device, desired, release, (bundle, slots.Choice(variant=variant, left=left)), measured=measured
        )
    told = "; ".join(f"{name}: {why}" for name, why in left.items())
    return _go_back(device, desired, release, Unrunnable(f"no variant runs on this device: {told}"))


def _try_out(device: Device, bundle: Bundle, release: Release) -> Mapping[str, float]:
    """Try a bundle out, and note before that it began: one that takes the whole agent down counts as a failure."""
    state = slots.load(device.state)
    slots.save(device.state, slots.beginning(state, release))
    try:
        return device.serving.try_out(bundle, release)
    except BaseException as error:
        if isinstance(error, Unrunnable) or not isinstance(error, HealthError):  # no failure, and the agent lives
            slots.save(device.state, state)
        raise


def require_identifier(name: str) -> None:
    """Raise UsageError unless ``name`` can name a fleet, a device or a hardware class."""
    try:
        msgspec.convert(name, Identifier)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{name!r} cannot name a fleet, device or profile", "use letters, digits, '.', '_' and '-', at most 64"
        ) from error


def recover(device: Device) -> Outcome | None:
    """Bring into service what the pointer names, after a start; settle a probation that was cut short.

    A damaged bundle, one that does not come up, or a probation cut short twice gives way to the one before, and that to
    the factory's. A disk that cannot be written keeps nothing from serving. Returns a report where that settled
    something.

    Raises:
        ResourceError: the device lacks something, or is being stopped; that start counts for nothing.
    """
    state = None
    try:
        slots.mend(device.state)
        state = slots.load(device.state)
        return _brought_up(device, state)
    except (OSError, ResourceError) as error:
        if isinstance(error, ResourceError) and state is not None:
            _uncount(device, state)
            raise
        log.error("the device's folder is not as it should be, so nothing is updated: %s", error)  # noqa: TRY400  # no trace: it is no bug
        _serve_unwritten(device)
        with suppress(OSError, ResourceError):
            _uncount(device, state)
        return None


def _uncount(device: Device, before: State | None) -> None:
    """Take a start back under which a probation did not end: only a crash speaks against the release."""
    if before is None or before.trial is None:
        return
    state = slots.load(device.state)
    if state.trial is not None and state.current == before.current:
        slots.save(device.state, slots.on_trial(state, before.trial))


def retreat(device: Device, bundle: str, reason: str) -> Outcome | None:
    """Go back to what served before ``bundle``, which took over for good and does not do any more.

    The word is on the wish that installed it, so that this wish is not obeyed again. Returns it; None, and nothing
    changes, where another bundle serves now or none is left to go back to.
    """
    state = slots.load(device.state)
    current, previous = state.current, state.previous
    if current is None or current.bundle != bundle or state.trial is not None:
        return None
    if previous is None or not slots.is_whole(device.state, previous):
        log.error("%s serves on, there is nothing to go back to: %s", current.path, reason)
        return None
    return _go_back(device, _wish_that_installed(state, current), current, HealthError(reason))


def _brought_up(device: Device, state: State) -> Outcome | None:
    wish = _wish_on_trial(state)
    try:
        if state.trial is not None:
            state = _one_more_start(device, state)
            _serve_the_one_before(device, state)
        _serve_current(device, state)
    except (BundleError, HealthError) as error:
        if state.current is None or (state.previous is None and wish is None):
            log.error("the installed bundle is lost: %s", error)  # noqa: TRY400  # no trace: it is no bug
            slots.save(device.state, slots.darkened(state, str(error)))
            _serve_last_resort(device)
            return None
        return _go_back(device, wish or _unknown_wish(state.current), state.current, error)
    if state.dark:
        slots.save(device.state, slots.lit(state))
    if wish is None or state.current is None:
        return None
    return _on_probation(device, wish, state.current, {})


def _serve_the_one_before(device: Device, state: State) -> None:
    """Begin with the old model where the release says how often both must agree, and try the new one out again."""
    release, before = state.current, state.previous
    if release is None or before is None or release.limits.min_agreement is None:
        return
    try:
        device.serving.activate(slots.open_bundle(device.state, before, state.variant_of(before)))
    except (BundleError, HealthError) as error:
        log.warning("%s cannot be compared with any more: %s", before.path, error)
        return
    device.serving.try_out(slots.open_bundle(device.state, release, state.variant_of(release)), release)


@contextmanager
def judged(device: Device, now: datetime) -> Iterator[datetime]:
    """Give the time to judge metadata by, and note it where the metadata was found good.

    Raises:
        ResourceError: the clock is wrong, or may be: the metadata looks expired by one that nothing has set.
    """
    time = clock.believed(now, marks.load(device.state).verified)
    try:
        yield time
    except trust.Expired as error:
        if device.clock_is_set():
            raise
        raise clock.ahead(now, error.message) from error
    marks.note_time(device.state, time)


def _trusted(device: Device, state: State, desired: Desired, fetcher: Fetcher, *, now: datetime) -> Found | None:
    with judged(device, now) as time:
        try:
            found = trust.refresh_and_find(device.state, device.gate.over(fetcher), desired.release, time)
        except TrustError as error:
            if not isinstance(fetcher, Fallback):
                raise
            log.warning("%s; it is looked for over the other way", error.message)  # a copy that lags, say
            found = trust.refresh_and_find(device.state, device.gate.over(fetcher.rest()), desired.release, time)
    release = found.release
    last = marks.load(device.state).versions.get(release.model, 0)
    new = trust.check_release(release, desired.release, profile=device.profile, installed=state.current, confirmed=last)
    if release.version != desired.version:
        raise TrustError(f"{desired.release} was announced as version {desired.version}")
    return found if new or state.dark or not slots.is_whole(device.state, release) else None


def _take_over(
    device: Device, desired: Desired, release: Release, tried: tuple[Bundle, Choice], *, measured: Mapping[str, float]
) -> Outcome:
    bundle, choice = tried
    trial = slots.Trial(deployment=desired.deployment, attempt=desired.attempt)
    slots.save(device.state, slots.committed(slots.load(device.state), release, trial, choice))
    try:
        device.serving.activate(bundle)
    except HealthError as error:
        return _go_back(device, desired, release, error)
    return _on_probation(device, desired, release, measured)


def _on_probation(device: Device, desired: Desired, release: Release, measured: Mapping[str, float]) -> Outcome:
    try:
        measured = {**measured, **device.serving.probation(release)}
    except HealthError as error:
        return _go_back(device, desired, release, error)
    outcome = _installed(device, desired, release, measured)
    state = slots.confirmed(slots.load(device.state), outcome)
    slots.save(device.state, state)
    marks.note_version(device.state, release)
    slots.collect(device.state, state)
    return outcome


def _go_back(device: Device, desired: Desired, release: Release, error: Exception) -> Outcome:
    """Point to the old bundle first, then let it serve: a kill in between comes up with the old one."""
    measured = error.measured if isinstance(error, HealthError) else {}
    outcome = _rolled_back(device, desired, str(error), measured)
    before = slots.load(device.state)
    state = slots.rolled_back(before, release, outcome)
    try:
        slots.save(device.state, state)
        if before.current == release and state.current is not None:
            marks.note_version(device.state, state.current)
    finally:  # also where the disk takes nothing any more
        if before.current == release:
            _serve_what_is_left(device, state)
    slots.collect(device.state, state)
    return outcome


def _serve_what_is_left(device: Device, state: State) -> None:
    try:
        _serve_current(device, state)
    except (BundleError, HealthError) as error:
        log.error("the old bundle is lost too: %s", error)  # noqa: TRY400  # no trace: it is no bug
        dark = slots.darkened(state, str(error))
        slots.save(device.state, slots.with_outcome(dark, state.outcome, state.answered))
        _serve_last_resort(device)


def _serve_current(device: Device, state: State) -> None:
    bundle = slots.open_current(device.state, state)
    if bundle is None:
        _serve_last_resort(device)
    else:
        device.serving.activate(bundle)


def _serve_last_resort(device: Device) -> None:
    """Serve what was shipped with the device, until the fleet's wish has been fetched; without that, nothing."""
    bundle = None
    try:
        bundle = device.factory.open(device.profile, device.capabilities) if device.factory else None
        device.serving.activate(bundle)
    except (BundleError, HealthError, UsageError) as error:
        log.error("nothing serves, the factory bundle neither: %s", error)  # noqa: TRY400  # no trace: it is no bug
        device.serving.activate(None)
        return
    if bundle is not None:
        log.warning("the factory bundle %s serves", bundle.folder)


def _serve_unwritten(device: Device) -> None:
    """Serve what is whole: what is on probation goes on with it once the disk can be written."""
    state = slots.known(device.state)
    for release in (state.current, state.previous):
        try:
            if release is not None:
                device.serving.activate(slots.open_bundle(device.state, release, state.variant_of(release)))
                return
        except (BundleError, HealthError) as error:
            log.error("%s does not serve: %s", release.path if release else "", error)  # noqa: TRY400  # no trace: it is no bug
    _serve_last_resort(device)


def _one_more_start(device: Device, state: State) -> State:
    assert state.trial is not None  # noqa: S101  # the caller asked
    if state.trial.starts >= MAX_STARTS:
        raise HealthError("the probation was interrupted twice")
    trial = slots.Trial(deployment=state.trial.deployment, attempt=state.trial.attempt, starts=state.trial.starts + 1)
    state = slots.on_trial(state, trial)
    slots.save(device.state, state)
    return state


def _wish_on_trial(state: State) -> Desired | None:
    if state.trial is None or state.current is None:
        return None
    return Desired(
        deployment=state.trial.deployment,
        attempt=state.trial.attempt,
        release=state.current.path,
        version=state.current.version,
    )


def _wish_that_installed(state: State, release: Release) -> Desired:
    word = state.outcome
    if not isinstance(word, Installed) or word.bundle != release.bundle:
        return _unknown_wish(release)
    return Desired(deployment=word.deployment, attempt=word.attempt, release=release.path, version=release.version)


def _unknown_wish(release: Release) -> Desired:
    return Desired(deployment="local", attempt=0, release=release.path, version=release.version)


def _same_wish(state: State, outcome: Outcome, desired: Desired) -> bool:
    return (outcome.deployment, outcome.attempt, outcome.version, state.answered or desired.release) == (
        desired.deployment,
        desired.attempt,
        desired.version,
        desired.release,
    )


def _told(device: Device, state: State, desired: Desired, outcome: Outcome) -> Outcome:
    slots.save(device.state, slots.with_outcome(state, outcome, desired.release))
    return outcome


def _installed(device: Device, desired: Desired, release: Release | None, measured: Mapping[str, float]) -> Outcome:
    return Installed(
        device=device.name,
        deployment=desired.deployment,
        attempt=desired.attempt,
        version=desired.version,
        bundle=release.bundle if release else "",
        measured=_finite(measured),
    )


def _finite(measured: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in measured.items() if math.isfinite(value)}


def _rolled_back(device: Device, desired: Desired, reason: str, measured: Mapping[str, float] | None = None) -> Outcome:
    return RolledBack(
        device=device.name,
        deployment=desired.deployment,
        attempt=desired.attempt,
        version=desired.version,
        reason=reason[:2000],
        measured=_finite(measured or {}),
    )


def _refused(device: Device, desired: Desired, error: TrustError) -> Outcome:
    return Refused(
        device=device.name,
        deployment=desired.deployment,
        attempt=desired.attempt,
        version=desired.version,
        reason=error.message[:2000],
    )

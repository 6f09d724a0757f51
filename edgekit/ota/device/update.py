"""One update, straight down: trust, stage, try out, commit, take over, probation; and back where it misbehaves.

Knows no channel: what is wanted comes in, what happened goes out as a report. Raises only what may be tried
again; everything final is a report and stands in ``state.json`` before it is told.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from edgekit import bundle as bundles
from edgekit.errors import BundleError, HealthError, ResourceError, TrustError, UsageError
from edgekit.ota.device import slots, trust
from edgekit.ota.device.download import download, require_space
from edgekit.ota.messages import Desired, Identifier, Installed, Refused, RolledBack
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from pathlib import Path

    from edgekit.bundle import Bundle
    from edgekit.ota.device.fetchers import Fetcher
    from edgekit.ota.device.slots import Outcome, State
    from edgekit.ota.device.trust import Found
    from edgekit.ota.release import Release
    from edgekit.progress import Progress

log = logging.getLogger(__name__)

MAX_TRIES = 3
"""So often may one release be rolled back on this device before it is not tried again."""
MAX_STARTS = 1
"""So often may a probation be taken up again after a restart or a bug; once more is a crash loop."""


class Serving(Protocol):
    """What runs models on this device; handed in, because OTA knows no engine."""

    def try_out(self, bundle: Bundle, release: Release) -> Mapping[str, float]:
        """Load the candidate beside what serves, run its golden inputs, and return what was measured.

        Raises:
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
    """Who this device is and where it keeps its bundles."""

    name: str
    profile: str
    state: Path
    serving: Serving

    def __post_init__(self) -> None:
        """Refuse names that could change a topic or a path, and that ``state.json`` would not take back."""
        require_identifier(self.name)
        require_identifier(self.profile)


def update(
    device: Device, desired: Desired, fetcher: Fetcher, now: datetime, *, progress: Progress = silent
) -> Outcome:
    """Bring the device to the desired release and return what became of it.

    A word that was given before, for the same deployment and attempt, is given again without work.

    Raises:
        TransferError, ResourceError, BundleError, OSError: the bytes did not come or do not fit; call again.
    """
    if slots.load(device.state).trial is not None:
        recover(device)  # something cut a probation short: nothing is installed before it is settled
    state = slots.load(device.state)
    if state.outcome is not None and _same_wish(state.outcome, desired):
        return state.outcome
    if state.rolled_back.get(desired.release, 0) >= MAX_TRIES:
        reason = f"rolled back {MAX_TRIES} times on this device: it is not tried again"
        return _told(device, state, _rolled_back(device, desired, reason))
    try:
        found = _trusted(device, state, desired, fetcher, now=now)
        if found is None:
            return _told(device, state, _installed(device, desired, state.current, {}))
        bundle = _stage(device, found, fetcher, progress)
    except TrustError as error:
        return _told(device, state, _refused(device, desired, error))
    return _take_over(device, desired, found.release, bundle)


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

    A damaged bundle, one that does not come up, or a probation cut short twice gives way to the one before.
    Returns a report where that settled something.

    Raises:
        ResourceError: the device lacks something, or is being stopped; that start counts for nothing.
    """
    state = slots.load(device.state)
    try:
        return _brought_up(device, state)
    except ResourceError:
        if state.trial is not None:
            slots.save(device.state, state)  # only a crash speaks against the release
        raise


def _brought_up(device: Device, state: State) -> Outcome | None:
    wish = _wish_on_trial(state)
    try:
        if state.trial is not None:
            state = _one_more_start(device, state)
        device.serving.activate(slots.open_current(device.state, state))
    except (BundleError, HealthError) as error:
        if state.current is None or (state.previous is None and wish is None):
            log.error("nothing serves, the installed bundle is lost: %s", error)  # noqa: TRY400  # no trace: it is no bug
            slots.save(device.state, slots.with_outcome(state, None))  # so that the same wish is fetched anew
            device.serving.activate(None)
            return None
        return _go_back(device, wish or _unknown_wish(state.current), state.current, error)
    if wish is None or state.current is None:
        return None
    return _on_probation(device, wish, state.current, {})


def _trusted(device: Device, state: State, desired: Desired, fetcher: Fetcher, *, now: datetime) -> Found | None:
    found = trust.refresh_and_find(device.state, fetcher, desired.release, now)
    release = found.release
    new = trust.check_release(release, desired.release, profile=device.profile, installed=state.current)
    if release.version != desired.version:
        raise TrustError(f"{desired.release} was announced as version {desired.version}")
    return found if new or not _is_whole(device, release) else None


def _is_whole(device: Device, release: Release) -> bool:
    try:
        slots.open_bundle(device.state, release)
    except BundleError:
        return False
    return True


def _stage(device: Device, found: Found, fetcher: Fetcher, progress: Progress) -> Bundle:
    release, folder = found.release, device.state
    try:
        return slots.open_bundle(folder, release)
    except BundleError:
        pass  # not here yet, or damaged: fetch it
    slots.discard_other_staging(folder, release.bundle)
    staging = slots.staging_folder(folder, release.bundle)
    entries = found.manifest.files_of(release.profile)
    missing = [e for e in entries if not slots.reuse(folder, e, staging / e.path)]
    require_space(folder, sum(e.size for e in missing) - _bytes_in(staging, [e.path for e in missing]))
    for entry in missing:
        download(fetcher, entry, staging / entry.path, progress)
    staging.mkdir(parents=True, exist_ok=True)
    (staging / bundles.MANIFEST).write_bytes(found.data)  # plainly: the rename below makes the folder count
    return slots.adopt(folder, release)


def _bytes_in(folder: Path, paths: list[str]) -> int:
    return sum((folder / p).stat().st_size for p in paths if (folder / p).is_file())


def _take_over(device: Device, desired: Desired, release: Release, bundle: Bundle) -> Outcome:
    try:
        measured = device.serving.try_out(bundle, release)
    except HealthError as error:
        return _go_back(device, desired, release, error)
    trial = slots.Trial(deployment=desired.deployment, attempt=desired.attempt)
    slots.save(device.state, slots.committed(slots.load(device.state), release, trial))
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
    slots.collect(device.state, state)
    return outcome


def _go_back(device: Device, desired: Desired, release: Release, error: Exception) -> Outcome:
    """Point to the old bundle first, then let it serve: a kill in between comes up with the old one."""
    outcome = _rolled_back(device, desired, str(error))
    before = slots.load(device.state)
    state = slots.rolled_back(before, release, outcome)
    slots.save(device.state, state)
    if before.current == release:
        _serve_what_is_left(device, state)
    slots.collect(device.state, state)
    return outcome


def _serve_what_is_left(device: Device, state: State) -> None:
    try:
        device.serving.activate(slots.open_current(device.state, state))
    except (BundleError, HealthError) as error:
        log.error("nothing serves, the old bundle is lost too: %s", error)  # noqa: TRY400  # no trace: it is no bug
        device.serving.activate(None)


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


def _unknown_wish(release: Release) -> Desired:
    return Desired(deployment="local", attempt=0, release=release.path, version=release.version)


def _same_wish(outcome: Outcome, desired: Desired) -> bool:
    return (outcome.deployment, outcome.attempt, outcome.version) == (
        desired.deployment,
        desired.attempt,
        desired.version,
    )


def _told(device: Device, state: State, outcome: Outcome) -> Outcome:
    slots.save(device.state, slots.with_outcome(state, outcome))
    return outcome


def _installed(device: Device, desired: Desired, release: Release | None, measured: Mapping[str, float]) -> Outcome:
    finite = {name: float(value) for name, value in measured.items() if math.isfinite(value)}
    return Installed(
        device=device.name,
        deployment=desired.deployment,
        attempt=desired.attempt,
        version=desired.version,
        bundle=release.bundle if release else "",
        measured=finite,
    )


def _rolled_back(device: Device, desired: Desired, reason: str) -> Outcome:
    return RolledBack(
        device=device.name,
        deployment=desired.deployment,
        attempt=desired.attempt,
        version=desired.version,
        reason=reason[:2000],
    )


def _refused(device: Device, desired: Desired, error: TrustError) -> Outcome:
    return Refused(
        device=device.name,
        deployment=desired.deployment,
        attempt=desired.attempt,
        version=desired.version,
        reason=error.message[:2000],
    )

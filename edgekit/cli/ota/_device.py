"""How the agent's command runs a device: over a broker or from a folder, telling what happens."""

from __future__ import annotations

import functools
import math
import queue
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli.ota._fleet import now, stop_signal
from edgekit.cli.ota._serving import HostServing
from edgekit.errors import EdgekitError, HealthError, ResourceError, TransferError, TrustError, UsageError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from edgekit.cli._terminal import Terminal
    from edgekit.ota.channel import Channel, Will
    from edgekit.ota.device.fetchers import Fetcher
    from edgekit.ota.device.slots import Outcome
    from edgekit.ota.device.update import Device
    from edgekit.ota.messages import Report
    from edgekit.ota.mqtt import Tls

HOURLY = 3600.0
"""So often a device looks at a URL, if nothing else is said."""
LONGEST_ALARM = 3600.0
"""So long at most waits one that was brought what nobody signed, unless it looks less often anyway."""
AGAIN_SECONDS = 60.0
"""So long one waits that looks once, and found its clock wrong or its disk full."""


@dataclass(frozen=True)
class Link:
    """Which broker, fleet and groups, how many seconds to wait for one update (``None``: stay), with what files.

    ``place``: a URL where the fleet's repository lies as well.
    """

    broker: str
    fleet: str
    timeout: float | None = None
    tls: Tls | None = None
    place: Place | None = None
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """A copy of a fleet's ``repository``, in a folder or at a URL; which model to take, and how often to look there."""

    at: str
    model: str | None = None
    every: float | None = None

    @property
    def is_url(self) -> bool:
        """Say whether it lies at a URL."""
        return "://" in self.at


def obey_broker(terminal: Terminal, device: Device, link: Link) -> None:
    """Run the agent until interrupted, or until its first update ended.

    Raises:
        TransferError: the broker cannot be reached, or no update came in time.
        HealthError, TrustError: that update was rolled back, or refused.
    """
    from edgekit.ota.device.agent import Agent, Habits

    reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
    serving = _host_serving(device)
    habits = Habits(hurry=link.timeout is not None)
    agent = Agent(link.fleet, device, habits, serving.vitals, groups=link.groups)
    agent.progress, agent.listen = terminal.progress, reports.put
    agent.repository = _fetcher(device, link.place) if link.place else None
    serving.on_broken = agent.give_up
    with stop_signal(serving.stop) as stopping:
        try:
            agent.start(lambda will: _connect(terminal, device, link, will))
            terminal.say(f"{device.name} ({device.profile}) listens to fleet {link.fleet} on {link.broker}")
            _say_url(terminal, serving)
            if link.timeout is None:
                _narrate(terminal, serving, reports, stopping)
            else:
                _conclude(terminal, _first_answer(terminal, reports, link.timeout, stopping))
        finally:
            serving.stop()
            agent.stop()


def update_from_repository(terminal: Terminal, device: Device, place: Place, *, stay: bool) -> None:
    """Bring the device to the newest release in a folder or at a URL; the signatures are checked as over the air.

    ``stay``: serve until interrupted, and look again as often as the place says.

    Raises:
        UsageError: no repository there, or nothing in it for this hardware class.
        HealthError, TrustError: the update was rolled back, or refused, or its bytes are not the signed ones.
        Held: the device's policy says not now, and it is not to stay.
    """
    from edgekit.ota.device import slots
    from edgekit.ota.device.update import recover

    serving, fetcher = _host_serving(device), _fetcher(device, place)
    # A new attempt each time it is started: whoever plugs the stick in again wants it tried again.
    attempt = int(time.time())
    with slots.lock(device.state), stop_signal(serving.stop) as stopping:
        device.gate.is_stopped, device.gate.pause = stopping.is_set, stopping.wait
        recover(device)
        look = functools.partial(_brought, terminal, device, place, fetcher=fetcher, attempt=attempt)
        if stay:
            _say_url(terminal, serving)
            _stay(terminal, device, _Looks(terminal, device, place, look), stopping)
        else:
            _conclude(terminal, look())


def _fetcher(device: Device, place: Place) -> Fetcher:
    from edgekit.ota.device.fetchers import FolderFetcher
    from edgekit.ota.device.https import is_allowed

    if place.is_url:
        assert device.https is not None  # noqa: S101  # the command built it so
        if not is_allowed(place.at):
            raise UsageError(f"{place.at} is no repository", "name a folder, or an https:// URL")
        return device.https.at(place.at, lambda: device.gate.is_stopped())  # noqa: PLW0108  # it is set later
    if not Path(place.at, "metadata", "timestamp.json").is_file():
        raise UsageError(f"{place.at} is no repository", "copy the folder `repository` of the fleet")
    return FolderFetcher(Path(place.at))


def _brought(terminal: Terminal, device: Device, place: Place, *, fetcher: Fetcher, attempt: int) -> Outcome:
    """Find the newest version that is signed for this device, and install it."""
    from edgekit.ota.device import offers
    from edgekit.ota.device.update import judged, update
    from edgekit.ota.messages import Desired

    def progress(what: str, done: int, total: int) -> None:
        if device.gate.is_stopped():
            raise click.Abort
        terminal.progress(what, done, total)

    with judged(device, now()) as time:
        release = offers.newest(device.state, device.gate.over(fetcher), device.profile, time, model=place.model)
    wish = Desired(deployment="local", attempt=attempt, release=release.path, version=release.version)
    return update(device, wish, fetcher, now(), progress=progress)


class _Looks:
    """When a device that stays looks for a new version, and what it says of it: nothing twice."""

    def __init__(self, terminal: Terminal, device: Device, place: Place, look: Callable[[], Outcome]) -> None:
        self._terminal = terminal
        self._device = device
        self._every = place.every or (HOURLY if place.is_url else None)
        self._look = look
        self._next = time.monotonic()
        self._held: int | None = None  # bytes that wait for the policy
        self._said = ""
        self._alarms = 0  # in a row

    def look_if_due(self) -> None:
        """Look, if it is time to.

        Raises:
            EdgekitError: it failed, and nobody asked to look again.
        """
        from edgekit.ota.device.gate import Held
        from edgekit.ota.device.trust import Unproven

        is_held = self._held is not None and self._device.gate.hold(self._held) is not None
        if is_held or time.monotonic() < self._next:
            return
        self._held, self._next = None, math.inf
        try:
            self._conclude(self._look())
            self._alarms = 0
        except Held as held:
            self._held, self._next = held.size, time.monotonic()
            self._warn(f"{held.message}; it goes on by itself")
            return
        except (EdgekitError, OSError) as error:
            if self._every is None and not isinstance(error, ResourceError):
                raise
            self._alarms = self._alarms + 1 if isinstance(error, Unproven) else 0
            self._warn(str(error))
            if self._every is None:  # a wrong clock, a full disk: what is installed serves on meanwhile
                self._next = time.monotonic() + AGAIN_SECONDS
        if self._every is not None:  # spread: devices that were started together must not come together for ever
            self._next = time.monotonic() + self._pause * random.uniform(0.8, 1.2)  # noqa: S311  # protects nothing

    @property
    def _pause(self) -> float:
        """How long until it looks again: longer and longer where wrong bytes come, for they come again each time."""
        assert self._every is not None  # noqa: S101  # the caller asked
        return max(self._every, min(LONGEST_ALARM, self._every * 2.0 ** min(self._alarms, 20)))

    def _conclude(self, outcome: Outcome) -> None:
        if (line := _line(outcome)) != self._said:
            _conclude(self._terminal, outcome)
            self._said = line
            _say_url(self._terminal, _host_serving(self._device))

    def _warn(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._terminal.warn(text)


def _stay(terminal: Terminal, device: Device, looks: _Looks, stopping: threading.Event) -> None:
    """Serve until interrupted; a bundle whose engine crashes too often gives way to the one before."""
    from edgekit.ota.device.update import retreat

    broken: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    _host_serving(device).on_broken = lambda bundle, reason: broken.put((bundle, reason))
    while not stopping.is_set():
        try:
            looks.look_if_due()
            outcome = retreat(device, *broken.get(timeout=0.2))
        except queue.Empty:
            continue
        except click.Abort:  # while it loaded: it was interrupted
            return
        if outcome is not None:
            terminal.warn(_line(outcome))


def _connect(terminal: Terminal, device: Device, link: Link, will: Will) -> Channel:
    """Connect; where a model is installed a broker that is away must not stop it from serving."""
    from edgekit.ota import mqtt
    from edgekit.ota.device import slots

    client = f"edgekit-{link.fleet}-{device.name}"
    serves = link.timeout is None and bool(device.factory or slots.known(device.state).current)
    try:
        return mqtt.connect(link.broker, client, will=will, tls=link.tls, patience=2.0 if serves else 10.0)
    except TransferError as error:
        if not serves:
            raise
        terminal.warn(f"{error.message}; the installed model serves, and the agent keeps trying")
        return mqtt.MqttChannel(link.broker, client, will, link.tls)


def _host_serving(device: Device) -> HostServing:
    assert isinstance(device.serving, HostServing)  # noqa: S101  # the command built it so
    return device.serving


def _narrate(
    terminal: Terminal, serving: HostServing, reports: queue.SimpleQueue[Report], stopping: threading.Event
) -> None:
    from edgekit.ota.messages import Drift

    stands: tuple[tuple[str, str], ...] = ()
    while not stopping.is_set():
        try:
            report = reports.get(timeout=0.2)
        except queue.Empty:
            continue
        if isinstance(report, Drift):  # said again and again while it stands
            before, stands = stands, tuple((alert.kind, alert.what) for alert in report.alerts)
            for alert in report.alerts:
                if (alert.kind, alert.what) not in before:
                    terminal.warn(f"{alert.kind}: {alert.what} is {alert.value:.4g}, limit {alert.limit:.4g}")
        elif line := _line(report):
            terminal.say(line)
            _say_url(terminal, serving)


def _first_answer(
    terminal: Terminal, reports: queue.SimpleQueue[Report], timeout: float, stopping: threading.Event
) -> Report:
    from edgekit.ota.messages import Chosen, Drift, Failed, Health, Waiting

    deadline, why = time.monotonic() + timeout, ""
    while (left := deadline - time.monotonic()) > 0:
        if stopping.is_set():
            raise click.Abort
        try:
            report = reports.get(timeout=min(left, 0.2))
        except queue.Empty:
            continue
        if isinstance(report, Failed | Waiting):
            why = f": {report.reason}"
            terminal.warn(_line(report))
        elif not isinstance(report, Health | Drift | Chosen):
            return report
    raise TransferError(f"no update was finished within {timeout:g} s{why}", "see that a rollout reaches this device")


def _conclude(terminal: Terminal, report: Report) -> None:
    import msgspec

    from edgekit.ota.messages import Refused, RolledBack

    if isinstance(report, RolledBack):
        raise HealthError(_line(report), "the old model serves; see the reason, publish a better version")
    if isinstance(report, Refused):
        raise TrustError(_line(report), "nothing of it was loaded; see the reason")
    terminal.say(_line(report))
    terminal.result({"report": msgspec.to_builtins(report)})


def _line(report: Report) -> str:
    from edgekit.ota.messages import Chosen, Failed, Installed, Refused, RolledBack, Waiting

    if isinstance(report, Chosen):
        left = "".join(f"; not {name}: {why}" for name, why in report.left.items())
        return f"the variant {report.variant} runs{left}"
    if isinstance(report, Installed):
        figures = ", ".join(f"{name} {value:.4g}" for name, value in report.measured.items())
        idle = report.measured.get("requests") == 0
        judged = "; no live request came: its golden inputs alone judged it" if idle else ""
        return f"installed version {report.version}{f' ({figures})' if figures else ''}{judged}"
    if isinstance(report, Failed):
        return f"version {report.version} did not come and will be tried again: {report.reason}"
    if isinstance(report, RolledBack | Refused | Waiting):
        what = {RolledBack: "rolled back version {}", Refused: "refused version {}", Waiting: "version {} waits"}
        return f"{what[type(report)].format(report.version)}: {report.reason}"
    return ""


def _say_url(terminal: Terminal, serving: HostServing) -> None:
    if serving.server is not None:
        if serving.server.grpc:
            terminal.say(f"gRPC at {serving.server.grpc}")
        terminal.say(f"serving on {serving.server.url}")

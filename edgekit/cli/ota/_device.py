"""How the agent's command runs a device: over a broker or from a folder, telling what happens."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from edgekit.cli.ota._fleet import now, stop_signal
from edgekit.cli.ota._serving import HostServing
from edgekit.errors import HealthError, TransferError, TrustError, UsageError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

    from edgekit.cli._terminal import Terminal
    from edgekit.ota.channel import Arrival, Channel, Will
    from edgekit.ota.device.update import Device
    from edgekit.ota.messages import Desired, Report


@dataclass(frozen=True)
class Link:
    """Which broker, which fleet, and how many seconds to wait for one update (``None``: stay for ever)."""

    broker: str
    fleet: str
    timeout: float | None = None


@dataclass(frozen=True)
class Stick:
    """A copy of a fleet's ``repository`` folder, and which model to take from it."""

    folder: Path
    model: str | None = None


class Told:
    """A channel that also tells what the agent reports, on its way out."""

    def __init__(self, channel: Channel, listen: Callable[[Report], None]) -> None:
        self._channel = channel
        self._listen = listen

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, reply_to: str = "", correlation: bytes = b""
    ) -> None:
        """Hand the message over, then tell it if it is a report."""
        from edgekit.ota import messages
        from edgekit.ota.messages import Report

        self._channel.publish(topic, payload, retain=retain, reply_to=reply_to, correlation=correlation)
        if topic.endswith("/report"):
            report: Report = messages.decode(payload, Report)  # type: ignore[arg-type]  # a union is a type to msgspec
            self._listen(report)

    def subscribe(self, pattern: str, on_arrival: Callable[[Arrival], None]) -> None:
        """Pass on."""
        self._channel.subscribe(pattern, on_arrival)

    def close(self) -> None:
        """Pass on."""
        self._channel.close()


def obey_broker(terminal: Terminal, device: Device, link: Link) -> None:
    """Run the agent until interrupted, or until its first update ended.

    Raises:
        TransferError: the broker cannot be reached, or no update came in time.
        HealthError, TrustError: that update was rolled back, or refused.
    """
    from edgekit.ota.device.agent import Agent

    reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
    serving = _host_serving(device)
    agent = Agent(link.fleet, device, vitals=serving.vitals)
    agent.progress = terminal.progress
    with stop_signal(serving.stop) as stopping:
        try:
            agent.start(lambda will: Told(_connect(terminal, device, link, will), reports.put))
            terminal.say(f"{device.name} ({device.profile}) listens to fleet {link.fleet} on {link.broker}")
            _say_url(terminal, serving)
            if link.timeout is None:
                _narrate(terminal, serving, reports, stopping)
            else:
                _conclude(terminal, _first_answer(terminal, reports, link.timeout, stopping))
        finally:
            serving.stop()
            agent.stop()


def update_from_folder(terminal: Terminal, device: Device, stick: Stick, *, stay: bool) -> None:
    """Bring the device to the newest release in a folder; the signatures are checked as over the air.

    Raises:
        UsageError: no repository there, or nothing in it for this hardware class.
        HealthError, TrustError: the update was rolled back, or refused.
    """
    from edgekit.ota.device import slots
    from edgekit.ota.device.fetchers import FolderFetcher
    from edgekit.ota.device.update import recover, update

    serving, desired = _host_serving(device), newest(stick, device.profile)
    with slots.lock(device.state), stop_signal(serving.stop) as stopping:
        recover(device)
        outcome = update(device, desired, FolderFetcher(stick.folder), now(), progress=terminal.progress)
        _conclude(terminal, outcome)
        if stay:
            _say_url(terminal, serving)
            stopping.wait()


def newest(stick: Stick, profile: str) -> Desired:
    """Find the highest version that lies in the folder for a hardware class. A file name is a hint: TUF decides.

    Raises:
        UsageError: no repository there, nothing for that class, or several models to choose from.
    """
    from edgekit.ota.messages import Desired

    if not (stick.folder / "metadata" / "timestamp.json").is_file():
        raise UsageError(f"{stick.folder} is no repository", "copy the folder `repository` of the fleet")
    found: dict[str, int] = {}
    for path in (stick.folder / "targets" / "models").glob(f"{stick.model or '*'}/{profile}/*.*.json"):
        model, number = path.parts[-3], path.name.split(".")[1]
        found[model] = max(found.get(model, 0), int(number) if number.isdecimal() else 0)
    if len(found) != 1:
        what = f"several models ({', '.join(sorted(found))})" if found else f"no release for {profile}"
        raise UsageError(f"{stick.folder} holds {what}", "name one with --model, or publish one for this class")
    ((model, version),) = found.items()
    release = f"models/{model}/{profile}/{version}.json"
    # A new attempt each time: whoever plugs the stick in again wants it tried again.
    return Desired(deployment="local", attempt=int(time.time()), release=release, version=version)


def _connect(terminal: Terminal, device: Device, link: Link, will: Will) -> Channel:
    """Connect; where a model is installed a broker that is away must not stop it from serving."""
    from edgekit.ota import mqtt
    from edgekit.ota.device import slots

    client = f"edgekit-{link.fleet}-{device.name}"
    serves = link.timeout is None and slots.load(device.state).current is not None
    try:
        return mqtt.connect(link.broker, client, will=will, patience=2.0 if serves else 10.0)
    except TransferError as error:
        if not serves:
            raise
        terminal.warn(f"{error.message}; the installed model serves, and the agent keeps trying")
        return mqtt.MqttChannel(link.broker, client, will, None)


def _host_serving(device: Device) -> HostServing:
    assert isinstance(device.serving, HostServing)  # noqa: S101  # the command built it so
    return device.serving


def _narrate(
    terminal: Terminal, serving: HostServing, reports: queue.SimpleQueue[Report], stopping: threading.Event
) -> None:
    while not stopping.is_set():
        try:
            line = _line(reports.get(timeout=0.2))
        except queue.Empty:
            continue
        if line:
            terminal.say(line)
            _say_url(terminal, serving)


def _first_answer(
    terminal: Terminal, reports: queue.SimpleQueue[Report], timeout: float, stopping: threading.Event
) -> Report:
    from edgekit.ota.messages import Failed, Health

    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        if stopping.is_set():
            raise click.Abort
        try:
            report = reports.get(timeout=min(left, 0.2))
        except queue.Empty:
            continue
        if isinstance(report, Failed):
            terminal.warn(_line(report))
        elif not isinstance(report, Health):
            return report
    raise TransferError(f"no update was finished within {timeout:g} s", "see that a rollout reaches this device")


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
    from edgekit.ota.messages import Failed, Installed, Refused, RolledBack

    if isinstance(report, Installed):
        figures = ", ".join(f"{name} {value:.4g}" for name, value in report.measured.items())
        idle = report.measured.get("requests") == 0
        judged = "; no live request came: its golden inputs alone judged it" if idle else ""
        return f"installed version {report.version}{f' ({figures})' if figures else ''}{judged}"
    if isinstance(report, RolledBack):
        return f"rolled back version {report.version}: {report.reason}"
    if isinstance(report, Refused):
        return f"refused version {report.version}: {report.reason}"
    if isinstance(report, Failed):
        return f"version {report.version} did not come and will be tried again: {report.reason}"
    return ""


def _say_url(terminal: Terminal, serving: HostServing) -> None:
    if serving.server is not None:
        terminal.say(f"serving on {serving.server.url}")

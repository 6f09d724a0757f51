"""A channel over an MQTT 5 broker: QoS 1, retained messages, request/response, a will, jittered reconnects.

Knows paho-mqtt and TLS; does not know what the messages mean. Correctness never needs the broker to keep a
session: subscriptions are made anew at every connect, and retained messages come again. Questions and answers
travel with QoS 0: what a broken connection loses is asked for again, and nothing comes twice.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import queue
import random
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from edgekit.errors import TransferError, UsageError
from edgekit.ota.channel import Arrival, Back, matches
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paho.mqtt.client import Client, ConnectFlags, MQTTMessage, MQTTMessageInfo
    from paho.mqtt.properties import Properties
    from paho.mqtt.reasoncodes import ReasonCode

    from edgekit.ota.channel import Receipt, Will

log = logging.getLogger(__name__)

PORTS = {"mqtt": 1883, "mqtts": 8883}
SESSION_SECONDS = 300
"""A will's delay ends with the session, so the session outlives every delay we use (MQTT 5, clause 3.1.3.2.2)."""
BLOCK_EXPIRY_SECONDS = 60
"""Questions and answers older than this were asked again long ago."""
QUEUE_LENGTH = 1000
UNWRITTEN = 64
"""So many packets may wait for the socket before a question or an answer is refused: 16 MiB of blocks."""
LONGEST_PAUSE = 30.0
GOODBYE_SECONDS = 2.0


@dataclass(frozen=True)
class Tls:
    """Files in PEM: whom to believe (the system's authorities where there is none), and who we are."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


def connect(  # noqa: PLR0913  # what is not needed has a default
    url: str,
    client_id: str,
    *,
    will: Will | None = None,
    tls: Tls | None = None,
    patience: float = 10.0,
    shares: bool = False,
) -> MqttChannel:
    """Connect to ``mqtt://[user:password@]host[:port]`` or ``mqtts://…``; try for ``patience`` seconds.

    Who ``shares`` subscriptions keeps no session: the broker must not queue for one that is gone what others can take.

    Raises:
        UsageError: the URL or a certificate file is wrong.
        TransferError: the broker cannot be reached, or refuses us; says which one and why.
    """
    channel = MqttChannel(url, client_id, will, tls, shares=shares)
    channel.wait_until_connected(patience)
    return channel


class MqttChannel:
    """A `Channel` of an MQTT broker; made by `connect`."""

    def __init__(self, url: str, client_id: str, will: Will | None, tls: Tls | None, *, shares: bool = False) -> None:
        self._host, self._port, self.name = _address(url)
        self._client = _client(url, client_id, will, tls)
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish
        self._acknowledged: deque[tuple[int, str]] = deque(maxlen=2 * QUEUE_LENGTH)  # number, why not
        self._listeners: list[Callable[[Back], None]] = []
        self._subscriptions: list[tuple[str, Callable[[Arrival], None]]] = []
        self._inbox: queue.Queue[Arrival | Back | None] = queue.Queue(QUEUE_LENGTH)
        self._news = threading.Condition()
        self._connected = self._was_connected = False
        self._closed = False
        self._last: MQTTMessageInfo | None = None
        self._problem = "no answer"
        self.dropped = 0
        self._session_seconds = 0 if shares else SESSION_SECONDS
        self._network = threading.Thread(target=self._stay_connected, name=f"mqtt-{client_id}", daemon=True)
        self._delivery = threading.Thread(target=self._deliver, name=f"mqtt-{client_id}-in", daemon=True)
        self._network.start()
        self._delivery.start()

    def wait_until_connected(self, patience: float) -> None:
        """Return once the broker took us in.

        Raises:
            TransferError: it did not within ``patience`` seconds; the channel is closed.
        """
        with self._news:
            if self._news.wait_for(lambda: self._connected, patience):
                return
        self.close()
        raise TransferError(
            f"no connection to the broker {self.name} within {patience:g} s: {self._problem}",
            "see that it runs and that host, port and certificates are right",
        )

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, reply_to: str = "", correlation: bytes = b""
    ) -> Receipt:
        """Queue a message with QoS 1; it leaves as soon as there is a connection. For questions see `Channel`.

        Raises:
            TransferError: the channel is closed or its queue is full.
        """
        from paho.mqtt.enums import MQTTErrorCode

        if self._closed:
            raise TransferError(f"the channel to {self.name} is closed", "connect again")
        properties = _properties(reply_to, correlation)
        if properties is not None and len(self._client._out_packet) >= UNWRITTEN:  # noqa: SLF001  # paho bounds QoS 1 only
            raise TransferError(f"{UNWRITTEN} packets to {self.name} wait already", "the network is slower than we")
        qos = 1 if properties is None else 0
        if not qos and not self._connected:
            return lambda _seconds: False  # paho would send it before the broker has let us in
        info = self._client.publish(topic, payload, qos=qos, retain=retain, properties=properties)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise TransferError(f"{QUEUE_LENGTH} messages to {self.name} wait already", "see that the broker runs")
        if qos:
            self._last = info
        return functools.partial(self._is_taken, info.mid)

    def subscribe(self, pattern: str, on_arrival: Callable[[Arrival], None]) -> None:
        """Call ``on_arrival``, on a thread of this channel, for each message that matches, retained ones first.

        Raises:
            TransferError: the channel is closed.
        """
        if self._closed:
            raise TransferError(f"the channel to {self.name} is closed", "connect again")
        self._subscriptions = [*self._subscriptions, (pattern, on_arrival)]
        self._client.subscribe(pattern, qos=1)  # without a connection: done at the next connect

    def unsubscribe(self, pattern: str) -> None:
        """Call nobody any more for messages that match; see `Channel`."""
        self._subscriptions = [one for one in self._subscriptions if one[0] != pattern]
        if not self._closed:
            self._client.unsubscribe(pattern)

    def is_connected(self, seconds: float = 0.0) -> bool:
        """Say whether there is a connection, after at most so many seconds."""
        with self._news:
            return self._news.wait_for(lambda: self._connected or self._closed, seconds) and self._connected

    def when_back(self, call: Callable[[Back], None]) -> None:
        """Call, on a thread of this channel, whenever a lost connection came back; see `Channel`."""
        self._listeners = [*self._listeners, call]

    def close(self) -> None:
        """Give what is queued a moment to leave, then say good-bye; later calls are errors."""
        if self._closed:
            return
        self._flush()
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._client.disconnect()
        if threading.current_thread() not in (self._network, self._delivery):
            self._network.join(timeout=GOODBYE_SECONDS)
        with contextlib.suppress(queue.Full):
            self._inbox.put_nowait(None)

    def _flush(self) -> None:
        last = self._last
        if self._connected and last is not None and threading.current_thread() is not self._network:
            with contextlib.suppress(ValueError, RuntimeError):
                last.wait_for_publish(GOODBYE_SECONDS)

    def _stay_connected(self) -> None:
        failures = 0
        while not self._closed:
            try:
                self._dial()
                self._client.loop_forever()
                failures = 0 if self._connected else failures + 1
            except (OSError, ValueError) as error:
                self._problem = str(error) or type(error).__name__
                failures += 1
            self._connected = False
            self._pause(failures)

    def _dial(self) -> None:
        if self._was_connected:  # `connect` would begin a new session, which ends the old one and fires its will
            self._client.reconnect()
        else:
            self._client.connect(self._host, self._port, keepalive=30, properties=_session(self._session_seconds))

    def _pause(self, failures: int) -> None:
        # Full jitter: a broker that comes back must not meet its whole fleet in one second.
        longest = min(LONGEST_PAUSE, 0.5 * 2.0 ** min(failures, 10))
        with self._news:
            self._news.wait_for(lambda: self._closed, random.uniform(0, longest))  # noqa: S311  # spreads load only

    def _on_connect(self, client: Client, _data: object, flags: ConnectFlags, reason: ReasonCode, *_: object) -> None:
        if reason.is_failure:
            self._problem = f"the broker refused us: {reason}"
            log.warning("%s: %s", self.name, self._problem)
            client.disconnect()
            return
        for pattern, _on_arrival in self._subscriptions:
            client.subscribe(pattern, qos=1)
        try:
            if self._was_connected:  # in line, behind what the last connection brought
                self._inbox.put(Back(time.monotonic(), flags.session_present), timeout=GOODBYE_SECONDS)
        except queue.Full:
            client.disconnect()  # nobody would know that we were away: come back once more, later
        with self._news:
            self._connected = self._was_connected = True
            self._news.notify_all()

    def _on_publish(self, _client: Client, _data: object, number: int, reason: ReasonCode, *_: object) -> None:
        with self._news:
            self._acknowledged.append((number, str(reason) if reason.is_failure else ""))
            self._news.notify_all()

    def _is_taken(self, number: int, seconds: float) -> bool:
        """Wait for the broker's acknowledgement; see `Receipt`."""
        with self._news:
            found = self._news.wait_for(lambda: [why for one, why in self._acknowledged if one == number], seconds)
        if found and found[-1]:
            raise TransferError(f"the broker {self.name} refused a message: {found[-1]}", "see its access rules")
        return bool(found)

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        try:
            # A full inbox holds the network thread back for a while, and with it the broker.
            self._inbox.put(_arrival(message), timeout=GOODBYE_SECONDS)
        except (queue.Full, UnicodeDecodeError):
            self.dropped += 1

    def _deliver(self) -> None:
        while (arrival := self._inbox.get()) is not None and not self._closed:
            if isinstance(arrival, Back):
                for call in self._listeners:
                    call(arrival)
                continue
            for pattern, on_arrival in self._subscriptions:
                if matches(pattern, arrival.topic):
                    on_arrival(arrival)


def require_protected(url: str, tls: Tls | None) -> None:
    """Refuse a broker beyond this machine that anybody on the way could listen to or play, or to which we are nobody.

    Raises:
        UsageError: no TLS, or neither a client certificate nor a user name.
    """
    host, _, name = _address(url)
    parts = urlsplit(url)
    with contextlib.suppress(ValueError):  # a name
        if ipaddress.ip_address(host).is_loopback:
            return
    if host == "localhost":
        return
    hint = "provision both ends (edgekit ota provision, --identity), or pass --allow-plain"
    if parts.scheme != "mqtts":
        raise UsageError(f"{name} is not encrypted: whoever is on the way reads and forges it", hint)
    if not (parts.username or (tls and tls.certificate)):
        raise UsageError(f"{name} is to be reached without a client certificate: it cannot tell who comes", hint)


def _address(url: str) -> tuple[str, int, str]:
    """Return host, port and the URL without its password."""
    try:
        parts = urlsplit(url)
        port = parts.port or PORTS[parts.scheme]
    except (ValueError, KeyError) as error:
        raise UsageError(f"{url!r} is no broker's address", "write mqtt://host:1883 or mqtts://host:8883") from error
    if not parts.hostname:
        raise UsageError(f"{url!r} names no host", "write mqtt://host:1883 or mqtts://host:8883")
    return parts.hostname, port, f"{parts.scheme}://{parts.hostname}:{port}"


def _client(url: str, client_id: str, will: Will | None, tls: Tls | None) -> Client:
    with extra("device"):
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
    client = Client(
        CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5, reconnect_on_failure=False
    )
    client.connect_timeout = 5.0
    client.max_queued_messages_set(QUEUE_LENGTH)
    parts = urlsplit(url)
    if parts.username:
        client.username_pw_set(unquote(parts.username), unquote(parts.password or ""))
    if parts.scheme == "mqtts":
        _secure(client, tls or Tls())
    if will is not None:
        client.will_set(will.topic, will.payload, qos=1, retain=True, properties=_will_properties(will))
    return client


def _secure(client: Client, tls: Tls) -> None:
    names = {"ca_certs": tls.ca, "certfile": tls.certificate, "keyfile": tls.key}
    try:
        client.tls_set(**{option: str(path) for option, path in names.items() if path is not None})  # type: ignore[arg-type]  # paho types each option apart
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = ", ".join(str(path) for path in names.values() if path is not None)
        raise UsageError(f"these certificates cannot be used: {error} ({files})", "give PEM files") from error


def _packet(kind: str) -> Any:  # noqa: ANN401  # paho sets properties by attribute, untyped
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    make: Any = Properties  # paho leaves its constructor untyped
    return make(getattr(PacketTypes, kind))


def _session(seconds: int) -> Properties:
    properties = _packet("CONNECT")
    properties.SessionExpiryInterval = seconds
    return properties  # type: ignore[no-any-return]  # see _packet


def _will_properties(will: Will) -> Properties:
    properties = _packet("WILLMESSAGE")
    properties.WillDelayInterval = will.delay_seconds
    return properties  # type: ignore[no-any-return]  # see _packet


def _properties(reply_to: str, correlation: bytes) -> Properties | None:
    if not (reply_to or correlation):
        return None
    properties = _packet("PUBLISH")
    properties.MessageExpiryInterval = BLOCK_EXPIRY_SECONDS
    if reply_to:
        properties.ResponseTopic = reply_to
    if correlation:
        properties.CorrelationData = correlation
    return properties  # type: ignore[no-any-return]  # see _packet


def _arrival(message: MQTTMessage) -> Arrival:
    properties = message.properties
    return Arrival(
        topic=message.topic,
        payload=bytes(message.payload),
        reply_to=getattr(properties, "ResponseTopic", ""),
        correlation=getattr(properties, "CorrelationData", b""),
        retained=message.retain,
    )

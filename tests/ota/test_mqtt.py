"""What only a real network shows: brokers that are away, die in the middle, refuse, or speak TLS."""

import datetime as dt
import ipaddress
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fakes.brokers import Mosquitto, free_port
from fakes.fleets import FLEET, NOW, Fleet, Serving, eventually, wish

from edgekit.errors import TransferError, UsageError
from edgekit.ota import messages, mqtt
from edgekit.ota.channel import Will
from edgekit.ota.device.agent import Agent, Habits
from edgekit.ota.device.fetchers import Patience
from edgekit.ota.messages import Installed, Report


def test_unreachable_broker_is_named_after_bounded_retries():
    port = free_port()
    with pytest.raises(TransferError, match=rf"mqtt://127\.0\.0\.1:{port} within 0\.7 s.*refused") as caught:
        mqtt.connect(f"mqtt://user:secret@127.0.0.1:{port}", "pi", patience=0.7)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "localhost", "http://x", "mqtt://", "mqtt://x:notaport", "mqtt://x:99999"])
def test_address_that_is_none_is_a_usage_error(url):
    with pytest.raises(UsageError, match=r"address|host") as caught:
        mqtt.connect(url, "pi")
    assert "mqtt://host" in caught.value.hint


CERTIFIED = mqtt.Tls(certificate=Path("device.pem"), key=Path("device.key"))


@pytest.mark.parametrize("url", ["mqtt://127.0.0.1", "mqtt://localhost:1", "mqtt://[::1]:1883", "mqtts://u:p@far:8883"])
def test_broker_on_this_machine_and_one_that_knows_a_user_need_no_certificate(url):
    mqtt.require_protected(url, None)


@pytest.mark.parametrize(
    ("url", "tls", "words"),
    [
        ("mqtt://broker.example.org", CERTIFIED, "not encrypted"),
        ("mqtt://127.evil.org", None, "not encrypted"),
        ("mqtt://10.0.0.7", None, "not encrypted"),
        ("mqtts://broker.example.org", None, "without a client certificate"),
        ("mqtts://broker.example.org", mqtt.Tls(ca=Path("ca.pem")), "without a client certificate"),
    ],
)
def test_broker_that_anybody_may_listen_to_is_refused(url, tls, words):
    with pytest.raises(UsageError, match=words) as caught:
        mqtt.require_protected(url, tls)
    assert "--allow-plain" in caught.value.hint
    mqtt.require_protected("mqtts://broker.example.org", CERTIFIED)


def test_broker_that_wants_a_password_is_named_as_refusing_us(tmp_path):
    with (
        Mosquitto(tmp_path, ["allow_anonymous false"]) as broker,
        pytest.raises(TransferError, match=r"(?i)refused us: not authorized"),
    ):
        mqtt.connect(broker.url, "pi", patience=1.0)


def test_channel_outlives_a_restart_of_the_broker(tmp_path):
    with Mosquitto(tmp_path) as broker:
        one, two = mqtt.connect(broker.url, "one"), mqtt.connect(broker.url, "two")
        got = []
        two.subscribe("a/#", got.append)
        eventually(lambda: (one.publish("a/1", b"before"), got)[1])
        broker.stop()
        one.publish("a/2", b"while it is away", retain=True)  # "two" may come back later than this
        broker.start()
        eventually(lambda: {a.payload for a in got} == {b"before", b"while it is away"})
        one.close()
        two.close()


def test_will_of_a_device_that_vanished_is_published(tmp_path):
    with Mosquitto(tmp_path) as broker:
        watcher = mqtt.connect(broker.url, "watcher")
        got = []
        watcher.subscribe("wills/#", got.append)
        lost = mqtt.connect(broker.url, "lost", will=Will("wills/lost", b"offline", delay_seconds=0))
        lost._closed = True  # so that it does not come back
        lost._client.socket().shutdown(2)
        eventually(lambda: [a.payload for a in got] == [b"offline"])
        late = mqtt.connect(broker.url, "late")
        kept = []
        late.subscribe("wills/lost", kept.append)
        eventually(lambda: kept)
        assert kept[0].retained
        late.close()
        watcher.close()


def test_broker_restart_in_the_middle_of_a_download_costs_no_byte_twice(tmp_path):
    fleet = Fleet(tmp_path / "fleet", size=6_000_000)
    one = fleet.publish(1)
    with Mosquitto(tmp_path) as broker:
        server = mqtt.connect(broker.url, "server")
        requests = fleet.serve(server)
        said = []
        server.subscribe(
            messages.topic(FLEET, "+", "report"), lambda a: said.append(messages.decode(a.payload, Report))
        )
        device = fleet.device(tmp_path / "device", Serving())
        agent = Agent(FLEET, device, Habits(patience=Patience(window=2, seconds=1.0, attempts=30)))
        agent.clock = lambda: NOW
        halfway, go_on = threading.Event(), threading.Event()

        def hold(what, done, total):
            if done > 2_000_000 and not halfway.is_set():
                halfway.set()
                assert go_on.wait(20)

        agent.progress = hold
        agent.start(lambda will: mqtt.connect(broker.url, "pi-1", will=will))
        server.publish(messages.topic(FLEET, "pi-1", "desired"), messages.encode(wish(one)), retain=True)
        assert halfway.wait(20)
        broker.stop()
        broker.start()
        go_on.set()
        eventually(lambda: [m for m in said if isinstance(m, Installed)], 40)
        assert device.serving.active == one.bundle
        asked = [(r.path, r.offset) for r in requests]
        blob = [a for a in asked if a[0].startswith("blobs/")]
        assert len(blob) - len(set(blob)) <= 4  # the window in flight, asked for once more
        agent.stop()
        server.close()


def authority(folder):
    """Make a CA and certificates for the broker and a device, as PEM files."""
    now = dt.datetime.now(dt.UTC)
    made = {}

    def certificate(name, signer=None):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer, signing = (subject, key) if signer is None else (made[signer][0].subject, made[signer][1])
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
            .sign(signing, hashes.SHA256())
        )
        made[name] = (built, key)
        (folder / f"{name}.crt").write_bytes(built.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        (folder / f"{name}.key").chmod(0o644)

    certificate("ca")
    certificate("broker", "ca")
    certificate("pi-1", "ca")
    certificate("rogue-ca")
    certificate("rogue", "rogue-ca")
    return folder


def test_tls_with_client_certificates_lets_in_whom_the_authority_vouched_for(tmp_path):
    folder = authority(tmp_path)
    lines = [
        f"cafile {folder}/ca.crt",
        f"certfile {folder}/broker.crt",
        f"keyfile {folder}/broker.key",
        "require_certificate true",
        "use_identity_as_username true",
        "user root",
    ]
    own = mqtt.Tls(folder / "ca.crt", folder / "pi-1.crt", folder / "pi-1.key")
    with Mosquitto(tmp_path, lines, "mqtts") as broker:
        channel = mqtt.connect(broker.url, "pi-1", tls=own)
        got = []
        channel.subscribe("a", got.append)
        eventually(lambda: (channel.publish("a", b"secret"), got)[1])
        channel.close()
        for tls in (
            mqtt.Tls(folder / "ca.crt"),
            mqtt.Tls(folder / "ca.crt", folder / "rogue.crt", folder / "rogue.key"),
            mqtt.Tls(folder / "rogue-ca.crt", folder / "pi-1.crt", folder / "pi-1.key"),
            None,
        ):
            with pytest.raises(TransferError, match="no connection to the broker mqtts://"):
                mqtt.connect(broker.url, "pi-1", tls=tls, patience=0.6)


def test_certificate_files_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "junk.pem").write_text("junk")
    for path in (tmp_path / "missing.pem", tmp_path / "junk.pem"):
        with pytest.raises(UsageError, match=path.name):
            mqtt.connect("mqtts://127.0.0.1", "pi", tls=mqtt.Tls(ca=path))


def test_queue_that_is_full_is_a_transfer_error_and_no_endless_memory(tmp_path):
    with Mosquitto(tmp_path) as broker:
        channel = mqtt.connect(broker.url, "one")
        broker.stop()

        def flood():
            for _ in range(2 * mqtt.QUEUE_LENGTH):
                channel.publish("a", b"x")

        with pytest.raises(TransferError, match=r"messages to .* wait already"):
            flood()
        channel.close()

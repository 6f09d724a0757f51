"""Reports that cannot be sent: kept through days offline, restarts and brokers that die between message and receipt."""

import threading

import pytest
from fakes.brokers import Mosquitto
from fakes.fleets import eventually

from edgekit.errors import TransferError
from edgekit.ota import mqtt
from edgekit.ota.device import courier as couriers
from edgekit.ota.device.courier import Courier
from edgekit.ota.device.outbox import Outbox


@pytest.fixture
def broker(tmp_path):
    with Mosquitto(tmp_path) as broker:
        yield broker


@pytest.fixture
def sent(tmp_path):
    """Give what starts a courier on a channel, and end it."""
    started = []

    def start(channel, outbox=None):
        started.append(Courier(outbox or Outbox(tmp_path / "outbox"), channel, "reports"))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def listener(broker):
    channel, got = mqtt.connect(broker.url, "server"), []
    channel.subscribe("reports", lambda arrival: got.append(arrival.payload))
    return channel, got


def words(count, first=0):
    return [b"word %d" % number for number in range(first, first + count)]


def test_reports_of_a_time_offline_come_in_order_through_a_restart_of_the_device(broker, sent, tmp_path):
    channel = mqtt.connect(broker.url, "pi-1")
    broker.stop()
    eventually(lambda: not channel.is_connected())
    one = sent(channel)
    for number, word in enumerate(words(60)):
        one.send(word, is_final=number % 3 == 0)
    one.stop()
    channel.close()
    assert len(Outbox(tmp_path / "outbox")) == 60
    broker.start()
    server, got = listener(broker)
    eventually(server.is_connected)
    channel = mqtt.connect(broker.url, "pi-1")
    two = sent(channel)
    two.send(b"later", is_final=False)
    eventually(lambda: len(got) >= 61)
    assert got == [*words(60), b"later"]
    eventually(lambda: len(two._outbox) == 0)
    assert len(Outbox(tmp_path / "outbox")) == 0
    channel.close()
    server.close()


def test_a_broker_that_dies_and_forgets_all_gets_each_report_in_order(broker, sent, tmp_path):
    server, got = listener(broker)
    channel = mqtt.connect(broker.url, "pi-1")
    one = sent(channel)
    for round_ in range(3):
        for word in words(20, 20 * round_):
            one.send(word, is_final=True)
        broker.stop()
        broker.start()
        eventually(lambda: len(one._outbox) == 0, 40)
    first_time = list(dict.fromkeys(got))
    assert set(first_time) <= set(words(60))  # nobody listened while the server was not back
    assert first_time == sorted(first_time, key=words(60).index)
    channel.close()
    server.close()


class Line:
    """A channel whose broker gives receipts when the test says so."""

    def __init__(self):
        self.published, self.taken, self.refusing, self.connected = [], set(), False, True

    def publish(self, _topic, payload):
        self.published.append(payload)
        answer = threading.Event()

        def receipt(_seconds):
            if self.refusing:
                raise TransferError("refused: not authorized")
            answer.wait(0.01)
            return payload in self.taken

        return receipt

    def is_connected(self, seconds=0.0):
        if not self.connected:
            threading.Event().wait(min(seconds, 0.01))
        return self.connected


def test_only_what_was_acknowledged_is_removed_and_all_else_is_on_the_disk(sent, tmp_path):
    line = Line()
    one = sent(line)
    for word in words(5):
        one.send(word, is_final=False)
    line.taken.update(words(2))
    eventually(lambda: len(one._outbox) == 3)
    eventually(lambda: len(Outbox(tmp_path / "outbox")) == 3)
    assert line.published == words(5)  # and nothing was said twice meanwhile
    line.taken.update(words(5))
    eventually(lambda: len(Outbox(tmp_path / "outbox")) == 0)


def test_without_a_connection_nothing_is_given_to_the_broker_and_all_is_on_the_disk(sent, tmp_path):
    line = Line()
    line.connected = False
    one = sent(line)
    one.send(b"health", is_final=False)
    eventually(lambda: len(Outbox(tmp_path / "outbox")) == 1)
    assert line.published == []
    line.taken.add(b"health")
    line.connected = True
    eventually(lambda: len(one._outbox) == 0)


def test_reports_that_the_broker_refuses_wait_until_it_takes_them(sent, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(couriers, "REFUSED_SECONDS", 0.02)
    line = Line()
    line.refusing = True
    one = sent(line)
    one.send(b"installed", is_final=True)
    eventually(lambda: "refused: not authorized" in caplog.text)
    assert len(Outbox(tmp_path / "outbox")) == 1
    line.taken.add(b"installed")
    line.refusing = False
    eventually(lambda: len(one._outbox) == 0)


def test_a_real_broker_that_denies_the_topic_takes_no_report_out_of_the_outbox(tmp_path, sent):
    (tmp_path / "acl").write_text("topic write elsewhere\n")
    with Mosquitto(tmp_path, ["allow_anonymous true", f"acl_file {tmp_path}/acl", "user root"]) as broker:
        channel = mqtt.connect(broker.url, "pi-1")
        with pytest.raises(TransferError, match="refused a message"):
            channel.publish("reports", b"x")(5.0)
        assert channel.publish("elsewhere", b"x")(5.0)
        one = sent(channel)
        one.send(b"installed", is_final=True)
        one.stop()
        assert len(Outbox(tmp_path / "outbox")) == 1
        channel.close()

"""What every channel promises, told over memory, the embedded broker and Mosquitto."""

import threading

import pytest
from fakes.brokers import KINDS, running
from fakes.fleets import eventually, noise
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import TransferError
from edgekit.ota.channel import Will, matches
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import MAX_BLOCK_BYTES

PARTS = st.lists(st.text("abc01-", min_size=1, max_size=3), min_size=1, max_size=5)


@pytest.fixture(params=KINDS)
def connect(request, tmp_path):
    with running(request.param, tmp_path) as connecting:
        yield connecting


def listen(channel, pattern):
    got = []
    channel.subscribe(pattern, got.append)
    return got


def test_message_reaches_every_subscriber_whose_pattern_covers_the_topic(connect):
    one, two = connect("one"), connect("two")
    exact, plus, rest, other = (listen(two, p) for p in ("f/a/b", "f/+/b", "f/#", "f/x/b"))
    published = noise("m", 1000)

    def seen():
        one.publish("f/a/b", published)
        return exact and plus and rest

    eventually(seen, 10)
    assert {a.payload for a in [*exact, *plus, *rest]} == {published}
    assert other == []


def test_latecomer_gets_the_last_retained_message_and_a_cleared_one_is_gone(connect):
    one = connect("one")
    for payload in (b"old", b"new"):
        one.publish("kept/a", payload, retain=True)
    one.publish("kept/b", b"gone", retain=True)
    one.publish("kept/b", b"", retain=True)
    one.publish("kept/end", b"end", retain=True)
    first = listen(one, "kept/end")
    eventually(lambda: first)
    got = listen(connect("two"), "kept/#")
    eventually(lambda: len(got) >= 2)
    assert {a.topic: a.payload for a in got if a.payload} == {"kept/a": b"new", "kept/end": b"end"}
    assert all(a.retained for a in got)


def test_request_is_answered_with_its_own_correlation_data(connect):
    asker, server = connect("asker"), connect("server")
    server.subscribe("ask", lambda a: server.publish(a.reply_to, a.payload[::-1], correlation=a.correlation))
    answers = listen(asker, "answers/asker")
    asked = {}

    def all_answered():
        number = len(asked)
        asked[f"c{number}".encode()] = payload = f"question {number}".encode()
        asker.publish("ask", payload, reply_to="answers/asker", correlation=f"c{number}".encode())
        return len(answers) > 5

    eventually(all_answered)
    assert all(a.payload == asked[a.correlation][::-1] for a in answers)


def test_largest_block_arrives_unchanged(connect):
    channel = connect("one")
    got = listen(channel, "big")
    payload = noise("big", MAX_BLOCK_BYTES + 4096)
    eventually(lambda: (channel.publish("big", payload), got)[1])
    assert got[0].payload == payload


def test_closed_channel_refuses_to_work(connect):
    channel = connect("one")
    channel.close()
    channel.close()
    with pytest.raises(TransferError, match="closed"):
        channel.publish("a", b"")
    with pytest.raises(TransferError, match="closed"):
        channel.subscribe("a", print)


def test_callback_may_publish_and_close_without_a_deadlock(connect):
    speaker, channel, done = connect("speaker"), connect("one"), threading.Event()

    def answer(arrival):
        channel.publish("b", b"2")
        channel.close()
        done.set()

    channel.subscribe("a", answer)
    eventually(lambda: done.is_set() or speaker.publish("a", b"1"), 10)


def test_memory_broker_publishes_the_will_of_a_lost_client_but_not_after_a_good_bye():
    broker = MemoryBroker()
    watcher = broker.connect("watcher")
    got = listen(watcher, "wills/#")
    broker.connect("polite", will=Will("wills/polite", b"x")).close()
    lost = broker.connect("lost", will=Will("wills/lost", b"offline"))
    broker.drop("lost")
    eventually(lambda: got)
    assert [(a.topic, a.payload) for a in got] == [("wills/lost", b"offline")]
    assert broker.retained("wills/+")[0].retained
    with pytest.raises(TransferError):
        lost.publish("a", b"")


def test_memory_broker_cuts_off_a_client_whose_name_is_taken_over():
    broker = MemoryBroker()
    first = broker.connect("same")
    broker.connect("same")
    with pytest.raises(TransferError):
        first.publish("a", b"")


@given(parts=PARTS, data=st.data())
def test_pattern_made_from_a_topic_covers_it(parts, data):
    pattern = [data.draw(st.sampled_from([part, "+"])) for part in parts]
    keep = data.draw(st.integers(0, len(parts)))
    assert matches("/".join(pattern), "/".join(parts))
    assert matches("/".join([*pattern[:keep], "#"]), "/".join(parts))


@given(parts=PARTS, data=st.data())
def test_pattern_that_differs_in_one_part_does_not_cover_the_topic(parts, data):
    index = data.draw(st.integers(0, len(parts) - 1))
    pattern = [*parts]
    pattern[index] += "x"
    assert not matches("/".join(pattern), "/".join(parts))
    assert not matches("/".join([*parts, "+"]), "/".join(parts))

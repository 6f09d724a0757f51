"""What waits for the broker: in order, bounded, and whole after every kill, torn write and full disk."""

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.ota.device import outbox as outboxes
from edgekit.ota.device.outbox import Outbox


def waiting(outbox):
    found, last = [], 0
    while (one := outbox.after(last)) is not None:
        found.append(one.payload)
        last = one.number
    return found


def number_of(outbox, payload):
    last = 0
    while (one := outbox.after(last)) is not None and one.payload != payload:
        last = one.number
    return one.number


def test_what_is_sent_at_once_never_touches_the_disk(tmp_path):
    outbox = Outbox(tmp_path / "outbox")
    for text in (b"health 1", b"health 2"):
        outbox.put(text, is_final=False)
        outbox.remove(number_of(outbox, text))
    outbox.save()
    assert list(tmp_path.iterdir()) == []


def test_a_final_word_is_on_the_disk_before_it_is_sent_and_takes_along_what_came_before_it(tmp_path):
    outbox = Outbox(tmp_path / "outbox")
    outbox.put(b"health", is_final=False)
    outbox.put(b"installed", is_final=True)
    outbox.put(b"drift", is_final=False)
    assert waiting(outbox) == [b"health", b"installed", b"drift"]
    assert waiting(Outbox(tmp_path / "outbox")) == [b"health", b"installed"]


def test_only_what_the_broker_took_is_gone_after_a_restart(tmp_path):
    outbox = Outbox(tmp_path / "outbox")
    for text in (b"1", b"2", b"3"):
        outbox.put(text, is_final=True)
    outbox.remove(number_of(outbox, b"2"))
    again = Outbox(tmp_path / "outbox")
    assert waiting(again) == [b"1", b"3"]
    again.put(b"4", is_final=True)
    assert waiting(Outbox(tmp_path / "outbox")) == [b"1", b"3", b"4"]


def test_what_a_kill_left_while_it_was_written_anew_is_swept(tmp_path):
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        box = Outbox(tmp_path / "outbox")
        box._file_bytes = -1  # so that the next word writes it anew
        box.put(b"word", is_final=True)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".outbox.")]
    assert waiting(Outbox(tmp_path / "outbox")) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bounds", [(3, 1 << 20), (1000, 24)], ids=["count", "bytes"])
def test_oldest_telemetry_goes_first_final_words_last_and_both_are_counted(tmp_path, bounds):
    outbox = Outbox(tmp_path / "outbox", *bounds)
    outbox.put(b"rolled 1", is_final=True)
    for text in (b"health 1", b"health 2", b"health 3"):
        outbox.put(text, is_final=False)
    assert waiting(outbox) == [b"rolled 1", b"health 2", b"health 3"]
    for text in (b"rolled 2", b"rolled 3"):
        outbox.put(text, is_final=True)
    assert waiting(outbox) == [b"rolled 1", b"rolled 2", b"rolled 3"]
    outbox.put(b"health 4", is_final=False)
    outbox.put(b"rolled 4", is_final=True)
    assert waiting(outbox) == [b"rolled 2", b"rolled 3", b"rolled 4"]
    assert outbox.dropped == 5
    again = Outbox(tmp_path / "outbox", *bounds)
    assert (waiting(again), again.dropped) == (waiting(outbox), 5)


def test_power_cut_at_every_byte_leaves_what_was_saved_before(tmp_path):
    path = tmp_path / "outbox"
    outbox, saved = Outbox(path), []
    for number in range(6):
        outbox.put(b"word %d" % number, is_final=True)
        saved.append((path.stat().st_size, number + 1))
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        count = max([n for size, n in saved if size <= length], default=0)
        torn = Outbox(path)
        assert waiting(torn)[:count] == [b"word %d" % number for number in range(count)]
        assert len(torn) <= count + 1  # the word itself may be whole where the line after it is torn
        torn.put(b"next", is_final=True)
        assert waiting(Outbox(path)) == waiting(torn)


@pytest.mark.parametrize("at", range(0, 200, 7))
def test_flipped_bits_never_bring_up_what_nobody_put(tmp_path, at):
    path = tmp_path / "outbox"
    outbox = Outbox(path)
    words = [b"word %d" % number for number in range(8)]
    for word in words:
        outbox.put(word, is_final=True)
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 0x40
    path.write_bytes(data)
    found = waiting(Outbox(path))
    assert found == words[: len(found)]
    assert len(found) < len(words)


def test_a_disk_that_cannot_be_written_costs_no_report_that_memory_holds(tmp_path, caplog):
    folder = tmp_path / "state"
    folder.write_text("in the way")  # as a disk that lost its folder
    outbox = Outbox(folder / "outbox")
    outbox.put(b"1", is_final=True)
    assert "wait in memory" in caplog.text
    assert waiting(outbox) == [b"1"]
    folder.unlink()
    outbox.put(b"2", is_final=True)
    assert waiting(Outbox(folder / "outbox")) == [b"1", b"2"]


def test_file_of_a_device_that_is_offline_for_years_stays_small(tmp_path):
    path = tmp_path / "outbox"
    outbox = Outbox(path, 50, 10_000)
    for number in range(3000):
        outbox.put(b"health %d" % number + bytes(100), is_final=False)
        outbox.save()
    assert path.stat().st_size < 2 * 10_000 + outboxes.SLACK_BYTES
    assert (len(outbox), outbox.dropped) == (50, 2950)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.binary(max_size=30), st.booleans()),
        st.sampled_from(["take", "save", "restart"]).map(lambda what: (what, b"", None)),
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_happens_what_waits_is_what_was_put_in_order_but_for_what_was_dropped(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("box") / "outbox"
    outbox, model, put, taken = Outbox(path, 8, 120), [], 0, 0
    for what, payload, is_final in steps:
        if what == "put":
            outbox.put(payload, is_final=is_final)
            model.append(payload)
            put += 1
        elif what == "take" and (first := outbox.after(0)):
            outbox.remove(first.number)
            taken += 1
        elif what == "save":
            outbox.save()
        elif what == "restart":
            outbox.save()
            outbox = Outbox(path, 8, 120)
        found = waiting(outbox)
        assert is_subsequence(found, model)
        assert len(found) <= 8
        assert sum(map(len, found)) <= 120
        assert put == taken + outbox.dropped + len(found)


def is_subsequence(some, all_of_them):
    rest = iter(all_of_them)
    return all(one in rest for one in some)

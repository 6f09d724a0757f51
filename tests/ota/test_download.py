"""A blob comes whole or not at all, goes on where a break left it, and nothing is fetched twice."""

import functools
import hashlib
import shutil
import threading
import time

import pytest
from fakes.fleets import FLEET, Fleet, eventually, noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import ResourceError, TransferError, TrustError
from edgekit.manifest import FileEntry
from edgekit.ota import messages
from edgekit.ota.channel import Arrival, Back
from edgekit.ota.device import fetchers
from edgekit.ota.device.download import download, require_space
from edgekit.ota.device.fetchers import ChannelFetcher, FolderFetcher, MissingFile, Patience
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import MAX_BLOCK_BYTES, Block

SIZE = 3 * MAX_BLOCK_BYTES + 12_345
DATA = noise("blob", SIZE)
ENTRY = FileEntry(path="model.onnx", size=SIZE, sha256=hashlib.sha256(DATA).hexdigest())
HASTY = Patience(window=4, seconds=0.05, attempts=100)


class Stick:
    """A fetcher over bytes that counts what it gave and can be pulled out after some of them."""

    def __init__(self, data=DATA, pulled_after=None):
        self.data, self.left, self.given = data, pulled_after, 0

    def stream(self, path, start, end):
        assert path == f"blobs/{ENTRY.sha256}"
        for at in range(start, min(end, len(self.data)), 1000):
            piece = self.data[at : min(at + 1000, end)]
            if self.left is not None:
                self.left -= len(piece)
                if self.left < 0:
                    raise TransferError("the stick was pulled out")
            self.given += len(piece)
            yield piece


def test_download_writes_the_signed_bytes(tmp_path):
    seen = []
    download(Stick(), ENTRY, tmp_path / "a" / "m", lambda *step: seen.append(step))
    assert (tmp_path / "a" / "m").read_bytes() == DATA
    assert seen[-1] == ("model.onnx", SIZE, SIZE)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, SIZE), max_size=4))
def test_transfer_cut_anywhere_goes_on_without_fetching_anything_twice(tmp_path, cuts):
    target = tmp_path / "m"
    target.unlink(missing_ok=True)
    given = 0
    for cut in cuts:
        stick = Stick(pulled_after=cut)
        try:
            download(stick, ENTRY, target)
        except TransferError:
            assert target.stat().st_size == given + stick.given
        given += stick.given
    last = Stick()
    download(last, ENTRY, target)
    assert target.read_bytes() == DATA
    assert given + last.given == SIZE


def test_complete_file_is_not_fetched_again(tmp_path):
    (tmp_path / "m").write_bytes(DATA)
    stick = Stick()
    download(stick, ENTRY, tmp_path / "m")
    assert stick.given == 0


@pytest.mark.parametrize("there", [b"\0" * 5000, DATA + b"more", b"\0" * SIZE], ids=["holes", "too long", "all holes"])
def test_wrong_bytes_on_the_disk_are_fetched_anew_and_accuse_nobody(tmp_path, there):
    (tmp_path / "m").write_bytes(there)
    download(Stick(), ENTRY, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == DATA


@pytest.mark.attack("arbitrary software")
@pytest.mark.parametrize(
    "data",
    [DATA[:-1] + b"x", DATA[:-1], b"", bytes(SIZE)],
    ids=["last byte changed", "one byte short", "empty", "other bytes"],
)
def test_wrong_bytes_of_the_repository_are_an_attack_and_nothing_of_them_stays(tmp_path, data):
    with pytest.raises(TrustError, match="not the signed ones"):
        download(Stick(data), ENTRY, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@given(position=st.integers(0, 999), flip=st.integers(1, 255))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_is_noticed(tmp_path, position, flip):
    data = noise("small", 1000)
    entry = FileEntry(path="m", size=1000, sha256=hashlib.sha256(data).hexdigest())
    changed = bytearray(data)
    changed[position] ^= flip
    folder = tmp_path / "repo" / "blobs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / entry.sha256).write_bytes(changed)
    with pytest.raises(TrustError):
        download(FolderFetcher(folder.parent), entry, tmp_path / "m")


@pytest.mark.attack("endless data")
def test_endless_data_stops_at_the_signed_length(tmp_path):
    stick = Stick(DATA * 3)
    download(stick, ENTRY, tmp_path / "m")
    assert stick.given == SIZE


def test_full_disk_is_noticed_before_the_first_byte(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SIZE))
    stick = Stick()
    with pytest.raises(ResourceError, match="bytes free") as caught:
        download(stick, ENTRY, tmp_path / "m")
    assert "free some" in caught.value.hint
    assert stick.given == 0
    require_space(tmp_path, 0)


@pytest.fixture
def fleet(tmp_path):
    fleet = Fleet(tmp_path / "fleet")
    blobs = fleet.repository / "blobs"
    blobs.mkdir()
    (blobs / ENTRY.sha256).write_bytes(DATA)
    return fleet


@pytest.fixture
def broker():
    return MemoryBroker()


def fetcher(broker, patience=HASTY):
    return ChannelFetcher(broker.connect("pi-1"), FLEET, "pi-1", patience)


def test_channel_and_folder_give_the_same_bytes(fleet, broker, tmp_path):
    requests = fleet.serve(broker.connect("server"))
    over_air, stick = fetcher(broker, Patience()), FolderFetcher(fleet.repository)
    for start, end in [(0, SIZE), (0, 1), (5, MAX_BLOCK_BYTES + 6), (SIZE - 1, SIZE + 10), (0, SIZE * 2)]:
        wanted = DATA[start:end]
        requests.clear()
        assert b"".join(over_air.stream(f"blobs/{ENTRY.sha256}", start, end)) == wanted
        assert b"".join(stick.stream(f"blobs/{ENTRY.sha256}", start, end)) == wanted
        reached = [request.offset + request.length for request in requests]
        assert [request.offset for request in requests] == [start, *reached[:-1]]  # no byte is asked for twice
    for one in (over_air, stick):
        with pytest.raises(MissingFile):
            list(one.stream("metadata/9.root.json", 0, 10))
    assert over_air._open == {}


def test_lost_and_doubled_answers_are_asked_for_again_and_dropped(fleet, broker, tmp_path):
    server = broker.connect("server")
    seen = []

    def answer(arrival):
        request = messages.decode(arrival.payload, messages.BlockRequest)
        seen.append(request.offset)
        if len(seen) % 3 == 1:
            return  # lost
        data = DATA[request.offset : request.offset + request.length]
        block = messages.encode_block(Block(total=SIZE, data=data))
        server.publish(arrival.reply_to, block, correlation=arrival.correlation)
        server.publish(arrival.reply_to, block, correlation=arrival.correlation)  # QoS 1 may deliver twice

    server.subscribe(messages.topic(FLEET, "pi-1", "request"), answer)
    one = fetcher(broker)
    download(one, ENTRY, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == DATA
    assert len(seen) > len(set(seen))
    assert one.dropped > 0


@pytest.mark.attack("message flood")
def test_answer_nobody_asked_for_and_garbage_are_dropped_and_counted(fleet, broker, tmp_path):
    attacker = broker.connect("attacker")
    one = fetcher(broker)
    own = messages.topic(FLEET, "pi-1", "blocks")
    attacker.publish(own, messages.encode_block(Block(total=SIZE, data=b"evil")), correlation=b"guess")
    attacker.publish(own, b"garbage")

    def poison(arrival):  # even with the right correlation, garbage does not end the question
        attacker.publish(own, b"\xc1garbage", correlation=arrival.correlation)

    attacker.subscribe(messages.topic(FLEET, "pi-1", "request"), poison)
    fleet.serve(broker.connect("server"))
    download(one, ENTRY, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == DATA
    assert one.dropped >= 3


@pytest.mark.attack("slow data")
def test_server_that_never_answers_is_named_after_bounded_tries(broker, tmp_path):
    asked = []
    broker.connect("watcher").subscribe(messages.topic(FLEET, "pi-1", "request"), asked.append)
    one = fetcher(broker, Patience(window=4, seconds=0.05, attempts=4))
    with pytest.raises(TransferError, match=r"no answer for blobs/.* after 4 tries") as caught:
        download(one, ENTRY, tmp_path / "m")
    assert "edgekit ota serve" in caught.value.hint
    assert len(asked) == len({a.correlation for a in asked}) == 4
    assert one._open == {}


@pytest.mark.attack("slow data")
def test_server_that_trickles_over_a_channel_is_given_up(broker):
    """Each answer comes just in time to be no silence."""
    server = broker.connect("server")

    def answer(arrival):
        request = messages.decode(arrival.payload, messages.BlockRequest)
        block = messages.encode_block(Block(total=SIZE, data=DATA[request.offset : request.offset + request.length]))
        tell = functools.partial(server.publish, arrival.reply_to, block, correlation=arrival.correlation)
        threading.Timer(0.05, tell).start()

    server.subscribe(messages.topic(FLEET, "pi-1", "request"), answer)
    patience = Patience(window=1, seconds=60, least_rate=100e6, rate_seconds=0.12)
    came = []
    with pytest.raises(TransferError, match="at least 1e\\+08 a second are wanted"):
        came.extend(fetcher(broker, patience).stream(f"blobs/{ENTRY.sha256}", 0, SIZE))
    assert len(b"".join(came)) < SIZE


def test_closing_wakes_whoever_waits(broker, tmp_path):
    one = fetcher(broker, Patience(seconds=60))
    one.close()
    with pytest.raises(TransferError, match="stopped"):
        download(one, ENTRY, tmp_path / "m")


@pytest.mark.parametrize(
    ("block", "end", "words"),
    [
        (lambda r: Block(total=SIZE, data=b"short"), 100, "asked for"),
        (lambda r: Block(total=1 << 50, data=b""), 100, "asked for"),
        (lambda r: Block(total=SIZE, data=DATA[:101]), 100, "asked for"),
        (lambda r: Block(error="disk on fire"), 100, "disk on fire"),
        (lambda r: Block(total=SIZE + r.offset, data=DATA[r.offset : r.offset + r.length]), SIZE, "changed its length"),
    ],
    ids=["short block", "nothing of very much", "long block", "server error", "growing file"],
)
def test_answer_that_does_not_fit_the_question_is_a_transfer_error(broker, block, end, words):
    server = broker.connect("server")

    def answer(arrival):
        request = messages.decode(arrival.payload, messages.BlockRequest)
        server.publish(arrival.reply_to, messages.encode_block(block(request)), correlation=arrival.correlation)

    server.subscribe(messages.topic(FLEET, "pi-1", "request"), answer)
    with pytest.raises(TransferError, match=words):
        list(fetcher(broker).stream(f"blobs/{ENTRY.sha256}", 0, end))


def test_what_a_break_lost_is_asked_for_again_at_once_and_nothing_twice(fleet, broker, tmp_path):
    channel, listeners = broker.connect("pi-1"), []
    channel.when_back = listeners.append
    server, seen, is_down = broker.connect("server"), [], threading.Event()

    def answer(arrival):
        request = messages.decode(arrival.payload, messages.BlockRequest)
        seen.append(request.offset)
        if len(seen) == 3:
            is_down.set()
        if is_down.is_set():
            return  # lost with the connection
        block = Block(total=SIZE, data=DATA[request.offset : request.offset + request.length])
        server.publish(arrival.reply_to, messages.encode_block(block), correlation=arrival.correlation)

    server.subscribe(messages.topic(FLEET, "pi-1", "request"), answer)
    one = ChannelFetcher(channel, FLEET, "pi-1", Patience(seconds=60))
    loading = threading.Thread(target=download, args=(one, ENTRY, tmp_path / "m"))
    loading.start()
    assert is_down.wait(10)
    eventually(lambda: len(one._open) == Patience().window)
    lost = seen[2:]
    is_down.clear()
    seen.extend([None] * 10)  # so that nothing is the third once more
    listeners[0](Back(time.monotonic(), is_remembered=False))
    loading.join(20)
    assert (tmp_path / "m").read_bytes() == DATA
    asked = [offset for offset in seen if offset is not None]
    assert sorted(asked) == sorted([*set(asked), *lost])  # those twice, and no other
    assert one.dropped == 0


def test_an_answer_that_is_quicker_than_the_sender_does_not_make_the_next_silence_endless():
    """It was taken for the slowest ever: the next lost question was waited for twice as long as the machine was up."""

    class Quick:
        """Answers the first question before ``publish`` returns, and no other."""

        def __init__(self):
            self.asked = []

        def when_back(self, call):
            pass

        def subscribe(self, pattern, on_arrival):
            self.on_arrival = on_arrival

        def publish(self, topic, payload, *, reply_to, correlation):
            self.asked.append(messages.decode(payload, messages.BlockRequest).path)
            if len(self.asked) == 1:
                block = messages.encode_block(Block(total=4, data=b"data"))
                self.on_arrival(Arrival(reply_to, block, correlation=correlation))

    channel, problems = Quick(), []
    one = ChannelFetcher(channel, FLEET, "pi-1", Patience(seconds=0.01, attempts=3))
    assert list(one.stream("metadata/1.root.json", 0, 4)) == [b"data"]

    def read():
        try:
            list(one.stream("metadata/2.root.json", 0, 4))
        except TransferError as error:
            problems.append(error.message)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(20)
    one.close()
    assert problems == ["no answer for metadata/2.root.json at byte 0 after 3 tries, the first of 0.01 s"]
    assert channel.asked == ["metadata/1.root.json", *["metadata/2.root.json"] * 3]


def test_a_slow_link_gets_small_blocks_and_a_quick_one_large_ones(fleet, broker, tmp_path):
    requests = fleet.serve(broker.connect("server"))
    one = fetcher(broker, Patience())
    list(one.stream(f"blobs/{ENTRY.sha256}", 0, SIZE))
    list(one.stream(f"blobs/{ENTRY.sha256}", 0, SIZE))
    assert max(request.length for request in requests) > fetchers.FIRST_BYTES
    mute = ChannelFetcher(MemoryBroker().connect("pi-1"), FLEET, "pi-1", Patience(seconds=0.01, attempts=5))
    with pytest.raises(TransferError):
        list(mute.stream("blobs/" + "0" * 64, 0, SIZE))
    assert mute._length == fetchers.LEAST_BYTES


def test_a_lost_answer_is_asked_for_as_soon_as_a_later_one_comes(fleet, broker, tmp_path):
    server, seen = broker.connect("server"), []

    def answer(arrival):
        request = messages.decode(arrival.payload, messages.BlockRequest)
        seen.append(request.offset)
        if len(seen) != 3:
            block = Block(total=SIZE, data=DATA[request.offset : request.offset + request.length])
            server.publish(arrival.reply_to, messages.encode_block(block), correlation=arrival.correlation)

    server.subscribe(messages.topic(FLEET, "pi-1", "request"), answer)
    one = fetcher(broker, Patience(seconds=60))  # a silence would be longer than this test waits
    loading = threading.Thread(target=download, args=(one, ENTRY, tmp_path / "m"), daemon=True)
    loading.start()
    loading.join(20)
    assert (tmp_path / "m").read_bytes() == DATA
    assert sorted(seen) == sorted([*set(seen), seen[2]])

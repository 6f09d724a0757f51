"""Blobs come over HTTPS where the release names a URL, over the channel where that fails, and the policy holds both."""

import contextlib
import logging
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from fakes import certificates
from fakes.fleets import FLEET, NOW, PROFILE, QUICK, Fleet, Serving, eventually, install, noise, wish
from fakes.web import mutual, serving

from edgekit import bundle
from edgekit import manifest as manifests
from edgekit.errors import MessageError, TransferError, UsageError
from edgekit.manifest import Manifest, Parity, Variant
from edgekit.ota import messages
from edgekit.ota.device import slots
from edgekit.ota.device.agent import Agent, Habits
from edgekit.ota.device.fetchers import MAX_BLOCK_BYTES, FolderFetcher, MissingFile, Patience
from edgekit.ota.device.gate import METERED, Gate, Held
from edgekit.ota.device.https import trusting
from edgekit.ota.device.policy import Policy, parse_window
from edgekit.ota.device.sources import Fallback, Https, ways
from edgekit.ota.device.update import Device, update
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import Failed, Installed, Refused, Report, Waiting
from edgekit.ota.mqtt import Tls
from edgekit.ota.release import Release, from_custom, to_custom
from edgekit.ota.server import publisher

SIZE = 700_000
HABITS = Habits(first_pause=0.05, longest_pause=0.2, look_seconds=0.02, will_delay=0, patience=Patience(seconds=1.0))
BRIEF = Patience(seconds=1.0, attempts=2)
NIGHT = datetime(2026, 11, 30, 23, tzinfo=UTC)


class Clock:
    """A time that a test moves."""

    def __init__(self, now=NOW):
        self.now = now

    def __call__(self):
        return self.now


class Place:
    """A fleet over memory, whose repository is also on the web, and one device with a policy."""

    def __init__(self, folder, web, https=None, policy=None):
        self.fleet, self.folder, self.web = Fleet(folder / "fleet", SIZE), folder, web
        self.broker = MemoryBroker()
        self.server = self.broker.connect("server")
        self.requests = self.fleet.serve(self.server)
        self.said = []
        self.server.subscribe(messages.topic(FLEET, "+", "report"), self._hear)
        base = self.fleet.device(folder / "device", Serving())
        self.gate = Gate(policy, base.state)
        self.gate.clock = Clock(NIGHT)
        self.device = Device(
            base.name,
            base.profile,
            base.state,
            base.serving,
            gate=self.gate,
            https=https or Https(patience=BRIEF),
        )
        self.agent = None

    def _hear(self, arrival):
        self.said.append(messages.decode(arrival.payload, Report))

    def start(self, repository=None):
        self.agent = Agent(FLEET, self.device, HABITS)
        self.agent.clock = lambda: NOW
        self.agent.repository = repository
        self.agent.start(lambda will: self.broker.connect("pi-1", will=will))
        return self.agent

    def want(self, release, deployment="d1"):
        topic = messages.topic(FLEET, "pi-1", "desired")
        self.server.publish(topic, messages.encode(wish(release, deployment)), retain=True)

    def heard(self, kind, count=1):
        return eventually(lambda: len(got := [m for m in list(self.said) if isinstance(m, kind)]) >= count and got)[-1]

    def asked(self, prefix):
        return [request.path for request in self.requests if request.path.startswith(prefix)]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "fleet").mkdir()
    with serving(tmp_path / "fleet" / "repository") as web:
        made = Place(tmp_path, web)
        yield made
        if made.agent:
            made.agent.stop()


@contextlib.contextmanager
def placed(folder, **options):
    (folder / "fleet").mkdir()
    with serving(folder / "fleet" / "repository") as web:
        made = Place(folder, web, **options)
        try:
            yield made
        finally:
            if made.agent:
                made.agent.stop()


def test_blobs_of_a_release_with_a_url_come_over_the_web_and_its_metadata_over_the_channel(place):
    one = place.fleet.publish(1, url=place.web.url)
    place.start()
    place.want(one)
    assert place.heard(Installed).bundle == one.bundle
    assert place.asked("blobs/") == []
    assert {path.split("/")[0] for path, _ in place.web.asked} == {"blobs"}
    assert place.asked("metadata/")


def test_with_client_certificates_over_https(tmp_path):
    own = certificates.authority(tmp_path / "own")
    mine = trusting(Tls(own.certificate, *own.issue("pi-1")))
    (tmp_path / "fleet").mkdir()
    with serving(tmp_path / "fleet" / "repository", mutual(own)) as web:
        place = Place(tmp_path, web, Https(mine, BRIEF))
        one = place.fleet.publish(1, url=web.url)
        assert isinstance(update(place.device, wish(one), FolderFetcher(place.fleet.repository), NOW), Installed)
        assert web.given > SIZE


def test_web_that_is_gone_in_the_middle_gives_way_to_the_channel_at_that_very_byte(place, caplog):
    one = place.fleet.publish(1, url=place.web.url + "/")
    place.web.cuts, place.web.status_after_cut = [300_000], 503
    place.start()
    place.want(one)
    assert place.heard(Installed).bundle == one.bundle
    over_air = [request.offset for request in place.requests if request.path.startswith("blobs/")]
    assert min(offset for offset in over_air if offset) == 300_000
    assert place.web.given <= 300_000 + 9
    assert not [m for m in place.said if isinstance(m, Failed | Refused)]
    assert "comes over the other way" in caplog.text


@pytest.mark.parametrize(("status", "files"), [(410, 1), (503, 1), (403, 2), (404, 2)])
def test_web_that_fails_is_left_for_the_whole_update_and_one_that_lacks_a_file_for_that_file(place, status, files):
    one = place.fleet.publish(1, url=place.web.url)
    place.web.status = status
    place.start()
    place.want(one)
    assert place.heard(Installed).bundle == one.bundle
    assert len({path for path, _ in place.web.asked}) == files
    assert len(set(place.asked("blobs/"))) == 2


def test_web_that_nobody_serves_is_left_for_the_channel(place):
    one = place.fleet.publish(1, url="http://127.0.0.1:1/repository")
    place.start()
    place.want(one)
    assert place.heard(Installed).bundle == one.bundle


def test_wrong_bytes_from_the_web_give_way_to_the_channel_for_the_whole_update(place, caplog):
    one = place.fleet.publish(1, url=place.web.url)
    place.web.change = lambda data: bytes(len(data))
    place.start()
    place.want(one)
    word = place.heard(Installed)
    assert word.bundle == one.bundle
    assert not [m for m in place.said if isinstance(m, Failed | Refused)]
    assert len({path for path, _ in place.web.asked}) == 1, "a mirror that lied is not asked for the next file"
    assert "not the signed ones" in caplog.text
    first, second = sorted(entry.size for entry in manifest_of(place, one).files_of(PROFILE))
    assert word.measured["downloaded_bytes"] in (2 * first + second, first + 2 * second), (
        "what was lied is counted, too"
    )


def test_web_that_lies_and_breaks_off_is_not_mixed_with_the_channel(place):
    """It gives up in the middle, so that the channel goes on behind what it forged."""
    one = place.fleet.publish(1, url=place.web.url)
    place.web.change = lambda data: bytes(len(data))
    place.web.cuts, place.web.status_after_cut = [300_000], 503
    place.start()
    place.want(one)
    assert place.heard(Installed).bundle == one.bundle
    assert place.web.given
    assert not [m for m in place.said if isinstance(m, Failed | Refused)]


def test_where_every_way_lies_the_release_is_an_alarm_and_installed_once_one_does_not(place):
    one = place.fleet.publish(1, url=place.web.url)
    entry = max(manifest_of(place, one).files_of(PROFILE), key=lambda entry: entry.size)
    blob = place.fleet.repository / "blobs" / entry.sha256
    sound = blob.read_bytes()
    blob.write_bytes(bytes(len(sound)))
    place.start()
    place.want(one)
    assert "not the signed ones" in place.heard(Failed, count=2).reason
    assert slots.load(place.device.state).outcome is None
    blob.write_bytes(sound)
    assert place.heard(Installed).bundle == one.bundle


def test_ways_end_with_one_that_is_alone():
    a, b, c = (FolderFetcher(name) for name in "abc")
    last = Fallback(b, c)
    both = Fallback(a, last)
    assert ways(both) == [both, last, c]
    assert ways(c) == [c]


def test_endless_data_from_the_web_stop_at_the_signed_length(place):
    one = place.fleet.publish(1, url=place.web.url)
    place.web.change = lambda data: data + bytes(10_000_000)
    place.start()
    place.want(one)
    assert place.heard(Installed).bundle == one.bundle
    assert place.web.given < 2 * SIZE


def test_device_that_reads_no_urls_takes_everything_from_its_stick(place):
    one = place.fleet.publish(1, url=place.web.url)
    device = place.fleet.device(place.folder / "other")
    assert isinstance(install(place.fleet, device, one), Installed)
    assert place.web.asked == []


def test_repository_on_the_web_brings_metadata_too_and_the_channel_what_it_lacks(place):
    one = place.fleet.publish(1)
    place.start(place.device.https.at(place.web.url))
    place.want(one)
    assert place.heard(Installed).bundle == one.bundle
    assert place.requests == []
    place.web.status = 503
    two = place.fleet.publish(2)
    place.want(two, "d2")
    eventually(lambda: place.heard(Installed).bundle == two.bundle)
    assert place.asked("metadata/")


@pytest.mark.parametrize("published", [NOW, NOW - timedelta(days=8)], ids=["lagging", "frozen"])
def test_a_copy_on_the_web_that_lags_gives_way_to_the_channels_metadata(place, tmp_path, published):
    place.fleet.publish(1, now=published)
    shutil.copytree(place.fleet.repository, tmp_path / "copy")
    two = place.fleet.publish(2)
    with serving(tmp_path / "copy") as copy:
        place.start(place.device.https.at(copy.url))
        place.want(two)
        word = eventually(lambda: [m for m in list(place.said) if isinstance(m, Installed | Refused)])[0]
        assert isinstance(word, Installed), word
        assert word.bundle == two.bundle
        assert copy.asked
        assert place.asked("metadata/")


def test_a_redirect_that_leads_to_no_url_gives_way_to_the_channel(place):
    one = place.fleet.publish(1, url=place.web.url)
    place.web.location = "https://[x/"
    place.start()
    place.want(one)
    assert place.heard(Installed).bundle == one.bundle
    assert place.web.asked
    assert place.asked("blobs/")


def manifest_of(place, release):
    folder, _, name = release.path.rpartition("/")
    return manifests.decode((place.fleet.repository / "targets" / folder / f"{release.bundle}.{name}").read_bytes())


def test_missing_metadata_is_not_looked_for_elsewhere_because_that_is_how_roots_end(place):
    both = Fallback(FolderFetcher(place.folder / "nothing"), FolderFetcher(place.fleet.repository))
    with pytest.raises(MissingFile):
        list(both.stream("metadata/1.root.json", 0, 10))
    assert b"".join(both.stream("targets/x", 0, 0)) == b""


@pytest.mark.parametrize(
    "url",
    [
        "https://cdn.example",
        "https://cdn.example:8443/a/b_c/",
        "https://[2001:db8::1]:1/x",
        "http://localhost:80",
        "http://[::1]/x",
        "",
    ],
)
def test_url_of_a_release_survives_its_signature(url):
    release = Release(model="m", profile="p", version=1, bundle="a" * 64, url=url)
    assert from_custom(to_custom(release)) == release
    assert ("url" in to_custom(release)["release"]) == bool(url)  # devices that know of none take what has none


@pytest.mark.parametrize(
    "url",
    ["http://cdn.example", "ftp://x", "file:///etc", "https://u:p@x/", "https://", "https://x/?q", "https://x/#f", "https://x//y",
     "https://x/\n", "http://127.0.0.1.example.com/", "https://" + "x" * 500, "//x"],
)  # fmt: skip
def test_no_release_with_another_url_is_published_or_believed(place, url):
    with pytest.raises(UsageError, match="cannot be published"):
        place.fleet.publish(1, url=url)
    assert not list((place.fleet.repository / "blobs").glob("*"))


def test_outside_its_window_a_device_says_why_it_waits_and_begins_by_itself(tmp_path):
    with placed(tmp_path, policy=Policy(windows=(parse_window("22:00-06:00Z"),))) as place:
        place.gate.clock.now = NIGHT - timedelta(hours=5)
        one = place.fleet.publish(1, url=place.web.url)
        place.start()
        place.want(one)
        word = place.heard(Waiting)
        assert (word.reason, word.until) == (
            "outside the maintenance window 22:00-06:00Z",
            int((NIGHT - timedelta(hours=1)).timestamp()),
        )
        assert place.web.asked == []
        assert place.asked("blobs/") == []
        assert place.device.serving.calls == [("activate", None)]
        place.gate.clock.now = NIGHT
        assert place.heard(Installed).bundle == one.bundle
        assert len([m for m in place.said if isinstance(m, Waiting)]) == 1
        assert not [m for m in place.said if isinstance(m, Failed)]


def test_what_is_installed_already_is_told_at_any_time(tmp_path):
    with placed(tmp_path, policy=Policy(windows=(parse_window("22:00-06:00Z"),))) as place:
        one = place.fleet.publish(1)
        place.start()
        place.want(one)
        place.heard(Installed)
        place.gate.clock.now = NIGHT + timedelta(hours=12)
        place.want(one, "d2")
        eventually(lambda: place.heard(Installed).deployment == "d2")
        place.want(place.fleet.publish(2), "d3")
        assert place.heard(Waiting).deployment == "d3"
        assert slots.load(place.device.state).current == one
        assert place.device.serving.active == one.bundle


def test_download_at_the_windows_end_stops_between_two_blocks_and_goes_on_the_next_night(tmp_path):
    with placed(tmp_path, policy=Policy(windows=(parse_window("22:00-06:00Z"),))) as place:
        one = place.fleet.publish(1)
        agent = place.start()

        def morning(what, done, total):
            if total == SIZE and done < total:
                place.gate.clock.now = NIGHT + timedelta(hours=12)

        agent.progress = morning
        place.want(one)
        place.heard(Waiting)
        (staged,) = (place.device.state / "staging").glob("*/*/model.onnx")
        came, asked = staged.stat().st_size, len(place.requests)
        assert 0 < came < SIZE
        agent.progress = lambda *_: None
        place.gate.clock.now = NIGHT + timedelta(days=1)
        assert place.heard(Installed).bundle == one.bundle
        night = [request.offset for request in place.requests[asked:] if request.path.startswith("blobs/")]
        assert min(night) == came  # what was on the disk does not come twice


def test_model_that_came_by_the_windows_end_is_not_tried_out_before_the_next(tmp_path):
    with placed(tmp_path, policy=Policy(windows=(parse_window("22:00-06:00Z"),))) as place:
        one = place.fleet.publish(1)

        def morning(what, done, total):
            if total == SIZE and done == total:
                place.gate.clock.now = NIGHT + timedelta(hours=12)

        with pytest.raises(Held, match="outside the maintenance window"):
            update(place.device, wish(one), FolderFetcher(place.fleet.repository), NOW, progress=morning)
        assert place.device.serving.calls == []
        slots.open_bundle(place.device.state, one, PROFILE)
        place.gate.clock.now = NIGHT + timedelta(days=1)
        place.fleet.repository.joinpath("blobs").rename(tmp_path / "gone")  # nothing of it comes again
        assert isinstance(update(place.device, wish(one), FolderFetcher(place.fleet.repository), NOW), Installed)


def test_metered_link_brings_metadata_alone_until_it_is_another_one(tmp_path):
    with placed(tmp_path) as place:
        metered = place.device.state / METERED
        metered.touch()
        one = place.fleet.publish(1, url=place.web.url)
        place.start()
        place.want(one)
        word = place.heard(Waiting)
        assert (word.reason, word.until) == (f"the link is metered: {SIZE + 9} bytes wait for another one", 0)
        assert place.web.asked == []
        assert place.asked("targets/")
        metered.unlink()
        place.heard(Installed)


def test_metered_link_brings_updates_below_its_size_and_counts_what_is_there(tmp_path):
    with placed(tmp_path, policy=Policy(is_metered=True, metered_below=SIZE)) as place:
        one = place.fleet.publish(1)
        folder = FolderFetcher(place.fleet.repository)
        with pytest.raises(Held):
            update(place.device, wish(one), folder, NOW)
        place.gate.policy = Policy()

        def pulled(what, done, total):
            if total == SIZE:
                raise TransferError("the stick was pulled out")

        with pytest.raises(TransferError):
            update(place.device, wish(one), folder, NOW, progress=pulled)
        place.gate.policy = Policy(is_metered=True, metered_below=SIZE)
        assert isinstance(update(place.device, wish(one), folder, NOW), Installed)


def test_link_that_becomes_metered_between_two_files_holds_the_rest_of_them_together(tmp_path):
    fleet = Fleet(tmp_path / "fleet")
    names = tuple(f"{PROFILE}/{number}.bin" for number in range(5))
    variant = Variant(
        name=PROFILE, format="onnx", precision="fp32", main=names[0], files=names, parity=Parity(status="checked")
    )
    manifest = Manifest(name="digits", version="1", task="tensor", variants=(variant,), files=())
    made = bundle.seal(tmp_path / "sealed", manifest, {name: noise(name, 2000) for name in names})
    (one,) = publisher.publish(fleet.folder, made, now=NOW, limits=QUICK)
    base = fleet.device(tmp_path / "device")
    device = Device(base.name, PROFILE, base.state, base.serving, gate=Gate(Policy(metered_below=3000), base.state))
    came = []

    class Moving(FolderFetcher):
        def stream(self, path, start, end):
            yield from super().stream(path, start, end)
            if path.startswith("blobs/"):
                came.append(path)
                (device.state / METERED).touch()

    with pytest.raises(Held, match="8000 bytes wait"):
        update(device, wish(one), Moving(fleet.repository), NOW)
    assert len(came) == 1


def test_bandwidth_holds_metadata_and_blobs_of_all_ways_together(tmp_path):
    with placed(tmp_path, policy=Policy(bandwidth=100_000)) as place:
        paused = []
        place.gate.seconds = lambda: sum(paused)
        place.gate.pause = paused.append
        one = place.fleet.publish(1, url=place.web.url)
        assert isinstance(update(place.device, wish(one), FolderFetcher(place.fleet.repository), NOW), Installed)
        assert place.web.given > SIZE
        assert SIZE / 100_000 - 1 < sum(paused) < SIZE / 100_000 + 3


def test_limit_below_the_window_asks_for_one_block_at_a_time():
    patience = Patience(window=8)
    assert patience.within(0).window == 8
    assert patience.within(500_000).window == 1
    assert patience.within(3 * MAX_BLOCK_BYTES).window == 3
    assert patience.within(1 << 40).window == 8


def test_new_wish_ends_the_wait_for_a_window(tmp_path):
    with placed(tmp_path, policy=Policy(windows=(parse_window("22:00-06:00Z"),))) as place:
        place.gate.clock.now = NIGHT - timedelta(hours=5)
        place.start()
        place.want(place.fleet.publish(1))
        place.heard(Waiting)
        place.want(place.fleet.publish(2), "d2")
        eventually(lambda: place.heard(Waiting).deployment == "d2")


def test_old_servers_take_a_wait_for_garbage_and_nothing_more():
    known = messages.Installed | messages.RolledBack | messages.Refused | messages.Failed
    word = Waiting(device="pi-1", deployment="d", attempt=1, version=1, reason="night", until=5)
    with pytest.raises(MessageError):
        messages.decode(messages.encode(word), known)
    assert messages.decode(messages.encode(word), Report) == word


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level(logging.WARNING)

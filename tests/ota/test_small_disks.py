"""Real disks that are too small, fill up in the middle, or turn read-only: what serves serves on, and it ends well."""

import logging

import pytest
from fakes.disks import disk
from fakes.fleets import FLEET, NOW, PROFILE, Fleet, Serving, eventually, install, wish

from edgekit.errors import ResourceError
from edgekit.ota import messages
from edgekit.ota.device import slots
from edgekit.ota.device.agent import Agent, Habits
from edgekit.ota.device.download import RESERVE_BYTES
from edgekit.ota.device.fetchers import FolderFetcher
from edgekit.ota.device.slots import Trial
from edgekit.ota.device.update import recover, update
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import Failed, Installed, Report, RolledBack

SIZE = 5 << 20
HABITS = Habits(first_pause=0.02, longest_pause=0.05, will_delay=0)


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path / "fleet", SIZE)


@pytest.fixture
def small(tmp_path):
    with disk(tmp_path, 20) as made:  # two bundles of 5 MiB, the reserve, and no third one
        yield made


def two_installed(fleet, small):
    device = fleet.device(small.path / "state")
    releases = [fleet.publish(1), fleet.publish(2)]
    for release in releases:
        assert isinstance(install(fleet, device, release, deployment=f"d{release.version}"), Installed)
    return device, *releases


def test_disk_without_room_for_a_third_bundle_gives_up_the_one_before_and_says_so(fleet, small, caplog):
    device, one, two = two_installed(fleet, small)
    assert small.free < SIZE + RESERVE_BYTES
    three = fleet.publish(3)
    with caplog.at_level(logging.WARNING):
        assert isinstance(install(fleet, device, three, deployment="d3"), Installed)
    assert f"{one.path} is given up" in caplog.text
    state = slots.load(device.state)
    assert (state.current, state.previous) == (three, two)
    assert {path.name for path in (device.state / "bundles").iterdir()} == {two.bundle, three.bundle}


def test_one_that_misbehaves_then_still_has_a_bundle_to_go_back_to(fleet, small):
    device, _, two = two_installed(fleet, small)
    device.serving.fail_at = "probation"
    assert isinstance(install(fleet, device, fleet.publish(3), deployment="d3"), RolledBack)
    assert device.serving.active == two.bundle
    slots.open_current(device.state, slots.load(device.state))


def test_bundle_before_is_kept_where_giving_it_up_would_not_be_enough(fleet, small):
    device, one, two = two_installed(fleet, small)
    fleet.size = 3 * SIZE
    with pytest.raises(ResourceError, match=r"has \d+ bytes free, the update needs 15728640 and 4194304 in reserve"):
        install(fleet, device, fleet.publish(3), deployment="d3")
    state = slots.load(device.state)
    assert (state.current, state.previous) == (two, one)
    assert {path.name for path in (device.state / "bundles").iterdir()} == {one.bundle, two.bundle}
    assert device.serving.active == two.bundle


def test_release_before_is_kept_where_it_is_the_very_bundle_that_serves(fleet, small):
    """Published once more under another number: there is one folder for both, so giving one up frees nothing."""
    device = fleet.device(small.path / "state")
    one, again = fleet.publish(1), fleet.publish(1)
    for release in (one, again):
        assert isinstance(install(fleet, device, release, deployment=f"d{release.version}"), Installed)
    assert one.bundle == again.bundle
    small.fill(leave=SIZE)
    with pytest.raises(ResourceError, match="bytes free"):
        install(fleet, device, fleet.publish(3), deployment="d3")
    state = slots.load(device.state)
    assert (state.current, state.previous) == (again, one)


def test_bundle_before_is_kept_while_the_present_one_is_damaged(fleet, small):
    device, one, two = two_installed(fleet, small)
    path = slots.bundle_folder(device.state, two.bundle) / PROFILE / "model.onnx"
    path.write_bytes(b"rotten" + bytes(SIZE - 6))
    with pytest.raises(ResourceError, match="bytes free"):
        install(fleet, device, fleet.publish(3), deployment="d3")
    assert slots.load(device.state).previous == one


def test_bundle_before_is_kept_while_the_present_one_is_on_probation(fleet, small):
    device, one, two = two_installed(fleet, small)
    state = slots.load(device.state)
    slots.save(device.state, slots.on_trial(state, Trial(deployment="d2", attempt=1, starts=1)))
    recover(device)  # its second start: back to the one before
    assert slots.load(device.state).current == one
    assert not slots.bundle_folder(device.state, two.bundle).exists()


def test_bundle_that_a_kill_left_behind_makes_room_first(fleet, small):
    device, _, two = two_installed(fleet, small)
    state = slots.load(device.state)
    slots.save(device.state, slots.without_previous(state))  # as if killed before its folder was removed
    assert isinstance(install(fleet, device, fleet.publish(3), deployment="d3"), Installed)
    assert slots.load(device.state).previous == two


class Told:
    """An agent over memory whose reports a test can wait for."""

    def __init__(self, fleet, device):
        broker = MemoryBroker()
        self._server = broker.connect("server")
        fleet.serve(self._server)
        self.said = []
        self._server.subscribe(
            messages.topic(FLEET, "+", "report"), lambda a: self.said.append(messages.decode(a.payload, Report))
        )
        self.agent = Agent(FLEET, device, HABITS)
        self.agent.clock = lambda: NOW
        self.agent.start(lambda will: broker.connect("pi-1", will=will))

    def want(self, release, deployment):
        topic = messages.topic(FLEET, "pi-1", "desired")
        self._server.publish(topic, messages.encode(wish(release, deployment)), retain=True)

    def heard(self, kind, deployment):
        return eventually(lambda: [m for m in list(self.said) if isinstance(m, kind) and m.deployment == deployment])[
            -1
        ]


@pytest.fixture
def told(fleet, small):
    device = fleet.device(small.path / "state", Serving())
    one = fleet.publish(1)
    assert isinstance(install(fleet, device, one), Installed)
    made = Told(fleet, device)
    yield made, device, one
    made.agent.stop()


def test_disk_that_fills_up_in_the_middle_is_a_failure_that_goes_on_from_what_came(fleet, small, told):
    made, device, one = told
    two = fleet.publish(2)

    def others_write(_what, done, total):
        if total == SIZE and SIZE // 2 < done < total and not (small.path / "ballast").exists():
            small.fill(leave=100_000)

    made.agent.progress = others_write
    made.want(two, "d2")
    assert "No space left" in made.heard(Failed, "d2").reason
    assert device.serving.active == one.bundle
    slots.open_current(device.state, slots.load(device.state))
    (staged,) = (device.state / "staging").glob(f"*/{PROFILE}/model.onnx")
    assert SIZE // 2 < staged.stat().st_size < SIZE
    begun = []
    made.agent.progress = lambda _what, done, total: begun.append(done) if total == SIZE else None
    small.empty()
    assert made.heard(Installed, "d2").bundle == two.bundle
    assert begun[0] > SIZE // 2


def test_disk_that_turned_read_only_is_a_failure_and_the_old_model_serves_on(fleet, small):
    device = fleet.device(small.path / "state")
    one = fleet.publish(1)
    install(fleet, device, one)
    two = fleet.publish(2)
    small.set_writable(False)
    with pytest.raises(OSError, match="Read-only file system"):  # the agent reports it and tries again
        install(fleet, device, two, deployment="d2")
    assert device.serving.active == one.bundle
    small.set_writable(True)
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)


def test_model_that_misbehaves_on_a_disk_that_just_turned_read_only_does_not_serve_on(fleet, small):
    once = [False]

    class Sour(Serving):
        def probation(self, release):
            if release.version == 2:
                if once:
                    small.set_writable(once.pop())
                self.fail_at = "probation"
            return super().probation(release)

    device = fleet.device(small.path / "state", Sour())
    one = fleet.publish(1)
    install(fleet, device, one)
    two = fleet.publish(2)
    with pytest.raises(OSError, match="Read-only"):
        update(device, wish(two, "d2"), FolderFetcher(fleet.repository), NOW)
    assert device.serving.active == one.bundle
    small.set_writable(True)
    word = recover(device)  # the pointer could not be changed: its probation is taken up again
    assert isinstance(word, RolledBack)
    assert (device.serving.active, slots.load(device.state).current) == (one.bundle, one)

"""A bundle that took over for good and does not do any more gives way to the one before, killed anywhere."""

import shutil
import threading

import pytest
from fakes.fleets import NOW, Fleet, Serving, eventually, install, wish
from fakes.kills import run_and_kill
from test_agent import Town

from edgekit.ota.device import slots
from edgekit.ota.device.slots import Trial
from edgekit.ota.device.update import MAX_TRIES, recover, retreat, update
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import Hello, Installed, RolledBack

WHY = "the engine crashed 3 times within 10 min"


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path / "fleet")


@pytest.fixture
def two_installed(fleet, tmp_path):
    device = fleet.device(tmp_path / "device")
    one, two = fleet.publish(1), fleet.publish(2)
    install(fleet, device, one)
    install(fleet, device, two, deployment="d2", attempt=4)
    return device, one, two


def nobody():
    raise AssertionError("nothing is fetched")


class Nothing:
    def fetch(self, *_):
        nobody()


def test_the_old_bundle_serves_again_and_the_word_is_on_the_wish_that_installed_the_new_one(two_installed):
    device, one, two = two_installed
    word = retreat(device, two.bundle, WHY)
    assert isinstance(word, RolledBack)
    assert (word.deployment, word.attempt, word.version, word.reason) == ("d2", 4, 2, WHY)
    assert device.serving.active == one.bundle
    state = slots.load(device.state)
    assert (state.current, state.previous, state.outcome) == (one, None, word)
    assert [p.name for p in (device.state / "bundles").iterdir()] == [one.bundle]
    assert update(device, wish(two, "d2", 4), Nothing(), NOW) == word, "the same wish is not obeyed again"


def test_another_attempt_is_obeyed_as_after_any_rollback(two_installed, fleet):
    device, _, two = two_installed
    retreat(device, two.bundle, WHY)
    assert isinstance(install(fleet, device, two, deployment="d2", attempt=5), Installed)
    assert device.serving.active == two.bundle


def test_a_release_that_was_given_up_counts_as_rolled_back(two_installed, fleet):
    device, one, two = two_installed
    retreat(device, two.bundle, WHY)
    for attempt in range(5, 4 + MAX_TRIES):
        device.serving.fail_at = "probation"
        install(fleet, device, two, deployment="d2", attempt=attempt)
    word = install(fleet, device, two, deployment="d2", attempt=99)
    assert "not tried again" in word.reason
    assert device.serving.active == one.bundle


def test_where_nothing_is_left_to_go_back_to_it_serves_on(two_installed):
    device, one, two = two_installed
    retreat(device, two.bundle, WHY)
    before, calls = slots.load(device.state), list(device.serving.calls)
    assert retreat(device, one.bundle, WHY) is None
    assert (slots.load(device.state), device.serving.calls) == (before, calls)


def test_an_old_bundle_that_the_disk_has_damaged_is_nothing_to_go_back_to(two_installed):
    device, one, two = two_installed
    path = next((device.state / "bundles" / one.bundle).rglob("model.onnx"))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert retreat(device, two.bundle, WHY) is None
    assert device.serving.active == two.bundle
    assert slots.load(device.state).current == two


def test_a_word_that_comes_late_gives_up_nothing_else(two_installed):
    device, one, two = two_installed
    assert retreat(device, one.bundle, WHY) is None
    state = slots.load(device.state)
    slots.save(device.state, slots.on_trial(state, Trial(deployment="d2", attempt=4)))
    assert retreat(device, two.bundle, WHY) is None, "its probation judges it"
    assert device.serving.active == two.bundle


def test_an_empty_device_has_nothing_to_give_up(fleet, tmp_path):
    assert retreat(fleet.device(tmp_path / "device"), "0" * 64, WHY) is None


def test_kill_at_any_step_of_a_retreat_leaves_the_old_or_the_new_bundle_whole(two_installed, fleet, tmp_path):
    before, one, two = two_installed
    points = 0
    for at in range(1, 100):
        shutil.copytree(before.state, tmp_path / f"device-{at}")
        device = fleet.device(tmp_path / f"device-{at}", Serving(two.bundle))
        if not run_and_kill(lambda device=device: retreat(device, two.bundle, WHY), at):
            break
        points += 1
        reborn = fleet.device(device.state, Serving())
        recover(reborn)
        state = slots.load(reborn.state)
        assert state.current in (one, two)
        assert reborn.serving.active == slots.open_current(reborn.state, state).digest == state.current.bundle
        if state.current == two:  # killed before it was written: the next crashes ask again
            retreat(reborn, two.bundle, WHY)
        word = install(fleet, reborn, two, deployment="d2", attempt=4)
        assert (type(word), word.reason) == (RolledBack, WHY)
        assert reborn.serving.active == one.bundle
    assert points > 5


@pytest.fixture
def town(tmp_path):
    town = Town(tmp_path, MemoryBroker().connect, size=2_000_000)
    yield town
    town.end()


def test_the_agent_gives_a_bundle_up_and_tells_the_fleet(town):
    one, two = town.fleet.publish(1), town.fleet.publish(2)
    serving = Serving()
    agent = town.agent(serving)
    town.want(one)
    town.heard(Installed)
    town.want(two, "d2")
    eventually(lambda: town.heard(Installed).version == 2)
    agent.give_up(two.bundle, WHY)
    word = town.heard(RolledBack)
    assert (word.deployment, word.version, word.reason) == ("d2", 2, WHY)
    eventually(lambda: town.heard(Hello).bundle == one.bundle)
    assert serving.active == one.bundle
    calls = list(serving.calls)
    town.want(two, "d2")
    assert town.heard(RolledBack, 2) == word, "the wish that stands is answered, not obeyed"
    assert serving.calls == calls
    agent.give_up(one.bundle, WHY)
    town.want(two, "d2")
    town.heard(RolledBack, 3)
    assert serving.active == one.bundle
    town.want(town.fleet.publish(3), "d3")
    eventually(lambda: town.heard(Installed).version == 3)


def test_a_download_waits_for_the_retreat_and_goes_on(town):
    one, two, three = (town.fleet.publish(version) for version in (1, 2, 3))
    serving = Serving()
    agent = town.agent(serving)
    town.want(one)
    town.heard(Installed)
    town.want(two, "d2")
    eventually(lambda: town.heard(Installed).version == 2)
    begun, go_on = threading.Event(), threading.Event()

    def hold(what, done, total):
        begun.set()
        assert go_on.wait(10)

    agent.progress = hold
    town.want(three, "d3")
    assert begun.wait(10)
    agent.give_up(two.bundle, WHY)
    go_on.set()
    assert town.heard(RolledBack).version == 2
    eventually(lambda: town.heard(Installed).version == 3)
    steps = [digest for name, digest in serving.calls if name == "activate"]
    assert steps[-3:] == [two.bundle, one.bundle, three.bundle]


def test_a_disk_that_is_full_in_a_retreat_does_not_end_the_agent(town, monkeypatch):
    one, two = town.fleet.publish(1), town.fleet.publish(2)
    agent = town.agent()
    town.want(one)
    town.heard(Installed)
    town.want(two, "d2")
    eventually(lambda: town.heard(Installed).version == 2)
    tried = threading.Event()

    def full(*_):
        tried.set()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(slots, "save", full)
        agent.give_up(two.bundle, WHY)
        assert tried.wait(10)
    agent.give_up(two.bundle, WHY)
    assert town.heard(RolledBack).version == 2

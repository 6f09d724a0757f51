"""The agent's life, told over memory, the embedded broker and Mosquitto."""

import itertools
import threading
import time
from dataclasses import replace
from datetime import timedelta

import msgspec
import pytest
from fakes.brokers import KINDS, Mosquitto, running
from fakes.fleets import FLEET, NOW, Fleet, Serving, eventually, install, wish

from edgekit import bundle
from edgekit.errors import HealthError, ResourceError, TransferError
from edgekit.ota import messages, mqtt
from edgekit.ota.device import agent as agents
from edgekit.ota.device import slots, staging
from edgekit.ota.device import update as updates
from edgekit.ota.device.agent import Agent, Habits, Vitals
from edgekit.ota.device.fetchers import FolderFetcher, Patience
from edgekit.ota.device.slots import Trial
from edgekit.ota.device.update import recover
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import MAX_ALERTS, Alert, Drift, Failed, Health, Hello, Installed, Report, RolledBack

HABITS = Habits(health_seconds=0.05, first_pause=0.05, longest_pause=0.2, will_delay=0, patience=Patience(seconds=1.0))


class Town:
    """A fleet with a server on a broker, one device, and everything the device ever said."""

    def __init__(self, folder, connect, size=2000):
        self.fleet = Fleet(folder / "fleet", size)
        self.folder = folder
        self.connect = connect
        self.server = connect("server")
        self.requests = self.fleet.serve(self.server)
        self.said = []
        for leaf in ("hello", "report"):
            self.server.subscribe(messages.topic(FLEET, "+", leaf), self._hear)
        self.agents = []

    def _hear(self, arrival):
        if arrival.payload:
            self.said.append(messages.decode(arrival.payload, Report))

    def agent(self, serving=None, vitals=None, habits=HABITS):
        device = self.fleet.device(self.folder / "device", serving)
        agent = Agent(FLEET, device, habits, vitals)
        agent.clock = lambda: NOW
        agent.start(lambda will: self.connect("pi-1", will=will))
        self.agents.append(agent)
        return agent

    def want(self, release, deployment="d1", attempt=1):
        payload = messages.encode(wish(release, deployment, attempt)) if release else b""
        self.server.publish(messages.topic(FLEET, "pi-1", "desired"), payload, retain=True)

    def heard(self, kind, count=1):
        return eventually(lambda: len(got := [m for m in list(self.said) if isinstance(m, kind)]) >= count and got)[-1]

    def state(self):
        return slots.load(self.folder / "device")

    def end(self):
        for agent in self.agents:
            agent.stop()


@pytest.fixture(params=KINDS)
def any_town(request, tmp_path):
    with running(request.param, tmp_path) as connect:
        town = Town(tmp_path, connect, size=700_000)
        yield town
        town.end()


@pytest.fixture
def town(tmp_path):
    with running("memory", tmp_path) as connect:
        town = Town(tmp_path, connect)
        yield town
        town.end()


def test_update_arrives_over_the_air_takes_over_and_is_reported(any_town):
    town = any_town
    one, two = town.fleet.publish(1), town.fleet.publish(2)
    serving = Serving()
    agent = town.agent(serving)
    first = town.heard(Hello)
    assert (first.online, first.version, first.device) == (True, 0, "pi-1")
    town.want(one)
    installed = town.heard(Installed)
    assert (installed.version, installed.bundle, installed.measured["p95_ms"]) == (1, one.bundle, 3.5)
    town.want(two, "d2")
    eventually(lambda: town.heard(Installed).version == 2)
    eventually(lambda: town.heard(Hello).bundle == two.bundle)
    assert serving.active == two.bundle
    steps = [name for name, digest in serving.calls if digest == two.bundle]
    assert steps == ["try_out", "activate", "probation"]
    agent.stop()
    town.agents.clear()
    eventually(lambda: not town.heard(Hello).online)


def test_bad_model_is_rolled_back_and_the_old_one_serves_again(any_town):
    town = any_town
    one, two = town.fleet.publish(1), town.fleet.publish(2)
    serving = Serving()
    town.agent(serving)
    town.want(one)
    town.heard(Installed)
    serving.fail_at = "probation"
    town.want(two, "d2")
    word = town.heard(RolledBack)
    assert (word.deployment, word.version) == ("d2", 2)
    assert "probation failed" in word.reason
    assert serving.active == one.bundle
    assert town.state().current == one


def test_tampered_update_is_an_alarm_over_the_air_and_installed_once_its_bytes_are_the_signed_ones(any_town, caplog):
    town = any_town
    one = town.fleet.publish(1)
    sound = {blob: blob.read_bytes() for blob in (town.fleet.repository / "blobs").iterdir()}
    for blob, data in sound.items():
        blob.write_bytes(bytes(len(data)))
    town.agent()
    town.want(one)
    assert "not the signed ones" in town.heard(Failed).reason
    levels = {told.levelname for told in caplog.records if f"ALARM: {one.path} is not installed" in told.message}
    assert levels == {"ERROR"}
    assert town.state().current is None
    for blob, data in sound.items():
        blob.write_bytes(data)
    assert town.heard(Installed).bundle == one.bundle


def test_pauses_after_wrong_bytes_grow_further_than_those_after_a_bad_link(town, monkeypatch):
    """Each time a whole file comes again: whoever sends it must not use up a link that is paid by the byte."""
    pauses, longest = [], 3.0
    monkeypatch.setattr(agents.random, "uniform", lambda _, high: high)
    monkeypatch.setattr(Agent, "_wait_out", lambda _, seconds: pauses.append(seconds))
    one = town.fleet.publish(1)
    blobs = town.fleet.repository / "blobs"
    sound = {blob: blob.read_bytes() for blob in blobs.iterdir()}
    blobs.rename(blobs.with_name("away"))
    town.agent(habits=replace(HABITS, longest_alarm=longest))
    town.want(one)
    eventually(lambda: len(pauses) > 5)
    assert max(pauses) == HABITS.longest_pause
    blobs.with_name("away").rename(blobs)
    for blob, data in sound.items():
        blob.write_bytes(bytes(len(data)))
    eventually(lambda: pauses[-1] == longest)
    assert max(pauses) == longest
    for blob, data in sound.items():
        blob.write_bytes(data)
    assert town.heard(Installed).bundle == one.bundle


def test_device_that_was_away_finds_its_wish_when_it_comes(any_town):
    one = any_town.fleet.publish(1)
    any_town.want(one)
    any_town.agent()
    assert any_town.heard(Installed).version == 1


@pytest.mark.attack("poisoned retained message")
def test_poisoned_retained_message_is_dropped_counted_and_harmless(any_town):
    town = any_town
    one = town.fleet.publish(1)
    town.server.publish(messages.topic(FLEET, "pi-1", "desired"), b'{"deployment": "../x"', retain=True)
    agent = town.agent()
    eventually(lambda: agent.dropped == 1)
    town.want(one)
    assert town.heard(Installed).version == 1


def test_try_out_that_fails_never_touches_what_serves(town):
    one, two = town.fleet.publish(1), town.fleet.publish(2)
    serving = Serving()
    town.agent(serving)
    town.want(one)
    town.heard(Installed)
    serving.calls.clear()
    serving.fail_at = "try_out"
    town.want(two, "d2")
    town.heard(RolledBack)
    assert [name for name, _ in serving.calls] == ["try_out"]


def test_bundle_that_cannot_take_over_gives_way_to_the_old_one(town):
    one, two = town.fleet.publish(1), town.fleet.publish(2)
    serving = Serving()
    town.agent(serving)
    town.want(one)
    town.heard(Installed)
    serving.fail_at = "activate"
    town.want(two, "d2")
    town.heard(RolledBack)
    assert serving.active == one.bundle


def test_first_bundle_that_fails_leaves_a_device_that_serves_nothing(town):
    serving = Serving(fail_at="probation")
    town.agent(serving)
    town.want(town.fleet.publish(1))
    town.heard(RolledBack)
    assert serving.active is None
    assert town.state().current is None


def test_release_that_failed_three_times_is_not_tried_again_but_a_newer_one_is(town):
    bad = town.fleet.publish(1)
    serving = Serving()
    town.agent(serving)
    for attempt in range(1, 4):
        serving.fail_at = "probation"
        town.want(bad, attempt=attempt)
        town.heard(RolledBack, attempt)
    serving.calls.clear()
    town.want(bad, attempt=4)
    assert "not tried again" in town.heard(RolledBack, 4).reason
    assert serving.calls == []
    town.want(town.fleet.publish(2), "d2")
    assert town.heard(Installed).version == 2


def test_same_wish_twice_is_work_once_and_the_same_word_twice(town):
    one = town.fleet.publish(1)
    serving = Serving()
    agent = town.agent(serving)
    town.want(one)
    town.heard(Installed)
    agent.stop()
    town.agents.clear()
    calls = [c for c in serving.calls if c[0] == "probation"]
    town.agent(serving)
    town.heard(Installed, 2)
    assert [c for c in serving.calls if c[0] == "probation"] == calls
    words = [m for m in town.said if isinstance(m, Installed)]
    assert words[0] == words[1]


def test_cleared_wish_is_no_wish(town):
    town.want(town.fleet.publish(1))
    town.want(None)
    serving = Serving()
    agent = town.agent(serving)
    town.want(None)
    time.sleep(0.1)
    assert agent.dropped == 0
    assert [name for name, _ in serving.calls] == ["activate"]


def test_latest_wish_wins_over_one_that_is_still_coming(tmp_path):
    broker = MemoryBroker()
    town = Town(tmp_path, broker.connect, size=3_000_000)
    one, two = town.fleet.publish(1), town.fleet.publish(2)
    serving = Serving()
    agent = town.agent(serving)
    started, go_on = threading.Event(), threading.Event()

    def hold(what, done, total):
        if not started.is_set():
            started.set()
            assert go_on.wait(10)

    agent.progress = hold
    town.want(one)
    assert started.wait(10)
    town.want(two, "d2")
    time.sleep(0.05)
    go_on.set()
    assert town.heard(Installed).version == 2
    assert one.bundle not in [digest for name, digest in serving.calls if name == "try_out"]
    assert not [m for m in town.said if isinstance(m, Failed)]
    town.end()


def test_failed_transfer_is_reported_and_tried_again_until_it_works(town):
    one = town.fleet.publish(1)
    blobs = town.fleet.repository / "blobs"
    blobs.rename(blobs.with_name("elsewhere"))
    town.agent()
    town.want(one)
    assert "no blobs/" in town.heard(Failed, 2).reason
    blobs.with_name("elsewhere").rename(blobs)
    assert town.heard(Installed).version == 1


def test_full_disk_is_reported_and_tried_again(town, monkeypatch):
    one = town.fleet.publish(1)
    full = [True]

    def require(folder, size):
        if full[0]:
            raise ResourceError(f"{folder} has 0 bytes free", "free some")

    monkeypatch.setattr(staging, "require_space", require)
    town.agent()
    town.want(one)
    assert "bytes free" in town.heard(Failed).reason
    full[0] = False
    town.heard(Installed)


def test_read_only_disk_is_a_failure_and_no_crash(town, monkeypatch):
    town.fleet.publish(1)

    def refuse(*_):
        raise OSError(30, "Read-only file system", "bundles")

    with monkeypatch.context() as broken:
        broken.setattr(slots, "adopt", refuse)
        town.agent()
        town.want(town.fleet.publish(2))
        assert "Read-only" in town.heard(Failed).reason
    town.heard(Installed)


def test_bug_in_the_serving_does_not_end_the_agent(town):
    one, two = town.fleet.publish(1), town.fleet.publish(2)

    class Buggy(Serving):
        bugs = 1

        def try_out(self, bundle, release):
            if self.bugs:
                self.bugs -= 1
                raise ZeroDivisionError("a bug")
            return super().try_out(bundle, release)

    town.agent(Buggy())
    town.want(one)
    assert town.heard(Installed).version == 1
    town.want(two, "d2")
    eventually(lambda: town.heard(Installed).version == 2)


@pytest.mark.parametrize(("bugs", "end"), [(1, Installed), (2, RolledBack)])
def test_probation_that_a_bug_cut_short_is_taken_up_again_but_not_for_ever(town, bugs, end):
    one, two = town.fleet.publish(1), town.fleet.publish(2)

    class Buggy(Serving):
        bugs = 0
        passed = 0

        def probation(self, release):
            if self.bugs:
                self.bugs -= 1
                raise ZeroDivisionError("a bug")
            self.passed += 1
            return super().probation(release)

    serving = Buggy()
    town.agent(serving)
    town.want(one)
    town.heard(Installed)
    serving.bugs = bugs
    town.want(two, "d2")
    eventually(lambda: town.heard(end).deployment == "d2")
    assert serving.passed == (2 if end is Installed else 1)
    assert serving.active == (two if end is Installed else one).bundle
    assert town.state().trial is None


def test_unmeasurable_values_do_not_spoil_the_report(town):
    class Odd(Serving):
        def probation(self, release):
            return {"nan": float("nan"), "inf": float("inf"), "fine": 1}

    town.agent(Odd())
    town.want(town.fleet.publish(1))
    measured = town.heard(Installed).measured
    assert measured.pop("downloaded_bytes") > 0
    assert measured == {"golden_sqnr_db": 40.0, "fine": 1.0}


def test_health_is_told_while_something_serves(town):
    town.agent(vitals=lambda: Vitals(requests=10, errors=1, p95_ms=2.5, rss_mib=40.0))
    one = town.fleet.publish(1)
    town.want(one)
    word = town.heard(Health, 2)
    assert (word.bundle, word.requests, word.errors, word.p95_ms) == (one.bundle, 10, 1, 2.5)


def test_alerts_are_told_with_the_health_and_so_is_that_they_passed(town):
    stands = []
    town.agent(vitals=lambda: Vitals(requests=1, errors=0, p95_ms=1.0, alerts=tuple(stands)))
    town.want(town.fleet.publish(1))
    town.heard(Health, 3)
    assert not any(isinstance(word, Drift) for word in town.said)
    alert = Alert(kind="input-drift", what="image: spread", value=0.6, limit=0.2, since=1.0)
    stands += [alert] * (MAX_ALERTS + 1)
    assert town.heard(Drift, 2).alerts == (alert,) * MAX_ALERTS
    stands.clear()
    eventually(lambda: [word for word in town.said if isinstance(word, Drift)][-1].alerts == ())


def test_will_that_comes_although_the_device_is_back_is_corrected(town):
    agent = town.agent()
    town.heard(Hello)
    offline = messages.encode(agent._hello(online=False))
    town.server.publish(messages.topic(FLEET, "pi-1", "hello"), offline, retain=True)
    eventually(lambda: not all(m.online for m in town.said) and town.said[-1].online)
    town.server.publish(messages.topic(FLEET, "pi-1", "hello"), b"garbage", retain=True)
    eventually(lambda: agent.dropped == 1)


def test_second_agent_on_one_state_folder_is_refused(town):
    town.agent()
    with pytest.raises(ResourceError, match="another agent uses"):
        town.agent()


def test_state_that_cannot_be_read_for_a_while_silences_the_agent_for_that_while_only(town):
    one = town.fleet.publish(1)
    town.agent(vitals=lambda: Vitals(requests=1, errors=0, p95_ms=1.0))
    town.want(one)
    town.heard(Installed)
    town.heard(Health)
    state = town.folder / "device" / slots.STATE
    aside = state.rename(state.with_suffix(".aside"))
    state.mkdir()  # reading a folder is an OSError, as when no file handle is left
    town.server.publish(messages.topic(FLEET, "pi-1", "hello"), b"", retain=True)
    time.sleep(0.2)
    state.rmdir()
    aside.rename(state)
    told = len([m for m in town.said if isinstance(m, Health)])
    town.heard(Health, told + 2)
    town.want(town.fleet.publish(2), "d2")
    eventually(lambda: town.heard(Installed).version == 2)


def test_agent_that_finds_no_broker_serves_all_the_same_and_may_try_again(town):
    one = town.fleet.publish(1)
    device = town.fleet.device(town.folder / "device")
    install(town.fleet, device, one)
    device.serving.active = None
    agent = Agent(FLEET, device, HABITS)

    def unreachable(will):
        raise TransferError("no broker")

    with pytest.raises(TransferError):
        agent.start(unreachable)
    assert device.serving.active == one.bundle
    agent.start(lambda will: town.connect("pi-1", will=will))
    agent.stop()


def on_trial(town_or_fleet, folder, serving, starts=0):
    fleet = town_or_fleet
    device = fleet.device(folder, serving)
    one, two = fleet.publish(1), fleet.publish(2)
    install(fleet, device, one)
    install(fleet, device, two, deployment="d2")
    state = slots.load(folder)
    slots.save(folder, slots.on_trial(state, Trial(deployment="d2", attempt=4, starts=starts)))
    serving.calls.clear()
    return device, one, two


def test_probation_that_a_power_cut_ended_is_taken_up_again(tmp_path):
    device, _, two = on_trial(Fleet(tmp_path / "f"), tmp_path / "d", Serving())
    word = recover(device)
    assert isinstance(word, Installed)
    assert (word.deployment, word.attempt, word.version) == ("d2", 4, 2)
    assert [name for name, _ in device.serving.calls] == ["activate", "probation"]
    assert device.serving.active == two.bundle
    assert recover(device) is None


def test_device_that_restarts_again_and_again_in_a_probation_goes_back(tmp_path):
    device, one, two = on_trial(Fleet(tmp_path / "f"), tmp_path / "d", Serving(), starts=1)
    word = recover(device)
    assert isinstance(word, RolledBack)
    assert "interrupted twice" in word.reason
    assert device.serving.active == one.bundle
    assert ("activate", two.bundle) not in device.serving.calls


@pytest.mark.parametrize("step", ["activate", "probation"])
def test_device_that_is_stopped_in_a_probation_in_good_order_counts_no_crash(tmp_path, step):
    class Stopped(Serving):
        stopped = True

        def _step(self, name, digest):
            super()._step(name, digest)
            if name == step and self.stopped:
                raise ResourceError("stopped during the probation")

    device, _, two = on_trial(Fleet(tmp_path / "f"), tmp_path / "d", Serving())
    before = slots.load(tmp_path / "d")
    device = updates.Device("pi-1", device.profile, tmp_path / "d", Stopped())
    for _ in range(3):
        with pytest.raises(ResourceError):
            recover(device)
        assert slots.load(tmp_path / "d") == before
    device.serving.stopped = False
    assert isinstance(recover(device), Installed)
    assert device.serving.active == two.bundle


@pytest.mark.parametrize("fail_at", ["activate", "probation"])
def test_trial_that_misbehaves_after_a_restart_goes_back(tmp_path, fail_at):
    device, one, _ = on_trial(Fleet(tmp_path / "f"), tmp_path / "d", Serving())
    device.serving.fail_at = fail_at
    assert isinstance(recover(device), RolledBack)
    assert device.serving.active == one.bundle


def damage(device, release):
    path = slots.bundle_folder(device.state, release.bundle) / "labels.txt"
    path.unlink()  # a hard link may share the bytes with the other bundle
    path.write_bytes(b"rotten")


def test_damaged_bundle_gives_way_to_the_previous_one_and_is_fetched_anew(tmp_path):
    fleet = Fleet(tmp_path / "f")
    device = fleet.device(tmp_path / "d")
    one, two = fleet.publish(1), fleet.publish(2)
    install(fleet, device, one)
    install(fleet, device, two, deployment="d2")
    damage(device, two)
    word = recover(device)
    assert isinstance(word, RolledBack)
    assert "labels.txt" in word.reason
    assert device.serving.active == one.bundle
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)
    assert device.serving.active == two.bundle


def test_only_bundle_damaged_serves_nothing_and_is_fetched_anew(tmp_path):
    fleet = Fleet(tmp_path / "f")
    device = fleet.device(tmp_path / "d")
    one = fleet.publish(1)
    install(fleet, device, one)
    damage(device, one)
    assert recover(device) is None
    assert device.serving.active is None
    assert isinstance(install(fleet, device, one), Installed)
    assert device.serving.active == one.bundle
    bundle.read(slots.bundle_folder(device.state, one.bundle), one.profile)


def test_old_bundle_that_is_lost_too_leaves_a_device_that_still_reports(tmp_path):
    fleet = Fleet(tmp_path / "f")
    device = fleet.device(tmp_path / "d")
    one, two = fleet.publish(1), fleet.publish(2)
    install(fleet, device, one)
    damage(device, one)
    device.serving.fail_at = "probation"
    word = install(fleet, device, two, deployment="d2")
    assert isinstance(word, RolledBack)
    assert device.serving.active is None
    assert isinstance(install(fleet, device, fleet.publish(3), deployment="d3"), Installed)


def test_update_from_a_stick_needs_no_broker(tmp_path):
    fleet = Fleet(tmp_path / "f")
    device = fleet.device(tmp_path / "d")
    one = fleet.publish(1)
    stick = tmp_path / "stick"
    fleet.repository.rename(stick)
    seen = []
    updates.update(device, wish(one), FolderFetcher(stick), NOW, progress=lambda *step: seen.append(step))
    assert device.serving.active == one.bundle
    assert {what for what, _, _ in seen} == {"labels.txt", f"{one.profile}/model.onnx"}


def test_health_error_keeps_its_words(tmp_path):
    fleet = Fleet(tmp_path / "f")

    class Slow(Serving):
        def probation(self, release):
            raise HealthError(f"p95 91.0 ms is above the signed 50.0 ms; {'x' * 5000}")

    word = install(fleet, fleet.device(tmp_path / "d", Slow()), fleet.publish(1))
    assert word.reason.startswith("p95 91.0 ms is above")
    assert messages.decode(messages.encode(word), Report) == word


def test_a_download_waits_for_the_devices_turn_which_a_restart_does_not_put_off(town):
    one = town.fleet.publish(1)
    spread = msgspec.structs.replace(wish(one), spread=5000.0)
    agent = town.agent()
    town.server.publish(messages.topic(FLEET, "pi-1", "desired"), messages.encode(spread), retain=True)
    eventually(lambda: agent._wanted == spread)
    left = agent._seconds_left()
    assert 60 < left < 5000
    assert town.requests == []
    agent.stop()
    town.agents.clear()
    late = Agent(FLEET, town.fleet.device(town.folder / "device"), HABITS)
    late.clock = lambda: NOW + timedelta(seconds=left + 1)
    late.start(lambda will: town.connect("pi-1", will=will))
    town.agents.append(late)
    assert town.heard(Installed).version == 1


def test_a_device_in_a_hurry_waits_for_no_turn_and_a_new_wish_ends_the_waiting(town):
    one, two = town.fleet.publish(1), town.fleet.publish(2)
    agent = town.agent()
    topic = messages.topic(FLEET, "pi-1", "desired")
    town.server.publish(topic, messages.encode(msgspec.structs.replace(wish(one), spread=5000.0)), retain=True)
    eventually(lambda: agent._wanted is not None)
    town.want(two, "d2")
    assert town.heard(Installed).version == 2
    agent.stop()
    town.agents.clear()
    town.agent(habits=replace(HABITS, hurry=True))
    three = town.fleet.publish(3)
    far = msgspec.structs.replace(wish(three, "d3"), spread=5000.0)
    town.server.publish(topic, messages.encode(far), retain=True)
    eventually(lambda: town.heard(Installed).version == 3)


def test_a_wish_that_is_taken_back_before_its_turn_leaves_an_agent_that_takes_the_next(town):
    one = town.fleet.publish(1)
    agent = town.agent()
    topic = messages.topic(FLEET, "pi-1", "desired")
    late = msgspec.structs.replace(wish(one), spread=5000.0, revision=5)
    town.server.publish(topic, messages.encode(late), retain=True)
    eventually(lambda: agent._wanted == late)
    town.want(None)
    eventually(lambda: agent._wanted is None)
    town.server.publish(topic, messages.encode(msgspec.structs.replace(wish(one, "d2"), revision=6)), retain=True)
    assert town.heard(Installed).deployment == "d2"
    assert all(thread.is_alive() for thread in agent._threads)


def test_reports_of_a_device_whose_broker_is_away_come_later_and_say_how_many_were_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.ota.device.outbox.Outbox.__init__.__defaults__", (3, 1 << 20))
    with Mosquitto(tmp_path) as broker:
        town = Town(tmp_path, lambda name, will=None: mqtt.connect(broker.url, name, will=will))
        install(town.fleet, town.fleet.device(tmp_path / "device"), town.fleet.publish(1))
        habits = replace(HABITS, offline_health_seconds=0.05)
        counted = itertools.count()
        agent = town.agent(vitals=lambda: Vitals(requests=next(counted), errors=0, p95_ms=1.0), habits=habits)
        town.heard(Health)
        broker.stop()
        eventually(lambda: agent._outbox.dropped >= 5)
        broker.start()
        eventually(lambda: [m for m in town.said if isinstance(m, Health)][-1].dropped >= 5, 40)
        told = [m.requests for m in town.said if isinstance(m, Health)]
        assert list(dict.fromkeys(told)) == sorted(set(told))
        town.end()
        town.server.close()


def test_health_of_a_device_that_is_offline_comes_seldom_and_adds_up(town):
    install(town.fleet, town.fleet.device(town.folder / "device"), town.fleet.publish(1))
    asked = []
    habits = replace(HABITS, health_seconds=0.02, offline_health_seconds=3600.0)
    agent = town.agent(vitals=lambda: asked.append(1) or Vitals(requests=1, errors=0, p95_ms=1.0), habits=habits)
    town.heard(Health, 2)
    agent._channel.is_connected = lambda _seconds=0.0: False
    before = len(asked)
    time.sleep(0.5)
    assert len(asked) <= before + 1

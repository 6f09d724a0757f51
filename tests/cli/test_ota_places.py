"""`edgekit ota agent` with a repository on the web, and held to what its flags allow."""

import itertools
import queue
import shutil
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fakes import certificates
from fakes.brokers import free_port
from fakes.bundles import mlp_bundle
from fakes.web import mutual, serving
from test_ota_commands import FAST, agent_arguments, fleet, ota, processes, say, settled

from edgekit.cli.ota import _conditions
from edgekit.cli.ota._device import Place, _first_answer, _Looks
from edgekit.errors import ResourceError, TransferError, UsageError
from edgekit.ota.device.disks import file_system
from edgekit.ota.device.gate import METERED
from edgekit.ota.device.trust import Unproven
from edgekit.ota.messages import Failed

__all__ = ["fleet", "processes"]


@pytest.fixture
def published(fleet, tmp_path):
    ota("publish", fleet, mlp_bundle(tmp_path / "b1").folder, *FAST)
    return fleet


@pytest.fixture
def base(published):
    return agent_arguments(published, "none")[:9]


def shut(now):
    """Return a window that opens an hour from now."""
    start = now + timedelta(hours=1)
    return f"{start:%H:%M}-{start + timedelta(hours=1):%H:%M}Z"


def test_a_repository_on_the_web_is_all_that_a_device_needs(published, base, tmp_path):
    own = certificates.authority(tmp_path / "own")
    certificate, key = own.issue("pi-1")
    with serving(published / "repository", mutual(own)) as web:
        mine = ("--https-ca", own.certificate, "--https-cert", certificate, "--https-key", key)
        document = say(*base, "--repository", web.url, "--once", *mine)
        assert document["report"]["version"] == 1
        broker = ("--broker-ca", own.certificate, "--broker-cert", certificate, "--broker-key", key)
        assert "installed version 1" in ota(*base, "--repository", f"{web.url}/", "--once", *broker).output
        for flags in ((), broker[:2], (*mine, "--https-ca", "system")):
            before = len(web.asked)
            failed = ota(*base, "--repository", web.url, "--once", *flags, code=8)
            assert "broke off at byte 0" in failed.output
            assert len(web.asked) == before


def test_the_newest_version_is_the_one_that_is_signed_and_no_name_of_a_file(published, base, tmp_path):
    folder = published / "repository" / "targets" / "models" / "mlp" / "x86-64"
    (one,) = folder.iterdir()
    shutil.copy(one, folder / f"{'0' * 64}.99.json")
    assert say(*base, "--repository", published / "repository", "--once")["report"]["version"] == 1
    ota("publish", published, mlp_bundle(tmp_path / "b2", seed=2).folder, *FAST)
    with serving(published / "repository") as web:
        assert say(*base, "--repository", web.url, "--once")["report"]["version"] == 2


@pytest.mark.parametrize("place", ["file:///etc", "http://example.com/x", "ftp://x/y", "mqtt://127.0.0.1"])
def test_a_repository_at_another_kind_of_url_is_refused(base, place):
    assert "is no repository" in ota(*base, "--repository", place, "--once", code=2).output


def test_a_web_that_is_not_there_is_told_and_so_is_one_without_a_repository(base, tmp_path):
    assert "broke off" in ota(*base, "--repository", "http://127.0.0.1:1", "--once", code=8).output
    with serving(tmp_path) as web:
        assert "did not come" in ota(*base, "--repository", web.url, "--once", code=8).output


def test_outside_its_window_and_on_a_metered_link_nothing_is_loaded(published, base):
    window = shut(datetime.now(UTC))
    place = ("--repository", published / "repository", "--once")
    done = ota(*base, *place, "--window", window, code=12).output
    assert f"outside the maintenance window {window}" in done
    state = Path(base[2])
    assert not (state / "bundles").exists()
    assert "the link is metered" in ota(*base, *place, "--metered", code=12).output
    assert "the link is metered" in ota(*base, *place, "--metered", "--allow-metered-below", "1k", code=12).output
    (state / METERED).touch()
    assert "the link is metered" in ota(*base, *place, code=12).output
    allowed = ("--metered", "--allow-metered-below", "10M", "--bandwidth", "50M")
    assert "installed version 1" in ota(*base, *place, *allowed).output


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--bandwidth", "fast"), "'fast' is no number of bytes"),
        (("--bandwidth", "0"), "lets nothing come"),
        (("--window", "night"), "no maintenance window"),
        (("--allow-metered-below", "-1"), "no number of bytes"),
        (("--https-cert", "x.pem"), "comes with its key"),
        (("--https-ca", "none.pem"), "none.pem"),
        (("--every", "nan"), "no finite number"),
    ],
)
def test_flags_that_say_nothing_are_refused(published, base, flags, told):
    assert told in ota(*base, "--repository", published / "repository", "--once", *flags, code=2).output


def test_a_state_folder_in_memory_is_refused_unless_it_is_allowed(published, monkeypatch):
    memory = Path("/dev/shm")  # noqa: S108  # that is the point
    if file_system(memory) != "tmpfs":
        pytest.skip("there is no /dev/shm here")
    state = memory / f"edgekit-test-{time.monotonic_ns()}"
    root = published / "repository" / "metadata" / "1.root.json"
    line = ("agent", "--state", state, "--root", root, "--device", "pi", "--target", "x86-64", "--once")
    place = ("--repository", published / "repository")
    try:
        monkeypatch.delenv("EDGEKIT_ALLOW_VOLATILE")
        assert "lies on tmpfs, in memory" in ota(*line, *place, code=12).output
        assert not state.exists()
        assert "installed version 1" in ota(*line, *place, "--allow-volatile").output
    finally:
        shutil.rmtree(state, ignore_errors=True)


def test_sizes_are_read_as_people_write_them():
    assert [_conditions.size(text) for text in ("0", "512", "500k", "1.5M", "2G", " 3k ")] == [
        *(0, 512, 500_000, 1_500_000, 2_000_000_000, 3000)
    ]
    for text in ("", "k", "1kb", "-1", "1e3", "½", "1.2.3"):
        with pytest.raises(UsageError):
            _conditions.size(text)


def test_publish_signs_the_url_that_it_is_given(published, tmp_path):
    sealed = mlp_bundle(tmp_path / "b2", seed=2)
    (release,) = say("publish", published, sealed.folder, "--url", "https://cdn.example/fleet")["releases"]
    assert release["url"] == "https://cdn.example/fleet"
    refused = ota("publish", published, sealed.folder, "--url", "http://cdn.example", code=2).output
    assert "cannot be published" in refused


class Speaker:
    """What a terminal said."""

    def __init__(self):
        self.warned = []

    def warn(self, text):
        self.warned.append(text)


def test_a_device_that_looks_every_so_often_warns_once_of_the_same_trouble_and_goes_on(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    asked = []

    def look():
        asked.append(now[0])
        raise TransferError("no network")

    looks = _Looks(terminal := Speaker(), None, Place("https://x", every=100.0), look)
    for second in range(0, 1000, 10):
        now[0] = float(second)
        looks.look_if_due()
    assert 7 <= len(asked) <= 13
    assert terminal.warned == ["no network"]
    with pytest.raises(TransferError):
        _Looks(terminal, None, Place("/media/stick"), look).look_if_due()


def test_a_place_that_brings_wrong_bytes_is_asked_less_and_less_often_and_as_before_once_they_are_right(monkeypatch):
    now, asked, said = [0.0], [], []
    monkeypatch.setattr("edgekit.cli.ota._device.time.monotonic", lambda: now[0])
    monkeypatch.setattr("edgekit.cli.ota._device.random.uniform", lambda *_: 1.0)
    monkeypatch.setattr(_Looks, "_conclude", lambda _, outcome: said.append(outcome))

    def look():
        asked.append(now[0])
        if now[0] < 20_000:
            raise Unproven("not the signed ones")
        return "installed"

    looks = _Looks(terminal := Speaker(), None, Place("https://x", every=100.0), look)
    for second in range(0, 22_000, 10):
        now[0] = float(second)
        looks.look_if_due()
    pauses = [int(b - a) for a, b in itertools.pairwise(asked)]
    assert pauses[:9] == [200, 400, 800, 1600, 3200, 3600, 3600, 3600, 3600]
    assert set(pauses[9:]) == {100}
    assert terminal.warned == ["not the signed ones"]
    assert said


def test_an_agent_that_runs_once_says_in_the_end_why_no_update_came():
    reports = queue.SimpleQueue()
    reports.put(Failed(device="pi-1", deployment="d", attempt=1, version=2, reason="bytes are not the signed ones"))
    with pytest.raises(TransferError, match=r"finished within 0\.3 s: bytes are not the signed ones"):
        _first_answer(terminal := Speaker(), reports, 0.3, threading.Event())
    assert terminal.warned == ["version 2 did not come and will be tried again: bytes are not the signed ones"]


def test_a_folder_is_looked_at_again_while_the_clock_is_wrong_or_the_disk_full(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr("edgekit.cli.ota._device.time.monotonic", lambda: now[0])

    def look():
        asked.append(now[0])
        raise ResourceError("the clock is wrong")

    looks = _Looks(terminal := Speaker(), None, Place("/media/stick"), look)
    for second in range(0, 130, 10):
        now[0] = float(second)
        looks.look_if_due()
    assert asked == [0.0, 60.0, 120.0]
    assert terminal.warned == ["the clock is wrong"]


@pytest.mark.slow
def test_a_device_without_a_broker_looks_for_new_versions_by_itself(published, base, processes, tmp_path):
    with serving(published / "repository") as web:
        agent = processes("agent", *base, "--repository", web.url, "--every", 1, "--port", 0)
        agent.says("installed version 1")
        ota("publish", published, mlp_bundle(tmp_path / "b2", seed=2, version="2").folder, *FAST)
        agent.says("installed version 2")
        ota("publish", published, mlp_bundle(tmp_path / "b3", seed=3, wrong_golden=True).folder, *FAST)
        agent.says("rolled back version 3")
        web.status = 503
        agent.says("503")
        web.status = 0
        ota("publish", published, mlp_bundle(tmp_path / "b4", seed=4, version="4").folder, *FAST)
        agent.says("installed version 4")
        assert agent.log.read_text().count("rolled back version 3") == 1
        assert agent.end() == 0


@pytest.mark.slow
def test_a_rollout_over_mqtt_with_blobs_from_the_web(fleet, processes, tmp_path):
    port = free_port()
    with serving(fleet / "repository") as web:
        processes("server", "server", fleet, "--port", port).says("is served over")
        ota("publish", fleet, mlp_bundle(tmp_path / "b1").folder, *FAST, "--url", web.url)
        ota("rollout", "start", fleet, "mlp")
        arguments = agent_arguments(fleet, f"mqtt://127.0.0.1:{port}")
        agent = processes("agent", *arguments)
        agent.says("installed version 1")
        assert settled(fleet, "mlp-v1")["reason"] == "1 installed"
        assert {path.split("/")[0] for path, _ in web.asked} == {"blobs"}
        assert agent.end() == 0
        agent = processes("agent2", *arguments, "--repository", web.url, "--window", shut(datetime.now(UTC)))
        agent.says("listens to fleet")
        ota("publish", fleet, mlp_bundle(tmp_path / "b2", seed=2, version="2").folder, *FAST)
        ota("rollout", "start", fleet, "mlp")
        agent.says("version 2 waits: outside the maintenance window")
        deadline = time.monotonic() + 30
        while "outside the maintenance window" not in ota("status", fleet, "--json").output:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert {path.split("/")[0] for path, _ in web.asked} == {"blobs", "metadata", "targets"}


def test_ssl_is_asked_for_tls_12_or_later():
    from edgekit.ota.device.https import trusting
    from edgekit.ota.mqtt import Tls

    assert trusting(Tls()).minimum_version >= ssl.TLSVersion.TLSv1_2
    assert trusting(None) is None

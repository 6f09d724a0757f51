"""The `edgekit ota` commands: a fleet from init to a halted rollout in real processes, and every wrong call."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from click.testing import CliRunner
from fakes.brokers import Mosquitto, free_port
from fakes.bundles import mlp_bundle, null_bundle
from fakes.fleets import PROFILE
from fakes.requests_to import ask
from fakes.steps import sealed, weights

from edgekit.cli import cli
from edgekit.errors import ResourceError, UsageError
from edgekit.ota.device import slots
from edgekit.ota.messages import Alert, Drift, Hello, RolledBack
from edgekit.ota.server import publisher
from edgekit.ota.server.broker import embedded
from edgekit.ota.server.fleet import DeviceState, expect, fold
from edgekit.ota.server.store import Store

FAST = ("--probation-requests", "0", "--probation-seconds", "0")


def ota(*arguments, code=0):
    done = CliRunner().invoke(cli, ["ota", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def say(*arguments):
    return json.loads(ota(*arguments, "--json").stdout)


class Process:
    """A command in a process of its own; its lines can be waited for."""

    def __init__(self, folder, name, *arguments):
        self.log = folder / f"{name}.log"
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edgekit", "ota", *map(str, arguments)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def says(self, text, seconds=60.0, times=1):
        deadline = time.monotonic() + seconds
        while self.log.read_text().count(text) < times:
            assert time.monotonic() < deadline, f"never said {text!r}:\n{self.log.read_text()}"
            assert self.process.poll() is None or text in self.log.read_text(), self.log.read_text()
            time.sleep(0.05)
        return next(line for line in self.log.read_text().splitlines() if text in line)

    def end(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def fleet(tmp_path):
    ota("init", tmp_path / "fleet", "--name", "home")
    return tmp_path / "fleet"


@pytest.fixture
def processes(tmp_path):
    started = []

    def start(name, *arguments):
        started.append(Process(tmp_path, name, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.end(signal.SIGKILL)


def agent_arguments(fleet, url, device="pi-1", target="x86-64"):
    root = fleet / "repository" / "metadata" / "1.root.json"
    head = ("agent", "--state", fleet.parent / device, "--root", root, "--device", device, "--target", target)
    return (*head, "--broker", url, "--fleet", "home")


def settled(fleet, name, seconds=60.0):
    deadline = time.monotonic() + seconds
    while (rollout := say("rollout", "show", fleet, name)["rollout"])["status"] == "running":
        assert time.monotonic() < deadline, rollout
        time.sleep(0.1)
    return rollout


def reached(fleet, name):
    deadline = time.monotonic() + 30
    while not say("rollout", "show", fleet, name)["rollout"]["assigned"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.3)  # what is decided is published at once


@pytest.mark.slow
def test_publish_makes_deltas_and_says_how_long_they_are(fleet, tmp_path):
    made = [sealed(tmp_path / str(version), weights(version)).folder for version in (1, 2, 3)]
    assert say("publish", fleet, made[0])["deltas"] == {}
    told = say("publish", fleet, made[1])["deltas"]
    (delta,) = told[f"models/digits/{PROFILE}/2.json"]
    stored = fleet / "repository" / "deltas" / delta["sha256"]
    assert stored.stat().st_size == delta["size"] < 0.3 * len(weights(2))
    assert say("publish", fleet, made[2], "--deltas", "0")["deltas"] == {}
    table = ota("publish", fleet, made[0], "--deltas", "1").stdout
    (stored,) = {p for p in stored.parent.iterdir() if p != stored}
    assert f"{stored.stat().st_size:,} bytes" in table


def test_a_release_whose_deltas_cannot_be_signed_is_published_all_the_same(fleet, tmp_path, monkeypatch):
    ota("publish", fleet, mlp_bundle(tmp_path / "b1").folder, *FAST)

    def locked(*_, **__):
        raise ResourceError("somebody else writes into the fleet")

    monkeypatch.setattr("edgekit.ota.server.publisher.add_deltas", locked)
    done = ota("publish", fleet, mlp_bundle(tmp_path / "b2", seed=2).folder, *FAST)
    assert "published without deltas: somebody else writes" in done.stderr
    assert [release.version for release in publisher.releases(fleet)] == [1, 2]


def test_a_model_comes_over_the_air_serves_is_replaced_and_a_bad_one_is_halted(fleet, processes, tmp_path):
    good, better = mlp_bundle(tmp_path / "good"), mlp_bundle(tmp_path / "better", seed=2, version="2")
    bad = mlp_bundle(tmp_path / "bad", seed=3, wrong_golden=True)
    port = free_port()
    server = processes("server", "server", fleet, "--port", port)
    server.says("is served over")
    assert "127.0.0.1" in server.says("no access rules")
    ota("publish", fleet, good.folder, *FAST)
    ota("rollout", "start", fleet, "mlp")
    (tmp_path / "tokens").write_text("0123456789-0123456789\n")
    flags = ("--port", 0, "--token-file", tmp_path / "tokens")
    agent = processes("agent", *agent_arguments(fleet, f"mqtt://127.0.0.1:{port}"), *flags)
    agent.says("installed version 1")
    url = agent.says("serving on").split()[-1]
    with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=10) as answer:  # noqa: S310  # our own server
        assert answer.status == 200
    assert ask(url, path="/v2")[0] == 401
    assert ask(url, path="/v2", headers={"Authorization": "Bearer 0123456789-0123456789"})[0] == 200
    assert settled(fleet, "mlp-v1")["reason"] == "1 installed"

    ota("publish", fleet, better.folder, *FAST)
    ota("rollout", "start", fleet, "mlp", 2)
    agent.says("installed version 2")
    assert settled(fleet, "mlp-v2")["status"] == "done"
    ota("publish", fleet, bad.folder, *FAST)
    ota("rollout", "start", fleet, "mlp", 3)
    agent.says("rolled back version 3")
    halted = settled(fleet, "mlp-v3")
    assert halted["status"] == "halted"
    assert "1 of 1 reached devices failed (1 rolled-back), limit 0, in wave 1" in halted["reason"]
    (device,) = say("status", fleet)["devices"]
    assert (device["version"], device["outcome"]) == (2, "rolled-back")
    assert "sqnr_db" in device["reason"]
    assert agent.end() == 0
    assert server.end() == 0


@pytest.mark.slow
def test_server_and_agent_killed_at_any_time_go_on_over_a_real_mosquitto(fleet, processes, tmp_path):
    with Mosquitto(tmp_path) as broker:
        first = mlp_bundle(tmp_path / "b1")
        ota("publish", fleet, first.folder, *FAST)
        ota("rollout", "start", fleet, "mlp")
        arguments = agent_arguments(fleet, broker.url)
        for delay in (0.5, 1.5):
            server = processes("server", "server", fleet, "--broker", broker.url)
            agent = processes("agent", *arguments)
            time.sleep(delay)
            server.end(signal.SIGKILL)
            agent.end(signal.SIGKILL)
        processes("server", "server", fleet, "--broker", broker.url)
        processes("agent", *arguments)
        assert settled(fleet, "mlp-v1")["reason"] == "1 installed"


@pytest.mark.slow
def test_an_agent_that_runs_once_tells_by_its_exit_code_how_it_went(fleet, processes, tmp_path):
    port = free_port()
    url = f"mqtt://127.0.0.1:{port}"
    processes("server", "server", fleet, "--port", port).says("is served over")
    ota("publish", fleet, mlp_bundle(tmp_path / "b1").folder, *FAST)
    once = (*agent_arguments(fleet, url), "--once")
    assert "no update was finished within 0.5 s" in ota(*once, "--timeout", 0.5, code=8).output
    ota("rollout", "start", fleet, "mlp")
    assert "installed version 1" in ota(*once).output
    ota("publish", fleet, mlp_bundle(tmp_path / "b2", wrong_golden=True).folder, *FAST)
    ota("rollout", "start", fleet, "mlp")
    reached(fleet, "mlp-v2")
    assert "rolled back version 2" in ota(*once, code=11).output
    ota("publish", fleet, mlp_bundle(tmp_path / "b3", seed=3).folder, *FAST)
    ota("rollout", "start", fleet, "mlp")
    reached(fleet, "mlp-v3")
    shutil.rmtree(fleet / "repository" / "blobs")
    failed = ota(*once, "--timeout", 3, code=8).output
    assert "version 3 did not come and will be tried again: the repository has no blobs/" in failed


@pytest.mark.slow
def test_an_agent_that_waits_for_its_one_update_ends_at_once_when_it_is_interrupted(fleet, processes):
    with embedded() as url:
        agent = processes("agent", *agent_arguments(fleet, url), "--once", "--timeout", 600)
        agent.says("listens to fleet")
        started = time.monotonic()
        assert agent.end(signal.SIGINT) == 130
        assert time.monotonic() - started < 15


def test_a_name_survives_an_init_that_was_killed_before_it_signed(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("edgekit.ota.server.publisher.init", killed)
        ota("init", tmp_path / "fleet", "--name", "home", code=1)
    assert say("init", tmp_path / "fleet", "--name", "home")["fleet"] == "home"
    assert say("status", tmp_path / "fleet")["fleet"] == "home"


def test_a_stick_updates_a_device_without_any_network(fleet, tmp_path):
    ota("publish", fleet, mlp_bundle(tmp_path / "b1").folder, *FAST)
    stick = tmp_path / "stick"
    shutil.copytree(fleet / "repository", stick)
    root = stick / "metadata" / "1.root.json"
    base = ("agent", "--state", tmp_path / "pi", "--root", root, "--device", "pi", "--target", "x86-64", "--once")
    document = say(*base, "--repository", stick)
    assert (document["report"]["version"], document["report"]["measured"]["requests"]) == (1, 0.0)
    assert "installed version 1" in ota(*base, "--repository", stick).output
    assert "holds no release for jetson" in ota(*base, "--target", "jetson", "--repository", stick, code=2).output
    assert "is no repository" in ota(*base, "--repository", tmp_path, code=2).output
    assert "'a b' cannot name" in ota(*base, "--device", "a b", "--repository", stick, code=2).output
    with slots.lock(tmp_path / "pi"):
        assert "another agent uses" in ota(*base, "--repository", stick, code=12).output

    ota("publish", fleet, mlp_bundle(tmp_path / "b2", seed=2).folder, *FAST)
    shutil.copytree(fleet / "repository", stick, dirs_exist_ok=True)
    digest = publisher_digest(fleet)
    blob = max((stick / "blobs").iterdir(), key=lambda p: p.stat().st_mtime)
    for blob in (stick / "blobs").iterdir():
        blob.write_bytes(bytes(len(blob.read_bytes())))
    told = ota(*base, "--repository", stick, code=10).output
    assert "are not the signed ones" in told
    assert "take a sound one" in told
    assert digest not in [p.name for p in (tmp_path / "pi" / "bundles").iterdir()]
    timestamp = (stick / "metadata" / "timestamp.json").read_bytes()
    (stick / "metadata" / "timestamp.json").write_bytes(timestamp[:-9])
    told = ota(*base, "--repository", stick, code=10).output
    assert "is not to be trusted" in told
    assert "take a sound copy" in told
    shutil.copytree(fleet / "repository", stick, dirs_exist_ok=True)
    assert "installed version 2" in ota(*base, "--repository", stick).output
    ota("publish", fleet, mlp_bundle(tmp_path / "dog", name="dog").folder, *FAST)
    shutil.copytree(fleet / "repository", stick, dirs_exist_ok=True)
    assert "several models (dog, mlp)" in ota(*base, "--repository", stick, code=2).output


def test_a_device_that_was_updated_from_a_stick_may_stay_and_serve(fleet, processes, tmp_path):
    ota("publish", fleet, mlp_bundle(tmp_path / "b1").folder, *FAST)
    base = [*agent_arguments(fleet, "none")[:9], "--repository", fleet / "repository"]
    agent = processes("agent", *base, "--port", free_port(), "--grpc-port", 0)
    agent.says("installed version 1")
    checks = CliRunner().invoke(cli, ["conformance", agent.says("gRPC at").split()[-1]])
    assert checks.exit_code == 0, checks.output
    url = agent.says("serving on").split()[-1]
    with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=10) as answer:  # noqa: S310  # our own server
        assert answer.status == 200
    assert agent.end() == 0


def publisher_digest(fleet):
    return publisher.releases(fleet)[-1].bundle


def test_init_refuses_a_second_fleet_and_an_odd_name(fleet, tmp_path):
    assert "holds a fleet already" in ota("init", fleet, code=2).output
    odd = ota("init", tmp_path / "other", "--name", "a/b", code=2)
    assert "'a/b' is no identifier" in odd.output
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("server",), ("rollout", "list"), ("rollout", "start", "mlp"), ("rollout", "pause", "x")],
)
def test_a_folder_without_a_fleet_is_named_with_the_way_to_make_one(tmp_path, arguments):
    verb, rest = (arguments[:2], arguments[2:]) if arguments[0] == "rollout" else (arguments, ())
    done = ota(*verb, tmp_path / "nowhere", *rest, code=2)
    assert "holds no fleet" in done.output
    assert "edgekit ota init" in done.output
    assert not (tmp_path / "nowhere").exists()


def test_publishing_into_a_mistyped_folder_leaves_nothing_there(tmp_path):
    sealed = mlp_bundle(tmp_path / "b")
    assert "holds no fleet" in ota("publish", tmp_path / "nowhere", sealed.folder, code=2).output
    assert not (tmp_path / "nowhere").exists()


def test_a_release_nobody_published_is_refused_with_the_nearest(fleet, tmp_path):
    ota("publish", fleet, mlp_bundle(tmp_path / "b").folder, "--version", 41, *FAST)
    assert "did you mean mlp?" in ota("rollout", "start", fleet, "mpl", code=2).output
    assert "did you mean 41?" in ota("rollout", "start", fleet, "mlp", 42, code=2).output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--waves", "20%,10%,100%"), "no plan"),
        (("--waves", "much,100%"), "'much' is no share"),
        (("--max-failures", "few"), "'few' is no share"),
        (("--max-failures", "150%"), "no limits"),
        (("--dwell", "-1"), "no limits"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_and_nothing_is_started(fleet, tmp_path, options, told):
    ota("publish", fleet, mlp_bundle(tmp_path / "b").folder, *FAST)
    assert told in ota("rollout", "start", fleet, "mlp", *options, code=2).output
    assert say("rollout", "list", fleet)["rollouts"] == []


def test_publish_tells_its_releases_and_refuses_what_is_wrong(fleet, tmp_path):
    sealed = mlp_bundle(tmp_path / "b")
    limits = ("--max-p95-ms", 20, "--min-agreement", 0.9, "--shadow-requests", 50, "--shadow-seconds", 90)
    document = say("publish", fleet, sealed.folder, *limits, "--model", "digits")
    (release,) = document["releases"]
    assert (release["model"], release["version"], release["profile"]) == ("digits", 1, "x86-64")
    assert (release["limits"]["max_p95_ms"], release["limits"]["min_agreement"]) == (20.0, 0.9)
    assert (release["limits"]["shadow_requests"], release["limits"]["shadow_seconds"]) == (50, 90.0)
    assert (
        "is not above the last one"
        in ota("publish", fleet, sealed.folder, "--model", "digits", "--version", 1, code=2).output
    )
    assert "unknown variant 'pi'" in ota("publish", fleet, sealed.folder, "--target", "pi", code=2).output
    assert "is no bundle" in ota("publish", fleet, tmp_path, code=2).output


def test_rollouts_are_paused_resumed_aborted_listed_and_shown(fleet, tmp_path):
    assert "no rollouts yet" in ota("rollout", "list", fleet).output
    ota("publish", fleet, mlp_bundle(tmp_path / "b").folder, *FAST)
    document = say("rollout", "start", fleet, "mlp", "--waves", "0.1,50%,1", "--max-failures", "10%", "--dwell", 60)
    plan = document["rollout"]["plan"]
    assert (plan["waves"], plan["max_failures"], plan["dwell"]) == ([0.1, 0.5, 1.0], 0.1, 60.0)
    assert "is paused" in ota("rollout", "pause", fleet, "mlp-v1").output
    assert "is running" in ota("rollout", "resume", fleet, "mlp-v1").output
    assert "is running" in ota("rollout", "start", fleet, "mlp", code=2).output
    assert say("rollout", "abort", fleet, "mlp-v1")["rollout"]["status"] == "aborted"
    assert "it is aborted" in ota("rollout", "resume", fleet, "mlp-v1", code=2).output
    assert "did you mean mlp-v1?" in ota("rollout", "show", fleet, "mlp-v2", code=2).output
    shown = ota("rollout", "show", fleet, "mlp-v1").output
    assert "aborted by the operator" in shown
    assert "waves 10%,50%,100%" in shown
    assert "mlp-v1" in ota("rollout", "list", fleet).output


def test_status_shows_what_devices_wrote_without_obeying_it(fleet):
    store = Store(fleet / "fleet.sqlite")
    state = fold(
        DeviceState(id="pi-1"),
        Hello(device="pi-1", profile="pi", boot="b", online=True, release="models/cat/pi/3.json", version=3),
        time.time() - 7300,
    )
    state = expect(state, "cat-v4", 1, "models/cat/pi/4.json")
    evil = "\x1b[2J\x07gone" + "x" * 500
    report = RolledBack(device="pi-1", deployment="cat-v4", attempt=1, version=4, reason=evil)
    alert = Alert(kind="input-drift", what="\x1b[2J", value=0.6, limit=0.2, since=1.0)
    state = fold(state, Drift(device="pi-1", bundle="", alerts=(alert, alert)), time.time() - 7300)
    store.save_devices([fold(state, report, time.time() - 7300), DeviceState(id="pi-2", dropped=12)])
    store.close()
    text = ota("status", fleet).output
    assert "2 devices, 1 online" in text
    assert "cat v3" in text
    assert text.count("input-drift") == 1
    assert "2 h ago" in text
    assert "reports that had no room while their device was offline: pi-2 12" in text
    assert "?[2J?gone" in text
    assert "\x1b" not in text
    assert len(max(text.splitlines(), key=len)) < 220
    told = say("status", fleet)["devices"][0]
    assert told["reason"] == evil
    assert told["alerts"][0] == {"kind": "input-drift", "what": "\x1b[2J", "value": 0.6, "limit": 0.2, "since": 1.0}


def test_watching_goes_on_until_it_is_interrupted(fleet, processes):
    watcher = processes("watch", "status", fleet, "--watch")
    watcher.says("fleet home: 0 devices", times=2)
    assert watcher.end(signal.SIGINT) != 0


@pytest.mark.slow
def test_a_broker_that_is_not_there_is_an_error_unless_a_model_is_installed(fleet, processes, tmp_path, monkeypatch):
    from edgekit.ota import mqtt

    honest = mqtt.connect
    monkeypatch.setattr(mqtt, "connect", lambda *a, **k: honest(*a, **{**k, "patience": 0.5}))
    nowhere = f"mqtt://127.0.0.1:{free_port()}"
    assert "no connection to the broker" in ota("server", fleet, "--broker", nowhere, code=8).output
    assert "no connection to the broker" in ota(*agent_arguments(fleet, nowhere), code=8).output
    assert "is no broker's address" in ota("server", fleet, "--broker", "http://x", code=2).output

    ota("publish", fleet, mlp_bundle(tmp_path / "b").folder, *FAST)
    stick = fleet / "repository"
    base = agent_arguments(fleet, nowhere)
    ota(*base[:9], "--repository", stick, "--once")
    agent = processes("agent", *base, "--port", 0)
    agent.says("the installed model serves, and the agent keeps trying")
    url = agent.says("serving on").split()[-1]
    with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=10) as answer:  # noqa: S310  # our own server
        assert answer.status == 200
    assert agent.end() == 0


def test_a_port_that_is_taken_is_told_at_once(fleet):
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in ota("server", fleet, "--port", port, code=12).output
        arguments = agent_arguments(fleet, "mqtt://127.0.0.1:1")
        assert str(port) in ota(*arguments, "--port", port, code=12).output
        assert str(port) in ota(*arguments, "--port", 0, "--grpc-port", port, code=12).output
    port = free_port()
    assert str(port) in ota(*arguments, "--port", port, "--grpc-port", port, code=12).output
    assert "give --port too" in ota(*arguments, "--grpc-port", 0, code=2).output


def test_an_agent_without_a_root_or_without_a_source_is_told_what_it_needs(fleet, tmp_path):
    head = ("agent", "--state", tmp_path / "pi", "--device", "pi", "--target", "x86-64")
    assert "--root" in ota(*head, "--broker", "mqtt://127.0.0.1:1", code=2).output
    assert "--broker or --repository" in ota(*head, code=2).output
    slip = (*head[:-1], "x86_64", "--broker", "mqtt://127.0.0.1:1")
    assert "did you mean x86-64" in ota(*slip, code=2).output
    both = ("--broker", "mqtt://x", "--repository", tmp_path)
    assert "--broker or --repository" in ota(*head, *both, code=2).output
    assert "not encrypted" in ota(*head, "--broker", "mqtt://far", code=2).output
    assert "not encrypted" in ota("server", fleet, "--broker", "mqtt://far", code=2).output
    note = tmp_path / "note.json"
    note.write_text("{}")
    assert "no root metadata" in ota(*head, "--root", note, "--broker", "mqtt://127.0.0.1:1", code=2).output
    missing = ota(*head, "--root", tmp_path / "none.json", "--broker", "mqtt://127.0.0.1:1", code=2)
    assert "none.json" in missing.output


def test_shares_and_limits_are_read_as_people_write_them():
    from edgekit.cli.ota._fleet import ago
    from edgekit.ota.server.plan import amount, amounts

    assert [amount(t) for t in ("20%", "0.2", " 100% ")] == [0.2, 0.2, 1.0]
    assert [(amount(t), type(amount(t))) for t in ("2", "10%")] == [(2, int), (0.1, float)]
    assert [(one, type(one)) for one in amounts(("1", "50%", "1"))] == [(1, int), (0.5, float), (1.0, float)]
    with pytest.raises(UsageError):
        amount("a lot")
    assert [ago(time.time() - s) for s in (1.2, 300, 400_000)] == ["1 s", "5 min", "5 d"]


def test_a_null_bundle_of_an_unverified_class_needs_to_be_allowed(fleet, tmp_path):
    sealed = null_bundle(tmp_path / "null")
    ota("publish", fleet, sealed.folder, "--allow-unverified")


def test_an_agent_that_waits_without_a_port_holds_neither_a_server_nor_numpy(fleet):
    with embedded() as url:
        arguments = map(str, (*agent_arguments(fleet, url), "--once", "--timeout", "0.1"))
        command = [sys.executable, "-X", "importtime", "-m", "edgekit", "ota", *arguments]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert "no update was finished within 0.1 s" in told
    imported = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    assert "edgekit.ota.device.agent" in imported
    assert not imported & {"edgekit.runtime.server", "numpy", "asyncio"}

"""The generated configuration in a real Mosquitto, against a client that has a certificate and no manners."""

import re
import shutil
import subprocess
import time

import pytest
from fakes.brokers import free_port
from fakes.bundles import mlp_bundle
from fakes.certificates import Authority
from fakes.fleets import eventually
from test_ota_commands import FAST, Process, ota

from edgekit.errors import MessageError, TransferError, UsageError
from edgekit.ota import messages, mqtt

PROGRAM = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
LEAVES = ("hello", "report", "request", "desired", "blocks")


@pytest.fixture
def fleet(tmp_path):
    ota("init", tmp_path / "fleet", "--name", "home")
    ota("group", "add", tmp_path / "fleet", "lab", "pi-1", "pi-2")
    return tmp_path / "fleet"


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture
def broker(fleet, authority, tmp_path):
    """Start what was written; give what connects a client of some name."""
    if PROGRAM is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    certificate, key = authority.issue("127.0.0.1")
    port = free_port()
    files = ("--ca", authority.certificate, "--cert", certificate, "--key", key, "--port", port)
    told = ota("broker-config", fleet, *files).output
    config = fleet / "broker/mosquitto.conf"
    assert f"mosquitto -c {config}" in told
    with config.open("a") as more:
        more.write("user root\n")  # else it gives up root's rights, and may not read this test's folder
    log = (tmp_path / "mosquitto.log").open("wb")
    with log, subprocess.Popen([PROGRAM, "-c", str(config)], stdout=log, stderr=log) as process:
        opened = []

        def connect(name, pair=None, client_id="", patience=10.0):
            tls = mqtt.Tls(authority.certificate, *(pair or authority.issue(name)))
            opened.append(mqtt.connect(f"mqtts://127.0.0.1:{port}", client_id or name, tls=tls, patience=patience))
            return opened[-1]

        connect.url = f"mqtts://127.0.0.1:{port}"
        yield connect
        for channel in opened:
            channel.close()
        process.terminate()


def topic(device, leaf):
    return messages.topic("home", device, leaf)


def test_a_device_and_the_server_reach_each_other_and_nobody_else(broker):
    server, mine, rogue = broker("edgekit-server"), broker("pi-1"), broker("rogue")
    heard = {"server": [], "pi-1": [], "rogue": []}

    def listen(channel, name, *topics):
        for one in topics:
            channel.subscribe(one, lambda arrival: heard[name].append((arrival.topic, arrival.payload)))

    listen(server, "server", *(topic("+", leaf) for leaf in ("hello", "report", "request")))
    listen(mine, "pi-1", *(topic("pi-1", leaf) for leaf in ("desired", "blocks", "hello")))
    listen(rogue, "rogue", "#", "+/+/+/+/+/+", *(topic(who, leaf) for who in ("+", "pi-1") for leaf in LEAVES))
    listen(rogue, "rogue", "$SYS/#", "edgekit/#")
    for leaf in LEAVES:
        rogue.publish(topic("pi-1", leaf), b"rogue", retain=True)
        rogue.publish(topic("nobody", leaf), b"rogue", retain=True)
        rogue.publish(topic("rogue", leaf), b"own", retain=leaf == "hello")
    rogue.publish("edgekit/v1/other/devices/rogue/hello", b"rogue")
    for leaf in ("hello", "report", "request"):
        mine.publish(topic("pi-1", leaf), b"mine", retain=leaf == "hello")
    for leaf in ("desired", "blocks"):
        server.publish(topic("pi-1", leaf), b"theirs", retain=leaf == "desired")
    eventually(lambda: len(heard["server"]) >= 6 and len(heard["pi-1"]) >= 3)
    time.sleep(0.5)  # what must not come has had its time
    theirs = {(topic("pi-1", leaf), b"mine") for leaf in ("hello", "report", "request")}
    assert set(heard["server"]) == theirs | {(topic("rogue", leaf), b"own") for leaf in ("hello", "report", "request")}
    assert set(heard["pi-1"]) == {
        (topic("pi-1", "desired"), b"theirs"), (topic("pi-1", "blocks"), b"theirs"), (topic("pi-1", "hello"), b"mine"),
    }  # fmt: skip
    assert set(heard["rogue"]) <= {(topic("rogue", "hello"), b"own")}


@pytest.mark.attack("client takeover")
def test_nobody_takes_a_connection_over_by_calling_himself_by_its_name(broker):
    mine, got = broker("pi-1"), []
    mine.subscribe(topic("pi-1", "blocks"), got.append)
    rogue = broker("rogue", client_id="pi-1")
    server = broker("edgekit-server", client_id="pi-1")
    eventually(lambda: (server.publish(topic("pi-1", "blocks"), b"still here"), got)[1])
    rogue.publish(topic("pi-1", "hello"), b"rogue")
    assert mine._connected


def test_who_has_no_certificate_of_the_authority_is_not_let_in(broker, tmp_path):
    stranger = Authority(tmp_path / "stranger").issue("pi-1")
    with pytest.raises(TransferError, match="no connection"):
        broker("pi-1", pair=stranger, patience=0.6)
    with pytest.raises(TransferError, match="no connection"):
        mqtt.connect(broker.url, "pi-1", tls=mqtt.Tls(tmp_path / "authority/authority.pem"), patience=0.6)


def test_a_group_is_heard_by_its_devices_and_told_by_the_server_alone(broker):
    server, mine, rogue = broker("edgekit-server"), broker("pi-1"), broker("rogue")
    group, heard = messages.group_topic("home", "lab"), {"pi-1": [], "rogue": []}
    for name, channel in (("pi-1", mine), ("rogue", rogue)):
        for where in (group, messages.group_topic("home", "+"), "edgekit/v1/home/groups/#"):
            channel.subscribe(where, lambda arrival, name=name: heard[name].append(arrival.payload))
    for channel in (mine, rogue):
        with pytest.raises(TransferError, match="refused a message"):
            channel.publish(group, b"forged", retain=True)(5.0)
    server.publish(messages.group_topic("home", "other"), b"for another", retain=True)
    server.publish(group, b"for the lab", retain=True)
    eventually(lambda: heard["pi-1"])
    assert set(heard["pi-1"]) == {b"for the lab"}
    assert heard["rogue"] == []


@pytest.mark.attack("device ids")
@pytest.mark.parametrize("name", ["+", "#", "pi-1/desired"])
def test_a_name_that_is_a_pattern_reads_nobodys_topics(broker, name):
    server, odd, heard = broker("edgekit-server"), broker(name, client_id="odd"), []
    for who in ("+", "pi-1", "#"):
        odd.subscribe(f"edgekit/v1/home/devices/{who}" + ("" if who == "#" else "/desired"), heard.append)
    for _ in range(3):
        server.publish(topic("pi-1", "desired"), b"for pi-1", retain=True)
        time.sleep(0.1)
    assert heard == []


def test_agent_and_server_speak_over_it(broker, fleet, authority, tmp_path):
    ota("publish", fleet, mlp_bundle(tmp_path / "b").folder, *FAST)
    flags = {}
    for name in ("edgekit-server", "pi-1"):
        certificate, key = authority.issue(name)
        pair = ("--broker-cert", certificate, "--broker-key", key)
        flags[name] = ("--broker", broker.url, "--broker-ca", authority.certificate, *pair)
    server = Process(tmp_path, "server", "server", fleet, *flags["edgekit-server"])
    agent = None
    try:
        server.says("is served over")
        root = ("--state", tmp_path / "pi", "--root", fleet / "repository/metadata/1.root.json", "--fleet", "home")
        agent = Process(tmp_path, "agent", "agent", *root, "--device", "pi-1", "--target", "x86-64", *flags["pi-1"])
        agent.says("listens to fleet home")
        eventually(lambda: "pi-1" in ota("status", fleet).output)
        ota("rollout", "start", fleet, "mlp", "--waves", "100%")
        agent.says("installed version 1")
    finally:
        for process in filter(None, (agent, server)):
            process.end()


def test_wrong_words_are_told(fleet, authority, tmp_path):
    certificate, key = authority.issue("127.0.0.1")
    files = ("--ca", authority.certificate, "--cert", certificate, "--key", key)
    assert "holds no fleet" in ota("broker-config", tmp_path, *files, code=2).output
    assert "is no identifier" in ota("broker-config", fleet, *files, "--server-name", "a/b", code=2).output
    assert "does not exist" in ota("broker-config", fleet, "--ca", tmp_path / "gone", *files[2:], code=2).output
    odd = tmp_path / "a\nuser root"
    shutil.copy(key, odd)
    assert "cannot stand in" in ota("broker-config", fleet, *files[:4], "--key", odd, code=2).output
    assert not (fleet / "broker").exists()
    assert (
        "a certificate comes with its key"
        in ota("server", fleet, "--broker", "mqtts://127.0.0.1:1", "--broker-cert", certificate, code=2).output
    )
    assert "speaks no TLS" in ota("server", fleet, "--broker-ca", certificate, code=2).output


def test_the_rules_name_every_topic_that_there_is():
    from edgekit.ota.server import mosquitto

    leaves = set(re.findall(r"/(\w+)$", mosquitto.acl("home", ["edgekit-server"]), re.MULTILINE))
    assert leaves == set(LEAVES)
    with pytest.raises(UsageError, match="is called 'edgekit-server'"):
        mosquitto.acl("home", ["edgekit-server"], {"lab": ["edgekit-server"]})
    for name in ("+", "a/b", "a\nuser root"):
        with pytest.raises((MessageError, UsageError)):
            mosquitto.acl("home", ["edgekit-server"], {"lab": [name]})

"""A device from its first day: provisioned, let in by a real Mosquitto, updated, and locked out when it was stolen."""

import base64
import shutil
import signal
import subprocess

import pytest
from fakes.brokers import free_port
from fakes.bundles import mlp_bundle
from fakes.fleets import eventually
from fakes.kills import run_and_kill
from test_broker_config import PROGRAM, topic
from test_ota_commands import FAST, Process, ota, say

from edgekit.errors import TransferError
from edgekit.ota import identity, mqtt
from edgekit.ota.server import certificates


@pytest.fixture
def fleet(tmp_path):
    ota("init", tmp_path / "fleet", "--name", "home")
    return tmp_path / "fleet"


@pytest.fixture
def broker(fleet, tmp_path):
    """A Mosquitto with what `provision` and `broker-config` wrote, and nothing else."""
    if PROGRAM is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    port = free_port()
    ota("provision", fleet, "localhost", "--as", "broker", "--host", "127.0.0.1", "-o", tmp_path / "broker")
    ota("broker-config", fleet, "--identity", tmp_path / "broker", "--port", port)
    config = fleet / "broker" / "mosquitto.conf"
    assert f"crlfile {fleet / 'revoked.pem'}" in config.read_text()
    with config.open("a") as more:
        more.write("user root\n")  # else it gives up root's rights, and may not read this test's folder
    log = (tmp_path / "mosquitto.log").open("wb")
    with log, subprocess.Popen([PROGRAM, "-c", str(config)], stdout=log, stderr=log) as process:
        process.url = f"mqtts://127.0.0.1:{port}"
        yield process
        process.terminate()


def provision(fleet, name, folder, *more):
    return say("provision", fleet, name, "-o", folder, *more)


def connect(broker, folder, patience=10.0):
    tls = mqtt.Tls(folder / identity.AUTHORITY, folder / identity.CERTIFICATE, folder / identity.KEY)
    return mqtt.connect(broker.url, folder.name, tls=tls, patience=patience)


@pytest.mark.slow
def test_agent_and_server_start_from_what_they_were_given_and_update(broker, fleet, tmp_path):
    ota("publish", fleet, mlp_bundle(tmp_path / "b").folder, *FAST)
    provision(fleet, "edgekit-server", tmp_path / "server", "--as", "server")
    provision(fleet, "pi-1", tmp_path / "pi-1", "--profile", "x86-64", "--broker", broker.url, "--group", "canary")
    server = Process(tmp_path, "server", "server", fleet, "--broker", broker.url, "--identity", tmp_path / "server")
    agent = None
    try:
        server.says("is served over")
        agent = Process(tmp_path, "agent", "agent", "--state", tmp_path / "state", "--identity", tmp_path / "pi-1")
        agent.says("pi-1 (x86-64) listens to fleet home")
        eventually(lambda: "pi-1" in ota("status", fleet).output)
        assert say("status", fleet)["devices"][0]["groups"] == {"canary": 0}
        ota("rollout", "start", fleet, "mlp", "--waves", "100%")
        agent.says("installed version 1")
    finally:
        for process in filter(None, (agent, server)):
            process.end()


def test_identity_says_the_groups_that_a_device_is_in(fleet, tmp_path):
    ota("group", "add", fleet, "north", "pi-1", "pi-2")
    told = ota("provision", fleet, "pi-1", "-o", tmp_path / "pi-1", "--profile", "x86-64", "--group", "canary").output
    assert "let Mosquitto read its rules again" in told
    assert identity.read(tmp_path / "pi-1").groups == ("canary", "north")
    groups = say("group", "list", fleet)["groups"]
    assert {name: one["members"] for name, one in groups.items()} == {"canary": ["pi-1"], "north": ["pi-1", "pi-2"]}
    refused = ota("provision", fleet, "pi-3", "-o", tmp_path / "pi-3", "--profile", "x86-64", "--group", "a/b", code=2)
    assert "malformed" in refused.output
    assert not (tmp_path / "pi-3").exists()
    assert "a/b" not in say("group", "list", fleet)["groups"]


def test_revoked_device_is_let_in_no_longer(broker, fleet, tmp_path):
    for name in ("pi-1", "pi-2"):
        provision(fleet, name, tmp_path / name, "--profile", "x86-64")
        connect(broker, tmp_path / name).close()
    assert "SIGHUP" in ota("revoke", fleet, "--device", "pi-1").output
    broker.send_signal(signal.SIGHUP)

    def is_shut_out():
        try:
            connect(broker, tmp_path / "pi-1", patience=0.5).close()
        except TransferError:
            return True
        return False

    eventually(is_shut_out)
    connect(broker, tmp_path / "pi-2").close()
    provision(fleet, "pi-1", tmp_path / "anew", "--profile", "x86-64")  # a new certificate for its owner
    connect(broker, tmp_path / "anew").close()


def test_the_brokers_certificate_lets_nobody_in_as_a_client(broker, fleet, tmp_path):
    with pytest.raises(TransferError, match="no connection"):
        connect(broker, tmp_path / "broker", patience=0.6)


def test_key_that_was_made_on_the_device_never_leaves_it(broker, fleet, tmp_path):
    key, request = tmp_path / "key.pem", tmp_path / "pi-3.csr"
    new = ["openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    subprocess.run([*new, "-keyout", key, "-out", request, "-subj", "/CN=pi-3"], check=True, capture_output=True)
    told = provision(fleet, "pi-3", tmp_path / "pi-3", "--profile", "x86-64", "--csr", request)
    assert identity.KEY not in told["files"]
    assert not (tmp_path / "pi-3" / identity.KEY).exists()
    shutil.copy(key, tmp_path / "pi-3" / identity.KEY)
    channel = connect(broker, tmp_path / "pi-3")
    got = []
    channel.subscribe(topic("pi-3", "hello"), got.append)
    eventually(lambda: (channel.publish(topic("pi-3", "hello"), b"here"), got)[1])
    channel.close()


def request(folder, *flags, subject="/CN=pi-1"):
    made = ["openssl", "req", "-new", *flags, "-nodes", "-keyout", folder / "k", "-out", folder / "csr"]
    subprocess.run([*made, "-subj", subject], check=True, capture_output=True)
    return folder / "csr"


def test_request_that_is_not_what_it_says_is_refused(fleet, tmp_path):
    strong = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    arguments = ("provision", fleet, "pi-1", "--profile", "x86-64", "-o", tmp_path / "o", "--csr")
    assert "is for pi-2" in ota(*arguments, request(tmp_path, *strong, subject="/CN=pi-2"), code=2).output
    assert "is weak" in ota(*arguments, request(tmp_path, "-newkey", "rsa:1024"), code=2).output
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\xff nothing")
    assert "no certificate request" in ota(*arguments, garbage, code=2).output
    honest = request(tmp_path, *strong).read_text().splitlines()
    forged = bytearray(base64.b64decode("".join(honest[1:-1])))
    forged[-1] ^= 1
    garbage.write_text("\n".join([honest[0], base64.b64encode(forged).decode(), honest[-1]]) + "\n")
    assert "not signed by its own key" in ota(*arguments, garbage, code=10).output
    assert not (tmp_path / "o").exists()
    assert certificates.read_ledger(fleet) == []


@pytest.mark.parametrize("name", ["+", "#", "a/b", "", "x" * 65, "a\n"])
def test_name_that_could_change_a_topic_is_certified_for_nobody(fleet, tmp_path, name):
    for part in ("device", "server"):
        arguments = ("provision", fleet, name, "--as", part, "--profile", "x86-64", "-o", tmp_path / "o")
        assert "identifier" in ota(*arguments, code=2).output or "malformed" in ota(*arguments, code=2).output
    assert certificates.read_ledger(fleet) == []


def test_no_device_gets_the_rights_of_the_server_or_the_broker(fleet, tmp_path):
    device = ("--profile", "x86-64", "-o", tmp_path / "o")
    assert "name of the server" in ota("provision", fleet, "edgekit-server", *device, code=2).output
    provision(fleet, "head", tmp_path / "head", "--as", "server")
    assert "name of the server" in ota("provision", fleet, "head", *device, code=2).output
    provision(fleet, "localhost", tmp_path / "broker", "--as", "broker")
    assert "name of the broker" in ota("provision", fleet, "localhost", *device, code=2).output
    provision(fleet, "pi-1", tmp_path / "pi-1", "--profile", "x86-64")
    assert "name of the device" in ota("provision", fleet, "pi-1", "--as", "server", *device, code=2).output
    assert not (tmp_path / "o").exists()


def test_wrong_words_are_told(fleet, tmp_path):
    assert "holds no fleet" in ota("provision", tmp_path, "pi", "--profile", "x", "-o", tmp_path / "o", code=2).output
    assert "hardware class" in ota("provision", fleet, "pi", "-o", tmp_path / "o", code=2).output
    assert "is there already" in ota("provision", fleet, "pi", "--profile", "x", "-o", fleet, code=2).output
    assert "unknown device 'pi'" in ota("revoke", fleet, "--device", "pi", code=2).output
    agent = ("agent", "--state", tmp_path / "s")
    assert "Missing option" in ota(*agent, code=2).output
    provision(fleet, "edgekit-server", tmp_path / "server", "--as", "server")
    assert "Missing option" in ota(*agent, "--identity", tmp_path / "server", code=2).output
    (tmp_path / "server" / identity.FILE).write_bytes(b'{"fleet": "+"}')
    assert "is malformed" in ota(*agent, "--identity", tmp_path / "server", code=2).output


def test_stick_updates_a_provisioned_device_without_its_broker(fleet, tmp_path):
    ota("publish", fleet, mlp_bundle(tmp_path / "b").folder, *FAST)
    ota("rotate", fleet, "root")  # the device is given the newest root
    provision(fleet, "pi-1", tmp_path / "pi-1", "--profile", "x86-64", "--broker", "mqtts://127.0.0.1:1")
    agent = ("agent", "--state", tmp_path / "state", "--identity", tmp_path / "pi-1", "--once")
    assert "installed version 1" in ota(*agent, "--repository", fleet / "repository").output
    assert (tmp_path / "state" / "root.json").read_bytes() == (fleet / "repository/metadata/2.root.json").read_bytes()


def test_what_was_written_is_for_its_owner_only_and_holds_no_key_of_the_fleet(fleet, tmp_path):
    provision(fleet, "pi-1", tmp_path / "pi-1", "--profile", "x86-64")
    assert (tmp_path / "pi-1" / identity.KEY).stat().st_mode & 0o777 == 0o600
    theirs = {path.read_bytes() for path in (fleet / "keys").iterdir()}
    assert not theirs & {path.read_bytes() for path in (tmp_path / "pi-1").iterdir()}
    (entry,) = certificates.read_ledger(fleet)
    told = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "pi-1" / identity.CERTIFICATE, "-noout", "-serial", "-subject", "-ext",
         "extendedKeyUsage"], check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert int(told.split("serial=")[1].split()[0], 16) == int(entry.serial, 16)
    assert "CN = pi-1" in told
    assert "TLS Web Client Authentication" in told
    verify = ["openssl", "verify", "-CAfile", tmp_path / "pi-1" / identity.AUTHORITY, "-x509_strict"]
    subprocess.run([*verify, tmp_path / "pi-1" / identity.CERTIFICATE], check=True, capture_output=True)


def test_authority_key_is_asked_for_where_it_is_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_PASSPHRASE", "correct horse battery")
    fleet, away = tmp_path / "fleet", tmp_path / "away"
    ota("init", fleet, "--offline-keys", away)
    stick = away.rename(tmp_path / "stick")
    arguments = ("provision", fleet, "pi-1", "--profile", "x86-64", "-o", tmp_path / "pi-1")
    assert "authority key is missing" in ota(*arguments, code=10).output
    assert not (tmp_path / "pi-1").exists()
    ota(*arguments, "--keys", stick)
    assert (tmp_path / "pi-1" / identity.CERTIFICATE).exists()


def test_stolen_authority_is_replaced_and_what_it_certified_is_good_no_more(fleet, tmp_path):
    provision(fleet, "pi-1", tmp_path / "old", "--profile", "x86-64")
    assert say("revoke", fleet, "authority")["authority"] == "file:keys/authority-v2.pem"
    provision(fleet, "pi-1", tmp_path / "new", "--profile", "x86-64")
    assert say("revoke", fleet, "authority")["authority"] == "file:keys/authority-v3.pem"
    provision(fleet, "pi-1", tmp_path / "newer", "--profile", "x86-64")
    folders = [tmp_path / name for name in ("old", "new", "newer")]
    for ours, theirs in ((a, b) for a in folders for b in folders):
        verify = ["openssl", "verify", "-CAfile", ours / identity.AUTHORITY, theirs / identity.CERTIFICATE]
        assert (subprocess.run(verify, check=False, capture_output=True).returncode == 0) == (ours == theirs)


@pytest.mark.slow
def test_kill_at_any_step_of_provisioning_leaves_no_certificate_that_could_not_be_revoked(fleet, tmp_path):
    arguments = ("--profile", "x86-64")
    for at in range(1, 200):
        copy, folder = tmp_path / f"copy-{at}", tmp_path / f"pi-{at}"
        shutil.copytree(fleet, copy)
        killed = run_and_kill(lambda copy=copy, folder=folder: provision(copy, "pi-1", folder, *arguments), at)
        if folder.exists():
            assert len(certificates.read_ledger(copy)) == 1
            assert len(list(folder.iterdir())) == 5
        provision(copy, "pi-1", tmp_path / f"again-{at}", *arguments)
        verify = [
            "openssl",
            "verify",
            "-CAfile",
            copy / "authority.pem",
            "-CRLfile",
            copy / "revoked.pem",
            "-crl_check",
        ]
        subprocess.run([*verify, tmp_path / f"again-{at}" / identity.CERTIFICATE], check=True, capture_output=True)
        if not killed:
            break
    assert at > 15

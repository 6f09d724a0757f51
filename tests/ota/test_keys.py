"""Custody of private keys: encrypted at rest, in a file, the environment or a PKCS#11 device, seen by one room only."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from fakes.fleets import NOW, Fleet, install

import edgekit.ota
from edgekit.errors import MissingExtra, TrustError, UsageError
from edgekit.ota.messages import Installed
from edgekit.ota.server import keys, metadata, publisher, roots
from edgekit.ota.server.keys import Custody, KeyAway, Unlock
from edgekit.ota.server.publisher import Keeping

SECRET = "correct horse battery"
SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path / "fleet")


def knows(secret):
    return Unlock(ask=lambda _: secret)


def test_only_one_room_sees_a_private_key():
    words = ("private_key", "private_bytes", "CryptoSigner", "generate_private", "from_priv_key_uri", ".sign(")
    rooms = Path(edgekit.ota.__file__).parent
    seen = {
        path.relative_to(rooms).as_posix()
        for path in rooms.rglob("*.py")
        if any(word in path.read_text() for word in words)
    }
    assert seen == {"server/keys.py", "server/draft.py"}  # which hands payloads to signers and holds none
    assert "import CryptoSigner" not in (rooms / "server" / "draft.py").read_text()


def test_encrypted_keys_open_with_their_passphrase_and_nothing_else(tmp_path):
    folder = tmp_path / "fleet"
    publisher.init(folder, NOW, Keeping(encrypt=True), knows(SECRET))
    assert (folder / "keys" / "authority.pem").exists()
    for pem in (folder / "keys").iterdir():
        assert pem.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        assert pem.stat().st_mode & 0o777 == 0o600
    for unlock, words in [(keys.CLOSED, "is locked"), (knows("something else"), "does not open")]:
        with pytest.raises(KeyAway, match=words):
            publisher.refresh(folder, NOW, unlock)
    publisher.refresh(folder, NOW, knows(SECRET))
    assert metadata.read(folder, "timestamp").signed.version == 2
    change = roots.rotate(Custody(folder, knows(SECRET)), ["timestamp"], NOW)
    assert change.made == ["file:keys/timestamp-v2.pem?encrypted"]
    assert (folder / "keys" / "timestamp-v2.pem").read_bytes().startswith(b"-----BEGIN ENCRYPTED")


def test_offline_keys_are_encrypted_where_nobody_says_otherwise(tmp_path):
    publisher.init(tmp_path / "fleet", NOW, Keeping(offline=tmp_path / "away"), knows(SECRET))
    assert all(b"ENCRYPTED" in pem.read_bytes() for pem in (tmp_path / "away").iterdir())
    assert not any(b"ENCRYPTED" in pem.read_bytes() for pem in (tmp_path / "fleet" / "keys").iterdir())
    publisher.refresh(tmp_path / "fleet", NOW)


def test_short_passphrase_is_refused_before_a_key_is_made(tmp_path):
    with pytest.raises(UsageError, match="4 characters is too short"):
        publisher.init(tmp_path / "fleet", NOW, Keeping(encrypt=True), knows("abcd"))
    assert not (tmp_path / "fleet" / "keys").exists()


@pytest.mark.parametrize(("count", "threshold"), [(2, 3), (1, 0)])
def test_root_that_could_never_be_signed_is_not_made(tmp_path, count, threshold):
    with pytest.raises(UsageError, match="cannot sign"):
        publisher.init(tmp_path / "fleet", NOW, Keeping(root_keys=count, root_threshold=threshold))
    assert not (tmp_path / "fleet").exists()


def test_key_in_the_environment_signs(fleet, tmp_path, monkeypatch):
    monkeypatch.setenv("SNAPSHOT_KEY", (fleet.folder / "keys" / "snapshot.pem").read_text())
    Custody(fleet.folder).make("other", tmp_path, encrypted=False)
    monkeypatch.setenv("FLEET_KEY", (tmp_path / "other.pem").read_text())
    device = fleet.device(tmp_path / "device")
    change = roots.rotate(Custody(fleet.folder), ["timestamp"], NOW, uri="env:FLEET_KEY")
    assert change.made == ["env:FLEET_KEY"]
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)
    assert [row.is_here for row in roots.overview(fleet.folder, NOW) if row.role == "timestamp"] == ["yes"]
    monkeypatch.delenv("FLEET_KEY")
    assert [row.is_here for row in roots.overview(fleet.folder, NOW) if row.role == "timestamp"] == ["no"]
    with pytest.raises(KeyAway, match="environment variable FLEET_KEY is missing"):
        fleet.publish(2)


def test_another_key_at_the_address_is_noticed(fleet):
    shutil.copy(fleet.folder / "keys" / "root.pem", fleet.folder / "keys" / "timestamp.pem")
    with pytest.raises(TrustError, match="holds another key"):
        fleet.publish(1)


def test_key_file_on_a_stick_is_found_by_its_name(fleet, tmp_path):
    (fleet.folder / "keys" / "timestamp.pem").rename(tmp_path / "timestamp.pem")
    with pytest.raises(KeyAway, match="timestamp key is missing") as caught:
        publisher.refresh(fleet.folder, NOW)
    assert "--keys" in caught.value.hint
    publisher.refresh(fleet.folder, NOW, Unlock(folders=(tmp_path,)))


def test_address_that_nobody_knows_is_told_with_those_that_there_are(fleet):
    with pytest.raises(UsageError, match="no address of a key") as caught:
        roots.rotate(Custody(fleet.folder), ["timestamp"], NOW, uri="ftp:x")
    assert "hsm:" in caught.value.hint


def test_damaged_keyring_is_named(fleet):
    for data in (b"{", b"\xff", b'{"keys": 1}', b'{"more": {}}'):
        (fleet.folder / "keyring.json").write_bytes(data)
        with pytest.raises(TrustError, match=r"keyring\.json is damaged"):
            fleet.publish(1)


def test_key_that_nobody_knows_the_place_of_is_told(fleet):
    (fleet.folder / "keyring.json").write_bytes(b"{}")
    with pytest.raises(TrustError, match=r"not in keyring\.json"):
        fleet.publish(1)


@pytest.mark.parametrize("uri", ["hsm:2", "awskms:x", "gcpkms:x"])
def test_device_whose_package_is_missing_is_told_with_the_command_that_brings_it(fleet, uri, monkeypatch):
    from securesystemslib.signer import _aws_signer, _gcp_signer, _hsm_signer

    for module, name in ((_aws_signer, "AWS"), (_gcp_signer, "GCP"), (_hsm_signer, "PKCS11")):
        monkeypatch.setattr(module, f"{name}_IMPORT_ERROR", "not installed")
    with pytest.raises(MissingExtra) as caught:
        roots.rotate(Custody(fleet.folder), ["timestamp"], NOW, uri=uri)
    assert f"edgekit[{uri.partition(':')[0]}]" in caught.value.hint


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    """A PKCS#11 device in software with a P-256 key; its library reads its settings once a process."""
    pkcs11 = pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed (pip install 'edgekit[hsm]')")
    if not SOFTHSM.exists():
        pytest.skip("SoftHSM is not installed (apt-get install softhsm2)")
    folder = tmp_path_factory.mktemp("token")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder / 'tokens'}\nlog.level = ERROR\n")
    before = dict(os.environ)
    os.environ.update(SOFTHSM2_CONF=str(folder / "softhsm2.conf"), PYKCS11LIB=str(SOFTHSM))
    made = ["--init-token", "--free", "--label", "fleet", "--pin", "1234", "--so-pin", "5678"]
    subprocess.run(["softhsm2-util", *made], check=True, capture_output=True)
    from pkcs11 import Attribute, KeyType
    from pkcs11.util.ec import encode_named_curve_parameters

    with pkcs11.lib(str(SOFTHSM)).get_token(token_label="fleet").open(rw=True, user_pin="1234") as session:
        curve = session.create_domain_parameters(
            KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
        )
        curve.generate_keypair(store=True, id=b"\x02", label="timestamp")
    yield "hsm:2?label=fleet"
    os.environ.clear()
    os.environ.update(before)


def test_key_that_never_leaves_a_pkcs11_device_signs_what_devices_verify(fleet, tmp_path, token):
    device = fleet.device(tmp_path / "device")
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)
    change = roots.rotate(Custody(fleet.folder, knows("1234")), ["timestamp"], NOW, uri=token)
    assert change.made == [token]
    (fleet.folder / "keys" / "timestamp.pem").unlink()
    two = fleet.publish(2, unlock=knows("1234"))
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)
    (mine,) = [row for row in roots.overview(fleet.folder, NOW) if row.role == "timestamp"]
    assert (mine.kind, mine.uri) == ("ecdsa-sha2-nistp256", token)
    for unlock, words in [(keys.CLOSED, "nobody gave its PIN"), (knows("9999"), "does not sign")]:
        with pytest.raises(KeyAway, match=words):
            fleet.publish(3, unlock=unlock)


def test_pkcs11_device_that_is_not_there_is_told(fleet, token):
    for uri, pin, words in [
        ("hsm:2?label=lost", "1234", "No PKCS#11 token found"),
        ("hsm:77?label=fleet", "1234", "could not find"),
        ("hsm:77?label=fleet", "9999", "PinIncorrect"),
        ("hsm:two?label=fleet", "1234", "invalid literal"),
    ]:
        with pytest.raises(KeyAway, match=f"cannot be read: .*{words}"):
            roots.rotate(Custody(fleet.folder, knows(pin)), ["timestamp"], NOW, uri=uri)


def test_signature_that_does_not_verify_is_never_published(fleet, monkeypatch):
    from securesystemslib.signer import CryptoSigner, Signature

    before = metadata.place(fleet.folder, "timestamp").read_bytes()
    monkeypatch.setattr(CryptoSigner, "sign", lambda self, _: Signature(self.public_key.keyid, "00" * 64))
    with pytest.raises(KeyAway, match="signs what does not verify"):
        publisher.refresh(fleet.folder, NOW)
    assert metadata.place(fleet.folder, "timestamp").read_bytes() == before

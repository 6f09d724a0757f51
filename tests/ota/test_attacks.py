"""Attacks on a device: what is forged, old, foreign or endless is refused, and what serves goes on serving."""

import hashlib
import json
import re
import shutil
from datetime import timedelta

import pytest
from fakes.fleets import FLEET, NOW, OTHER, PROFILE, Fleet, Serving, install, operator_signs, signer, tiny_bundle, wish
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, TargetFile, Targets

from edgekit.errors import TransferError, UsageError
from edgekit.ota import messages
from edgekit.ota.device import offers, slots
from edgekit.ota.device.agent import Agent
from edgekit.ota.device.fetchers import FolderFetcher
from edgekit.ota.device.trust import Unproven
from edgekit.ota.device.update import update
from edgekit.ota.messages import Desired, Installed, Refused
from edgekit.ota.release import to_custom
from edgekit.ota.server import publisher


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path / "fleet")


@pytest.fixture
def story(fleet, tmp_path):
    """A device on which version 1 serves; version 2 is published but not installed."""
    device = fleet.device(tmp_path / "victim")
    one = fleet.publish(1)
    assert isinstance(install(fleet, device, one), Installed)
    return fleet, device, one, fleet.publish(2)


def refused(story, because, want=None, now=NOW, fetcher=None):
    """Try to install and check that it was refused for that reason, with nothing changed on the device."""
    fleet, device, one, two = story
    device.serving.calls.clear()
    desired = want or wish(two, deployment="attack")
    outcome = update(device, desired, fetcher or FolderFetcher(fleet.repository), now)
    assert isinstance(outcome, Refused), outcome
    assert because in outcome.reason, outcome.reason
    assert device.serving.calls == []
    state = slots.load(device.state)
    assert state.current == one
    assert state.outcome == outcome
    slots.open_current(device.state, state)
    return outcome


def withstood(story, because, want=None, now=NOW, fetcher=None):
    """Try to install and check that the alarm was raised for that reason, with nothing changed on the device."""
    fleet, device, one, two = story
    device.serving.calls.clear()
    before = slots.load(device.state)
    desired = want or wish(two, deployment="attack")
    for _ in range(2):
        with pytest.raises(Unproven) as caught:
            update(device, desired, fetcher or FolderFetcher(fleet.repository), now)
        assert because in caught.value.message, caught.value.message
        assert device.serving.calls == []
        assert slots.load(device.state) == before
    assert before.current == one
    slots.open_current(device.state, before)


def metadata(fleet, name):
    return fleet.repository / "metadata" / f"{name}.json"


def resign(fleet, name, change, key=None):
    """Change signed metadata and sign it, as somebody who has that key would."""
    path = metadata(fleet, name)
    md = Metadata.from_bytes(path.read_bytes())
    change(md.signed)
    md.sign(key or signer(fleet, md.signed.type))
    path.write_bytes(md.to_bytes())
    return path.read_bytes()


def blob_of(fleet, release, path=f"{PROFILE}/model.onnx"):
    manifest = json.loads(
        (fleet.repository / "targets" / f"models/digits/{PROFILE}/{release.bundle}.{release.version}.json").read_bytes()
    )
    entry = next(e for e in manifest["files"] if e["path"] == path)
    return fleet.repository / "blobs" / entry["sha256"]


@pytest.mark.attack("arbitrary software")
def test_tampered_blob_is_refused(story):
    blob = blob_of(story[0], story[3])
    data = bytearray(blob.read_bytes())
    data[1000] ^= 1
    blob.write_bytes(data)
    withstood(story, "not the signed ones")


@pytest.mark.attack("wrong-length target")
@pytest.mark.parametrize("length", [0, 1999], ids=["empty", "one byte short"])
def test_blob_of_wrong_length_is_refused(story, length):
    blob = blob_of(story[0], story[3])
    blob.write_bytes(blob.read_bytes()[:length])
    withstood(story, "not the signed ones")


def test_tampered_manifest_is_refused(story):
    fleet, _, _, two = story
    path = fleet.repository / "targets" / f"models/digits/{PROFILE}/{two.bundle}.2.json"
    path.write_bytes(path.read_bytes().replace(b'"int8"', b'"int4"'))
    withstood(story, "not to be trusted")


@pytest.mark.attack("endless data")
def test_endless_manifest_is_cut_off_and_refused(story):
    fleet, _, _, two = story
    path = fleet.repository / "targets" / f"models/digits/{PROFILE}/{two.bundle}.2.json"
    path.write_bytes(path.read_bytes() + b" " * 5_000_000)
    withstood(story, "more bytes than it signed")


@pytest.mark.attack("endless data")
def test_endless_timestamp_is_cut_off_and_refused(story):
    path = metadata(story[0], "timestamp")
    path.write_bytes(path.read_bytes() + b" " * 100_000)
    withstood(story, "more bytes than it signed")


@pytest.mark.parametrize("name", ["timestamp", "3.snapshot", "2.model-digits"])
def test_tampered_metadata_is_refused(story, name):
    path = metadata(story[0], name)
    data = path.read_bytes()
    assert re.search(rb'"version":[23]', data)
    path.write_bytes(data.replace(b"2026", b"2036").replace(b"2027", b"2037"))
    withstood(story, "not to be trusted")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b"[1]", b'{"signed": {"_type": "root"}, "signatures": []}'])
def test_garbage_for_metadata_is_refused(story, data):
    metadata(story[0], "timestamp").write_bytes(data)
    withstood(story, "not to be trusted")


def test_signature_by_a_foreign_key_is_refused(story):
    resign(story[0], "timestamp", lambda _: None, CryptoSigner.generate_ed25519())
    withstood(story, "not to be trusted")


def test_root_of_another_fleet_is_refused(story, tmp_path):
    other = Fleet(tmp_path / "other")
    for seed in (1, 2):
        other.publish(seed)
    withstood(story, "not to be trusted", fetcher=FolderFetcher(other.repository))


def test_root_rotation_not_signed_by_the_old_root_is_refused(story):
    fleet = story[0]
    shutil.copy(metadata(fleet, "1.root"), metadata(fleet, "2.root"))

    def usurp(root):
        root.version = 2

    resign(fleet, "2.root", usurp, CryptoSigner.generate_ed25519())
    withstood(story, "not to be trusted")


@pytest.mark.attack("rollback: timestamp")
def test_replayed_old_metadata_is_refused(story, tmp_path):
    fleet, device, _, two = story
    old = tmp_path / "old"
    shutil.copytree(fleet.repository, old)
    three = fleet.publish(3)
    assert isinstance(install(fleet, device, three, deployment="d3"), Installed)
    with pytest.raises(Unproven, match="not to be trusted"):
        update(device, wish(two, deployment="attack"), FolderFetcher(old), NOW)
    assert slots.load(device.state).current == three


@pytest.mark.attack("replayed desired state")
def test_replayed_old_wish_does_not_take_the_device_back(story):
    fleet, device, one, two = story
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)
    outcome = install(fleet, device, one, deployment="attack")
    assert isinstance(outcome, Refused)
    assert "back from version 2 to 1" in outcome.reason
    assert slots.load(device.state).current == two


@pytest.mark.attack("freeze")
def test_frozen_repository_is_refused_once_its_timestamp_expired(story):
    withstood(story, "expired", now=NOW + timedelta(days=8))


def test_release_for_another_class_is_refused(story):
    _, _, _, two = story
    path = two.path.replace(PROFILE, OTHER)
    refused(story, "this device is a raspberry-pi-5", Desired(deployment="attack", release=path, version=2))


def test_release_of_another_model_is_refused(story, tmp_path):
    fleet = story[0]
    cats = publisher.publish(fleet.folder, tiny_bundle(tmp_path / "cats", 9, name="cats"), now=NOW, version=9)
    cat = next(r for r in cats if r.profile == PROFILE)
    refused(story, "another model", wish(cat, deployment="attack"))


def test_release_nobody_signed_is_refused(story):
    path = f"models/digits/{PROFILE}/99.json"
    withstood(story, "nobody signed", Desired(deployment="attack", release=path, version=99))


def test_wish_that_lies_about_the_version_is_refused(story):
    refused(story, "announced as version 7", Desired(deployment="attack", release=story[3].path, version=7))


def test_signed_release_that_stands_under_the_path_of_another_is_refused(story):
    fleet, _, one, two = story

    def swap(targets):
        targets.targets[two.path].unrecognized_fields["custom"] = to_custom(one)

    operator_signs(fleet, "digits", swap)
    refused(story, "manifest that is another")


def test_signed_release_under_the_path_of_another_is_not_the_newest(story):
    fleet, device, one, two = story

    def swap(targets):
        targets.targets[two.path].unrecognized_fields["custom"] = to_custom(one)

    assert offers.newest(device.state, FolderFetcher(fleet.repository), PROFILE, NOW) == two
    operator_signs(fleet, "digits", swap)
    assert offers.newest(device.state, FolderFetcher(fleet.repository), PROFILE, NOW) == one


@pytest.mark.parametrize("paths", [["models/cats/*/*"], None], ids=["by path", "by hash"])
def test_role_that_signs_for_a_model_which_is_not_its_own_is_not_heard(story, paths):
    """The key of one model is stolen, and signs a high version of another one."""
    fleet, device, _, two = story
    thief = CryptoSigner.generate_ed25519()
    high = type(two)(model="digits", profile=PROFILE, version=99, bundle=two.bundle)
    stolen = Metadata(Targets(version=1, expires=NOW + timedelta(days=1)))
    stolen.signed.targets[high.path] = TargetFile.from_data(high.path, b"x", ["sha256"])
    stolen.signed.targets[high.path].unrecognized_fields["custom"] = to_custom(high)
    stolen.sign(thief)
    data = stolen.to_bytes()
    metadata(fleet, "1.cats").write_bytes(data)
    elsewhere = "0" if hashlib.sha256(high.path.encode()).hexdigest()[0] != "0" else "1"

    def delegate(targets):
        key = thief.public_key
        prefixes = None if paths else [elsewhere]
        role = DelegatedRole("cats", [key.keyid], 1, terminating=False, paths=paths, path_hash_prefixes=prefixes)
        targets.delegations = Delegations({key.keyid: key}, {"cats": role})

    operator_signs(fleet, "digits", delegate)
    listed = MetaFile.from_data(1, data, ["sha256"])
    snapshot = resign(fleet, "4.snapshot", lambda signed: signed.meta.update({"cats.json": listed}))
    resign(
        fleet, "timestamp", lambda signed: setattr(signed, "snapshot_meta", MetaFile.from_data(4, snapshot, ["sha256"]))
    )
    for model in ("digits", None):
        assert offers.newest(device.state, FolderFetcher(fleet.repository), PROFILE, NOW, model=model) == two


def test_releases_in_roles_of_their_own_are_found_and_only_those_roles_are_read_that_matter(story):
    fleet, device, _, two = story
    key = CryptoSigner.generate_ed25519()
    three = type(two)(model="digits", profile=PROFILE, version=3, bundle=two.bundle)
    listed = {}

    def role(name, release):
        made = Metadata(Targets(version=1, expires=NOW + timedelta(days=1)))
        if release:
            made.signed.targets[release.path] = TargetFile.from_data(release.path, b"x", ["sha256"])
            made.signed.targets[release.path].unrecognized_fields["custom"] = to_custom(release)
        made.sign(key)
        metadata(fleet, f"1.{name}").write_bytes(made.to_bytes())
        listed[f"{name}.json"] = MetaFile.from_data(1, made.to_bytes(), ["sha256"])
        return DelegatedRole(name, [key.public_key.keyid], 1, terminating=True, paths=[f"models/{name}/*/*"])

    roles = {name: role(name, release) for name, release in (("digits", three), ("cats", None))}

    def delegate(targets):
        targets.delegations = Delegations({key.public_key.keyid: key.public_key}, roles)

    operator_signs(fleet, "digits", delegate)
    snapshot = resign(fleet, "4.snapshot", lambda signed: signed.meta.update(listed))
    resign(
        fleet, "timestamp", lambda signed: setattr(signed, "snapshot_meta", MetaFile.from_data(4, snapshot, ["sha256"]))
    )
    metadata(fleet, "1.cats").unlink()
    assert offers.newest(device.state, FolderFetcher(fleet.repository), PROFILE, NOW, model="digits") == three
    with pytest.raises(TransferError):  # whoever names no model reads all of them
        offers.newest(device.state, FolderFetcher(fleet.repository), PROFILE, NOW)


def test_signed_release_that_names_another_bundle_is_refused(story):
    fleet, _, _, two = story

    def lie(targets):
        forged = type(two)(model="digits", profile=PROFILE, version=2, bundle="0" * 64)
        targets.targets[two.path].unrecognized_fields["custom"] = to_custom(forged)

    operator_signs(fleet, "digits", lie)
    refused(story, "manifest that is another")


def sign_content(fleet, two, data):
    digest = TargetFile.from_data("x", data, ["sha256"]).hashes["sha256"]
    forged = type(two)(model="digits", profile=PROFILE, version=2, bundle=digest)

    def put(targets):
        target = TargetFile.from_data(two.path, data, ["sha256"])
        target.unrecognized_fields["custom"] = to_custom(forged)
        targets.targets[two.path] = target

    (fleet.repository / "targets" / f"models/digits/{PROFILE}/{digest}.2.json").write_bytes(data)
    operator_signs(fleet, "digits", put)


def test_signed_garbage_is_refused(story):
    sign_content(story[0], story[3], b'{"format": 1}')
    refused(story, "signed but is unusable")


@pytest.mark.attack("zip-slip")
@pytest.mark.attack("absolute path")
@pytest.mark.parametrize("path", ["../../evil", "/etc/cron.d/evil", "a/../../evil", "manifest.json"])
def test_signed_manifest_with_a_path_out_of_the_folder_is_refused(story, path):
    fleet, device, _, two = story
    data = (fleet.folder / "sealed" / "2" / "manifest.json").read_bytes()
    sign_content(fleet, two, data.replace(b'"labels.txt"', json.dumps(path).encode()))
    refused(story, "signed but is unusable")
    assert not list(device.state.parent.glob("**/evil"))


def test_signed_manifest_without_this_class_is_refused(story):
    fleet, _, _, two = story
    data = (fleet.folder / "sealed" / "2" / "manifest.json").read_bytes()
    sign_content(fleet, two, data.replace(f'"name": "{PROFILE}"'.encode(), b'"name": "other-class"'))
    refused(story, "signed but is unusable")


@pytest.mark.attack("mix-and-match")
def test_mix_and_match_of_old_and_new_metadata_is_refused(story):
    fleet = story[0]
    shutil.copy(metadata(fleet, "1.model-digits"), metadata(fleet, "2.model-digits"))
    withstood(story, "not to be trusted")


def test_snapshot_key_alone_cannot_smuggle_targets_in(story):
    fleet = story[0]
    thief = CryptoSigner.generate_ed25519()
    data = resign(fleet, "2.targets", lambda _: None, thief)

    def point(snapshot):
        snapshot.meta["targets.json"] = MetaFile.from_data(2, data, ["sha256"])

    data = resign(fleet, "3.snapshot", point)
    resign(fleet, "timestamp", lambda t: setattr(t, "snapshot_meta", MetaFile.from_data(3, data, ["sha256"])))
    withstood(story, "not to be trusted")


def test_lost_metadata_is_a_failure_to_be_tried_again_and_no_alarm(story):
    fleet, device, one, two = story
    metadata(fleet, "3.snapshot").unlink()
    with pytest.raises(TransferError):
        install(fleet, device, two, deployment="d2")
    assert slots.load(device.state).current == one


def test_refused_release_is_not_looked_at_again_for_the_same_attempt(story):
    fleet, device, one, two = story

    def lie(targets):
        targets.targets[two.path].unrecognized_fields["custom"] = to_custom(one)

    operator_signs(fleet, "digits", lie)
    first = refused(story, "manifest that is another")
    operator_signs(
        fleet,
        "digits",
        lambda targets: targets.targets[two.path].unrecognized_fields.update(custom=to_custom(two)),
    )
    assert refused(story, "manifest that is another") == first
    assert isinstance(install(fleet, device, two, deployment="attack", attempt=2), Installed)


def test_forged_wish_for_another_class_does_not_answer_the_real_one_of_the_same_number(story):
    """A broker needs no key for that: deployment, attempt and version are the real ones, the path is not."""
    fleet, device, _, two = story
    forged = Desired(deployment="d2", attempt=1, release=two.path.replace(PROFILE, OTHER), version=2)
    refused(story, "this device is a raspberry-pi-5", forged)
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)
    assert isinstance(update(device, forged, FolderFetcher(fleet.repository), NOW), Refused)
    assert slots.load(device.state).current == two


def test_word_that_an_older_agent_wrote_is_given_again(story):
    fleet, device, one, _ = story
    document = json.loads((device.state / slots.STATE).read_bytes())
    assert document.pop("answered") == one.path
    (device.state / slots.STATE).write_text(json.dumps(document))
    shutil.rmtree(fleet.repository)
    assert isinstance(install(fleet, device, one), Installed)


@pytest.mark.attack("device ids")
@pytest.mark.parametrize("name", ["+", "#", "../x", "a/b", "", "$SYS", "a\n", "x" * 65])
def test_device_fleet_or_class_whose_name_reaches_into_other_topics_is_refused(tmp_path, fleet, name):
    for fleet_name, device_name, profile in [(name, "pi", PROFILE), (FLEET, name, PROFILE), (FLEET, "pi", name)]:
        with pytest.raises(UsageError, match="cannot name"):
            Agent(fleet_name, fleet.device(tmp_path / "device", Serving(), profile, device_name))


def test_attack_through_the_wire_types_is_stopped_before_any_file_is_touched():
    for path in ("models/../../x/1.json", "../root.json", "models/a/b/1.json/../x"):
        payload = json.dumps({"deployment": "d", "attempt": 1, "release": path, "version": 1}).encode()
        with pytest.raises(messages.MessageError):
            messages.decode(payload, Desired)


def test_everything_still_works_after_all_attacks_are_over(story):
    assert isinstance(install(story[0], story[1], story[3], deployment="d2"), Installed)

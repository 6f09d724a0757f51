"""Attacks on what is signed: each is done by a repository that holds the keys its thief would hold."""

import json
from datetime import timedelta

import pytest
from fakes.fleets import NOW, OTHER
from fakes.simulator import Simulator, renamed, victim
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import MetaFile

from edgekit.errors import TransferError

UNTRUSTED = "not to be trusted"
THIEF = CryptoSigner.generate_ed25519()


@pytest.fixture
def story(tmp_path):
    return victim(tmp_path)


@pytest.fixture
def careful(tmp_path):
    """An operator who has three keys for each role, two of which must sign."""
    return victim(tmp_path, keys=3, threshold=2)


@pytest.mark.attack("arbitrary software")
def test_software_signed_by_a_stranger_is_refused(story):
    simulator = story.simulator
    evil = simulator.add(3)
    simulator.publish_targets([THIEF])
    simulator.publish_snapshot()
    simulator.publish_timestamp()
    story.withstands(UNTRUSTED, evil)
    simulator.publish()
    story.recovers(evil)


@pytest.mark.attack("arbitrary software")
def test_whole_repository_of_a_stranger_is_refused(story, tmp_path):
    stranger = Simulator(tmp_path / "stranger")
    stranger.targets.version = stranger.snapshot.version = stranger.timestamp.version = 10
    evil = stranger.add(3)
    stranger.publish()
    story.withstands(UNTRUSTED, evil, fetcher=stranger)
    story.recovers()


@pytest.mark.attack("arbitrary software")
def test_bytes_that_are_not_the_signed_ones_are_refused(story):
    path = story.simulator.blob_of(story.two)
    sound = story.simulator.files[path]
    story.simulator.files[path] = b"\0" * len(sound)
    story.withstands("not the signed ones")
    story.simulator.files[path] = sound
    story.recovers()


@pytest.mark.attack("freeze")
def test_who_holds_back_the_metadata_that_names_a_release_does_not_have_it_refused(story):
    """What he shows is sound and has not expired: it just lacks the release."""
    simulator = story.simulator
    old = simulator.files["metadata/timestamp.json"]
    three = simulator.add(3)
    simulator.publish()
    new, simulator.files["metadata/timestamp.json"] = simulator.files["metadata/timestamp.json"], old
    story.withstands("nobody signed a release", three)
    simulator.files["metadata/timestamp.json"] = new
    story.recovers(three)


def test_snapshot_that_is_half_copied_refuses_nothing(story):
    path = f"metadata/{story.simulator.snapshot.version}.snapshot.json"
    whole = story.simulator.files[path]
    story.simulator.files[path] = whole[:100]
    story.withstands(UNTRUSTED)
    story.simulator.files[path] = whole
    story.recovers()


def see_newest(story):
    """Let the device see all there is, without anything to install."""
    assert story.attack(story.one, deployment="look").version == 1
    story.is_unharmed()


@pytest.mark.attack("rollback: timestamp")
def test_older_timestamp_is_refused(story):
    simulator = story.simulator
    old = simulator.files["metadata/timestamp.json"]
    simulator.add(3)
    simulator.publish()
    see_newest(story)
    seen, simulator.files["metadata/timestamp.json"] = simulator.files["metadata/timestamp.json"], old
    story.withstands(UNTRUSTED)
    simulator.files["metadata/timestamp.json"] = seen
    story.recovers()


@pytest.mark.attack("rollback: snapshot")
def test_thief_of_the_timestamp_key_cannot_point_at_an_older_snapshot(story):
    simulator = story.simulator
    see_newest(story)
    newest = simulator.snapshot.version
    old = simulator.files[f"metadata/{newest - 1}.snapshot.json"]
    simulator.timestamp.snapshot_meta = MetaFile.from_data(newest - 1, old, ["sha256"])
    simulator.publish_timestamp()
    story.withstands(UNTRUSTED)
    simulator.publish()
    story.recovers()


@pytest.mark.attack("rollback: targets")
def test_thief_of_snapshot_and_timestamp_keys_cannot_point_at_older_targets(story):
    simulator = story.simulator
    see_newest(story)
    newest = simulator.targets.version
    old = simulator.files[f"metadata/{newest - 1}.targets.json"]
    simulator.snapshot.meta["targets.json"] = MetaFile.from_data(newest - 1, old, ["sha256"])
    simulator.publish_snapshot()
    simulator.publish_timestamp()
    story.withstands(UNTRUSTED)
    simulator.publish()
    story.recovers()


@pytest.mark.attack("rollback: root")
def test_old_root_under_the_name_of_the_next_is_refused(story):
    simulator = story.simulator
    simulator.publish_root()
    see_newest(story)
    simulator.files["metadata/3.root.json"] = simulator.files["metadata/1.root.json"]
    story.withstands(UNTRUSTED)
    del simulator.files["metadata/3.root.json"]
    story.recovers()


@pytest.mark.attack("rollback: root")
def test_root_that_a_device_has_seen_cannot_be_withheld_to_bring_a_revoked_key_back(story):
    simulator = story.simulator
    old = simulator.rotate("timestamp")
    simulator.publish_timestamp()
    see_newest(story)
    seen = simulator.files.pop("metadata/2.root.json")
    simulator.publish_timestamp(old)
    story.withstands(UNTRUSTED)
    simulator.files["metadata/2.root.json"] = seen
    simulator.publish_timestamp()
    story.recovers()


@pytest.mark.attack("rollback: model")
def test_release_of_an_older_version_is_refused_though_it_is_signed(story):
    story.recovers()
    two = story.two
    outcome = story.attack(story.one, deployment="back")
    assert "back from version 2 to 1" in outcome.reason
    assert story.device.serving.active == two.bundle


@pytest.mark.attack("freeze")
@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "root"])
def test_repository_that_stands_still_is_refused_once_it_has_expired(story, role):
    simulator = story.simulator
    later = NOW + timedelta(days=3)
    for other in (simulator.root, simulator.targets, simulator.snapshot, simulator.timestamp):
        other.expires = NOW + timedelta(days=1 if other is getattr(simulator, role) else 9)
    simulator.publish_root()
    simulator.publish()
    story.withstands("expired", now=later)
    getattr(simulator, role).expires = NOW + timedelta(days=9)
    simulator.publish_root()
    simulator.publish()
    story.recovers()


@pytest.mark.attack("mix-and-match")
@pytest.mark.parametrize("name", ["targets", "snapshot"])
def test_old_and_new_metadata_do_not_go_together(story, name):
    simulator = story.simulator
    newest = getattr(simulator, name).version
    new, old = (f"metadata/{version}.{name}.json" for version in (newest, newest - 1))
    sound, simulator.files[new] = simulator.files[new], simulator.files[old]
    story.withstands(UNTRUSTED)
    simulator.files[new] = sound
    story.recovers()


@pytest.mark.attack("mix-and-match")
def test_manifest_of_one_release_does_not_go_with_the_word_of_another(story):
    simulator = story.simulator
    simulator.put(story.two, simulator.content_of(story.one)[0])
    simulator.publish()
    story.refuses("manifest that is another")


@pytest.mark.attack("wrong hardware class")
def test_release_for_another_class_is_refused_under_its_own_path_and_under_ours(story):
    simulator = story.simulator
    foreign = renamed(story.two, OTHER)
    content = simulator.content_of(story.two)[0]
    simulator.put(foreign, content)
    simulator.publish()
    story.refuses("this device is a raspberry-pi-5", foreign)
    simulator.put(foreign, content, path=story.two.path)
    simulator.publish()
    story.refuses(f"says it is {foreign.path}", deployment="again")
    simulator.put(story.two, content)
    simulator.publish()
    story.recovers()


@pytest.mark.attack("key compromise below threshold")
@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_one_stolen_key_of_two_that_must_sign_is_not_enough(careful, role):
    simulator = careful.simulator
    stolen = simulator.signers[role][0]
    evil = simulator.add(3)
    for each in ("targets", "snapshot", "timestamp"):
        getattr(simulator, f"publish_{each}")([stolen] if each == role else None)
    careful.withstands(UNTRUSTED, evil)
    simulator.publish()
    careful.recovers(evil)


@pytest.mark.attack("key compromise below threshold")
def test_one_stolen_root_key_of_two_makes_no_new_root(careful):
    simulator = careful.simulator
    honest = simulator.signers["root"]
    simulator.signers["root"] = honest[:1]
    simulator.rotate("targets")
    careful.withstands(UNTRUSTED)
    simulator.signers["root"] = honest
    simulator.root.version -= 1
    simulator.publish_root()
    simulator.publish()
    careful.recovers()


@pytest.mark.attack("key compromise below threshold")
def test_two_of_three_keys_are_enough_so_that_one_may_be_lost(careful):
    simulator = careful.simulator
    simulator.signers = {role: signers[1:] for role, signers in simulator.signers.items()}
    simulator.publish_root()
    simulator.publish()
    careful.recovers()


@pytest.mark.attack("revoked key")
@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_key_that_was_revoked_signs_nothing_any_more(story, role):
    simulator = story.simulator
    old = simulator.rotate(role)
    for each in ("targets", "snapshot", "timestamp"):
        getattr(simulator, f"publish_{each}")(old if each == role else None)
    story.withstands(UNTRUSTED)
    simulator.publish()
    story.recovers()


@pytest.mark.attack("revoked key")
def test_root_key_that_was_revoked_makes_no_root(story):
    simulator = story.simulator
    old = simulator.rotate("root")
    see_newest(story)
    simulator.signers["root"], new = old, simulator.signers["root"]
    simulator.publish_root()
    story.withstands(UNTRUSTED)
    simulator.signers["root"] = new
    simulator.root.version -= 1
    simulator.publish_root()
    story.recovers()


def rewrite_root(simulator, change):
    """Serve a next root as raw JSON, signed over what stands there: what no library of ours would write."""
    simulator.root.version += 1
    path = f"metadata/{simulator.root.version}.root.json"
    document = json.loads(simulator.sign(simulator.root, simulator.signers["root"]))
    change(document)
    simulator.files[path] = json.dumps(document).encode()
    return path


@pytest.mark.attack("threshold 0")
@pytest.mark.parametrize("threshold", [0, -1])
def test_root_that_asks_for_no_signature_is_refused(story, threshold):
    simulator = story.simulator
    simulator.root.roles["targets"].threshold = threshold  # and signed so, by the root's own keys
    path = rewrite_root(simulator, lambda _: None)
    simulator.publish_targets([THIEF])
    simulator.publish_snapshot()
    simulator.publish_timestamp()
    story.withstands(UNTRUSTED)
    del simulator.files[path]
    simulator.publish()
    story.recovers()


@pytest.mark.attack("duplicate keys")
def test_signature_that_comes_twice_counts_once(careful):
    simulator = careful.simulator
    evil = simulator.add(3)
    simulator.publish_targets(simulator.signers["targets"][:1])
    path = f"metadata/{simulator.targets.version}.targets.json"
    document = json.loads(simulator.files[path])
    document["signatures"] *= 2
    simulator.files[path] = json.dumps(document).encode()
    simulator.snapshot.meta["targets.json"] = MetaFile(simulator.targets.version)
    simulator.publish_snapshot()
    simulator.publish_timestamp()
    careful.withstands(UNTRUSTED, evil)
    simulator.publish()
    careful.recovers(evil)


@pytest.mark.attack("duplicate keys")
def test_root_that_names_one_key_twice_is_refused(careful):
    simulator = careful.simulator
    role = simulator.root.roles["targets"]
    role.keyids = [role.keyids[0]] * 2
    rewrite_root(simulator, lambda _: None)
    simulator.publish_targets(simulator.signers["targets"][:1])
    simulator.publish_snapshot()
    simulator.publish_timestamp()
    careful.withstands(UNTRUSTED)


@pytest.mark.attack("fast-forward")
def test_device_recovers_from_versions_that_a_thief_raised_to_the_end(story):
    simulator = story.simulator
    versions = simulator.snapshot.version, simulator.timestamp.version
    simulator.snapshot.version = simulator.timestamp.version = 2**31
    simulator.publish_snapshot()
    simulator.publish_timestamp()
    see_newest(story)  # signed by the stolen keys: it has no reason to doubt
    simulator.snapshot.version, simulator.timestamp.version = versions
    simulator.publish()
    story.withstands(UNTRUSTED)
    for role in ("snapshot", "timestamp"):
        simulator.rotate(role)
    simulator.publish()
    story.recovers()


@pytest.mark.attack("wrong-length target")
@pytest.mark.parametrize("change", [-1, 1])
def test_manifest_of_another_length_than_signed_is_refused(story, change):
    simulator = story.simulator
    content, path = simulator.content_of(story.two)
    simulator.files[path] = content[:change] if change < 0 else content + b" "
    story.withstands("sends more bytes than it signed" if change > 0 else UNTRUSTED)
    simulator.files[path] = content
    story.recovers()


@pytest.mark.attack("wrong-length target")
def test_file_that_ends_early_is_refused(story):
    path = story.simulator.blob_of(story.two)
    whole = story.simulator.files[path]
    story.simulator.files[path] = whole[:-1]
    story.withstands("not the signed ones")
    story.simulator.files[path] = whole
    story.recovers()


@pytest.mark.attack("withheld metadata")
@pytest.mark.parametrize("name", ["snapshot", "targets"])
def test_metadata_that_is_withheld_is_asked_for_again(story, name):
    simulator = story.simulator
    path = f"metadata/{getattr(simulator, name).version}.{name}.json"
    held = simulator.files.pop(path)
    with pytest.raises(TransferError):
        story.attack()
    story.is_unharmed()
    simulator.files[path] = held
    story.recovers()

"""The rule of trust: no sequence of releases lowers the installed version, and the root is given once."""

import os

import pytest
from fakes.fleets import NOW, OTHER, PROFILE, Fleet, install
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import TransferError, TrustError, UsageError
from edgekit.ota.device import trust
from edgekit.ota.device.fetchers import FolderFetcher
from edgekit.ota.device.trust import check_release
from edgekit.ota.release import Release


def release(version=1, model="digits", profile=PROFILE, bundle="a" * 64):
    return Release(model=model, profile=profile, version=version, bundle=bundle)


RELEASES = st.builds(
    release,
    version=st.integers(1, 6),
    model=st.sampled_from(["digits", "cats"]),
    profile=st.sampled_from([PROFILE, OTHER]),
    bundle=st.sampled_from(["a" * 64, "b" * 64]),
)


@given(st.lists(RELEASES, max_size=20))
def test_no_sequence_of_releases_lowers_the_installed_version_or_changes_model_or_class(offered):
    installed = None
    for one in offered:
        before = installed
        try:
            if check_release(one, one.path, profile=PROFILE, installed=installed):
                installed = one
        except TrustError:
            continue
        assert installed.profile == PROFILE
        if before is not None:
            assert installed.version >= before.version
            assert installed.model == before.model
            assert installed == before or installed.version > before.version


@given(RELEASES, RELEASES)
def test_release_under_the_path_of_another_is_never_trusted(one, other):
    if one.path != other.path:
        with pytest.raises(TrustError, match="says it is"):
            check_release(one, other.path, profile=one.profile, installed=None)


def test_each_broken_rule_is_named():
    installed = release(5)
    for bad, words in [
        (release(9, profile=OTHER), "is for x86-64"),
        (release(9, model="cats"), "another model"),
        (release(4), "back from version 5 to 4"),
        (release(5, bundle="b" * 64), "signed twice"),
    ]:
        with pytest.raises(TrustError, match=words):
            check_release(bad, bad.path, profile=PROFILE, installed=installed)
    assert check_release(release(6), release(6).path, profile=PROFILE, installed=installed)
    assert not check_release(installed, installed.path, profile=PROFILE, installed=installed)


def test_root_of_trust_is_given_once_and_never_replaced(tmp_path):
    one, two = Fleet(tmp_path / "one"), Fleet(tmp_path / "two")
    device = one.device(tmp_path / "device")
    one.device(tmp_path / "device")
    with pytest.raises(TrustError, match="trusts another root"):
        two.device(tmp_path / "device")
    with pytest.raises(TrustError, match="trusts another root"):
        trust.install_root(tmp_path / "device", b"garbage")
    assert (device.state / "root.json").read_bytes() == (one.repository / "metadata" / "1.root.json").read_bytes()


def test_what_is_no_root_is_not_installed(tmp_path):
    fleet = Fleet(tmp_path / "fleet")
    metadata = fleet.repository / "metadata"
    unsigned = (metadata / "1.root.json").read_bytes().replace(b'"sig":"', b'"sig":"00')
    for data in (b"", b"{}", b"\xff", (metadata / "timestamp.json").read_bytes(), unsigned):
        with pytest.raises(UsageError, match="no root"):
            trust.install_root(tmp_path / "device", data)
    assert not (tmp_path / "device").exists()


def test_device_without_a_root_trusts_nobody(tmp_path):
    fleet = Fleet(tmp_path / "fleet")
    one = fleet.publish(1)
    (tmp_path / "device").mkdir()
    with pytest.raises(UsageError, match="no root of trust"):
        trust.refresh_and_find(tmp_path / "device", FolderFetcher(fleet.repository), one.path, NOW)


def test_found_release_brings_the_very_manifest_that_was_signed(tmp_path):
    fleet = Fleet(tmp_path / "fleet")
    one = fleet.publish(1)
    device = fleet.device(tmp_path / "device")
    found = trust.refresh_and_find(device.state, FolderFetcher(fleet.repository), one.path, NOW)
    assert found.release == one
    assert found.data == (fleet.folder / "sealed" / "1" / "manifest.json").read_bytes()
    assert found.manifest.variant(PROFILE).main == f"{PROFILE}/model.onnx"


def test_empty_repository_is_a_transfer_error_to_be_tried_again(tmp_path):
    fleet = Fleet(tmp_path / "fleet")
    device = fleet.device(tmp_path / "device")
    with pytest.raises(TransferError, match="did not come"):
        install(type("F", (), {"repository": tmp_path / "nothing"}), device, release())


def test_nothing_of_an_update_goes_through_the_systems_folder_of_scratch(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path / "fleet")
    device = fleet.device(tmp_path / "device")
    one = fleet.publish(1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))  # it may be a tmpfs, or full
    assert install(fleet, device, one).version == 1


def test_metadata_survives_a_power_cut_as_it_guards_against_older_metadata(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path / "fleet")
    device, synced, sync = fleet.device(tmp_path / "device"), set(), os.fsync

    def noted(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    install(fleet, device, fleet.publish(1))
    kept = list((device.state / "metadata").rglob("*"))
    assert {path.name for path in kept} >= {"timestamp.json", "snapshot.json", "targets.json", "1.root.json"}
    assert {path.stat().st_ino for path in kept} <= synced


def test_what_a_kill_left_of_metadata_that_was_coming_is_swept(tmp_path):
    fleet = Fleet(tmp_path / "fleet")
    device = fleet.device(tmp_path / "device")
    left = device.state / "metadata" / "tmpabcdefgh"
    left.parent.mkdir()
    left.write_bytes(b"{")
    install(fleet, device, fleet.publish(1))
    assert not left.exists()

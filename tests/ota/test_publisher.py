"""The operator's side: keys, versions, proof before publication, and a repository that no kill can break."""

import os
import shutil
from datetime import timedelta

import pytest
from fakes.fleets import NOW, OTHER, PROFILE, QUICK, Fleet, install, tiny_bundle
from fakes.kills import run_and_kill

from edgekit import bundle
from edgekit.errors import BundleError, ResourceError, TrustError, UnknownName, UsageError
from edgekit.ota.messages import BlockRequest, Installed
from edgekit.ota.release import Limits
from edgekit.ota.server import metadata, publisher, repository


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path / "fleet")


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_keys_are_for_their_owner_only(fleet):
    keys = sorted((fleet.folder / "keys").iterdir())
    assert [k.name for k in keys] == ["root.pem", "snapshot.pem", "targets.pem", "timestamp.pem"]
    assert {k.stat().st_mode & 0o777 for k in keys} == {0o600}
    assert len({k.read_bytes() for k in keys}) == 4


def test_fleet_is_never_made_twice_in_one_folder(fleet):
    before = tree(fleet.folder)
    with pytest.raises(UsageError, match="already"):
        publisher.init(fleet.folder, NOW)
    assert tree(fleet.folder) == before


@pytest.mark.parametrize("call", [publisher.root, publisher.releases, lambda f: publisher.refresh(f, NOW)])
def test_folder_without_a_fleet_says_how_to_make_one(tmp_path, call):
    with pytest.raises(UsageError, match="holds no fleet") as caught:
        call(tmp_path / "nowhere")
    assert "edgekit ota init" in caught.value.hint


def test_release_is_signed_per_class_and_names_the_bundle(fleet, tmp_path):
    sealed = tiny_bundle(tmp_path / "b")
    made = publisher.publish(fleet.folder, sealed, now=NOW, limits=Limits(max_load_seconds=50.0))
    assert [(r.model, r.profile, r.version, r.bundle) for r in made] == [
        ("digits", PROFILE, 1, sealed.digest),
        ("digits", OTHER, 1, sealed.digest),
    ]
    assert sorted(publisher.releases(fleet.folder), key=str) == sorted(made, key=str)


def test_versions_rise_by_themselves_and_never_fall(fleet, tmp_path):
    assert fleet.publish(1).version == 1
    assert fleet.publish(2).version == 2
    assert fleet.publish(3, version=7).version == 7
    for version in (1, 7):
        with pytest.raises(UsageError, match="not above the last one, 7") as caught:
            fleet.publish(4, version=version)
        assert "8" in caught.value.hint
    assert fleet.publish(4, model="another").version == 1
    assert [r.version for r in publisher.releases(fleet.folder) if r.profile == PROFILE] == [1, 1, 2, 7]


def test_class_that_has_the_model_already_cannot_get_an_older_version_through_another_class(fleet):
    fleet.publish(1, version=5, profiles=[PROFILE])
    with pytest.raises(UsageError, match="not above"):
        fleet.publish(2, version=3, profiles=[OTHER])


def test_blob_that_the_disk_damaged_is_mended_by_publishing_again(fleet, tmp_path):
    fleet.publish(1)
    blob = max((fleet.repository / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    whole = blob.read_bytes()
    blob.write_bytes(bytes(len(whole)))
    assert isinstance(install(fleet, fleet.device(tmp_path / "d"), fleet.publish(1)), Installed)
    assert blob.read_bytes() == whole


def test_only_what_the_chosen_classes_need_is_published(fleet, tmp_path):
    sealed = tiny_bundle(tmp_path / "b")
    publisher.publish(fleet.folder, sealed, now=NOW, profiles=[PROFILE, PROFILE])
    blobs = {p.name for p in (fleet.repository / "blobs").iterdir()}
    assert blobs == {e.sha256 for e in sealed.manifest.files_of(PROFILE)}
    assert {e.sha256 for e in sealed.manifest.files_of(OTHER)} - blobs


def test_unverified_variant_needs_a_deliberate_word(fleet, tmp_path):
    sealed = tiny_bundle(tmp_path / "b", status="unverified")
    for profiles in (None, [PROFILE]):
        with pytest.raises(UsageError, match=r"unverified|verified") as caught:
            publisher.publish(fleet.folder, sealed, now=NOW, profiles=profiles)
        assert "--allow-unverified" in caught.value.hint
    assert publisher.releases(fleet.folder) == []
    made = publisher.publish(fleet.folder, sealed, now=NOW, allow_unverified=True)
    assert len(made) == 2


def test_unknown_class_and_unusable_names_and_limits_are_refused(fleet, tmp_path):
    sealed = tiny_bundle(tmp_path / "b")
    before = tree(fleet.repository)
    with pytest.raises(UnknownName, match="raspberry-pi-6"):
        publisher.publish(fleet.folder, sealed, now=NOW, profiles=["raspberry-pi-6"])
    with pytest.raises(UsageError, match="cannot be published"):
        publisher.publish(fleet.folder, sealed, now=NOW, model="../x")
    with pytest.raises(UsageError, match="cannot be published"):
        publisher.publish(fleet.folder, sealed, now=NOW, version=10**9)
    with pytest.raises(UsageError, match="limits cannot be published"):
        publisher.publish(fleet.folder, sealed, now=NOW, limits=Limits(max_load_seconds=float("nan")))
    assert tree(fleet.repository) == before


def test_bundle_that_changed_since_it_was_opened_is_not_published(fleet, tmp_path):
    sealed = tiny_bundle(tmp_path / "b")
    model = sealed.path(f"{PROFILE}/model.onnx")
    model.write_bytes(b"x" * model.stat().st_size)
    with pytest.raises(BundleError, match="changed"):
        publisher.publish(fleet.folder, sealed, now=NOW)
    other = tiny_bundle(tmp_path / "c", seed=2)
    other.path(bundle.MANIFEST).write_bytes(b"{}")
    with pytest.raises(BundleError, match="changed"):
        publisher.publish(fleet.folder, other, now=NOW)
    assert publisher.releases(fleet.folder) == []
    assert [p.name for p in (fleet.repository / "blobs").iterdir() if p.name.startswith(".")] == []


def test_refresh_keeps_devices_content_beyond_the_life_of_a_timestamp(fleet, tmp_path):
    release = fleet.publish(1)
    later = NOW
    for _ in range(60):
        later += timedelta(days=6)
        publisher.refresh(fleet.folder, later)
    device = fleet.device(tmp_path / "device")
    assert isinstance(install(fleet, device, release, now=later), Installed)


def test_damaged_or_missing_key_says_which(fleet):
    (fleet.folder / "keys" / "targets.pem").write_text("not a key")
    with pytest.raises(TrustError, match=r"targets\.pem"):
        fleet.publish(1)
    (fleet.folder / "keys" / "targets.pem").unlink()
    with pytest.raises(TrustError, match="targets key is missing"):
        fleet.publish(1)
    assert publisher.releases(fleet.folder) == []


def test_damaged_repository_is_named_and_left_alone(fleet):
    (fleet.repository / "metadata" / "timestamp.json").write_text("{")
    with pytest.raises(TrustError, match=r"timestamp\.json is damaged"):
        fleet.publish(1)


@pytest.mark.parametrize("name", ["timestamp", "2.snapshot", "1.model-digits", "2.targets"])
def test_whoever_writes_into_the_repository_does_not_have_it_signed_by_the_next_publish(fleet, name):
    fleet.publish(1)
    path = metadata.place(fleet.folder, name)
    path.write_bytes(path.read_bytes().replace(b"2026", b"2036").replace(b"2027", b"2037"))
    for call in (fleet.publish, lambda _: publisher.refresh(fleet.folder, NOW)):
        with pytest.raises(TrustError, match=r"is damaged|not signed by the fleet's key"):
            call(2)


def test_repository_that_somebody_signed_with_keys_of_his_own_is_not_signed_by_the_fleet(fleet, tmp_path):
    other = Fleet(tmp_path / "other")
    other.publish(1)
    shutil.rmtree(fleet.repository)
    shutil.copytree(other.repository, fleet.repository)
    with pytest.raises(TrustError, match=r"not in keyring\.json"):
        fleet.publish(2)


def test_second_publisher_waits_its_turn(fleet):
    with metadata.sole_writer(fleet.folder), pytest.raises(ResourceError, match="somebody else publishes"):
        fleet.publish(1)


@pytest.mark.slow
def test_kill_at_any_step_of_init_leaves_a_folder_that_init_completes(tmp_path):
    for at in range(1, 200):
        folder = tmp_path / f"fleet-{at}"
        if not run_and_kill(lambda folder=folder: publisher.init(folder, NOW), at):
            break
        if not (folder / "repository" / "metadata" / "timestamp.json").exists():
            publisher.init(folder, NOW)
        assert publisher.releases(folder) == []
        if at % 8 == 0:
            publisher.publish(folder, tiny_bundle(tmp_path / "b"), now=NOW)
    assert at > 20


@pytest.mark.slow
def test_kill_at_any_step_of_publish_leaves_the_old_or_the_new_repository(fleet, tmp_path):
    one = fleet.publish(1)
    two = tiny_bundle(tmp_path / "two", seed=2)
    saw_old = saw_new = 0
    for at in range(1, 200):
        copy = Fleet.__new__(Fleet)
        copy.folder = tmp_path / f"copy-{at}"
        shutil.copytree(fleet.folder, copy.folder)

        def work(folder=copy.folder):
            publisher.publish(folder, two, now=NOW, limits=QUICK)

        killed = run_and_kill(work, at)
        releases = publisher.releases(copy.folder)
        assert len(releases) in (2, 4)
        saw_old += len(releases) == 2
        saw_new += len(releases) == 4
        newest = next(r for r in reversed(releases) if r.profile == PROFILE)
        assert newest.version == 1 or newest.bundle == two.digest
        device = copy.device(tmp_path / f"device-{at}")
        assert isinstance(install(copy, device, newest), Installed)
        if not killed:
            break
        again = publisher.publish(copy.folder, two, now=NOW, limits=QUICK)[0]
        assert isinstance(install(copy, device, again, deployment="d2"), Installed)
    assert one.version == 1
    assert saw_old > 15
    assert saw_new > 0


def ask(fleet, path, offset=0, length=1000):
    # Not through the decoder: the folder must be safe even where a request was never checked.
    return repository.read_block(fleet.folder, BlockRequest(path=path, offset=offset, length=length))


def test_repository_hands_out_files_block_by_block(fleet):
    fleet.publish(1)
    name = next((fleet.repository / "blobs").iterdir()).name
    data = (fleet.repository / "blobs" / name).read_bytes()
    got = b"".join(ask(fleet, f"blobs/{name}", at, 7).data for at in range(0, len(data), 7))
    assert got == data
    assert ask(fleet, f"blobs/{name}").total == len(data)
    behind = ask(fleet, f"blobs/{name}", offset=1 << 40)
    assert (behind.data, behind.total, behind.error) == (b"", len(data), "")


@pytest.mark.attack("symlink")
@pytest.mark.attack("absolute path")
@pytest.mark.parametrize(
    "path",
    [
        "../keys/root.pem",
        "targets/../../keys/root.pem",
        "targets/../metadata/timestamp.json",
        "/etc/passwd",
        "metadata/./timestamp.json",
        "metadata//timestamp.json",
        "metadata",
        "",
        "metadata/9.root.json",
        "metadata/timestamp.json/x",
        "link.json",
        "linked/root.pem",
        "pipe",
    ],
)
def test_nothing_outside_the_repository_and_no_link_is_handed_out(fleet, path):
    (fleet.repository / "link.json").symlink_to(fleet.folder / "keys" / "root.pem")
    (fleet.repository / "linked").symlink_to(fleet.folder / "keys")
    os.mkfifo(fleet.repository / "pipe")
    block = ask(fleet, path)
    assert (block.error, block.data) == ("not found", b"")


def test_unreadable_file_is_an_error_and_not_missing(fleet):
    if os.geteuid() == 0:
        block = ask(fleet, "metadata/" + "x" * 300)  # too long a name is what the system refuses root, too
    else:
        (fleet.repository / "metadata" / "timestamp.json").chmod(0)
        block = ask(fleet, "metadata/timestamp.json")
    assert block.error.startswith("cannot read")

"""Keys change hands: rotated, revoked, signed by several on several machines, killed half-way; devices follow."""

import shutil
from datetime import timedelta

import pytest
from fakes.fleets import NOW, Fleet, Serving, install
from fakes.kills import run_and_kill
from tuf.api.metadata import Metadata

from edgekit.errors import UnknownName, UsageError
from edgekit.ota.device import trust
from edgekit.ota.device.trust import Expired
from edgekit.ota.device.update import Device
from edgekit.ota.messages import Installed
from edgekit.ota.server import delegations, metadata, publisher, roots
from edgekit.ota.server.keys import Custody, KeyAway, Unlock

ROLES = ["root", "targets", "snapshot", "timestamp"]


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path / "fleet")


@pytest.fixture
def shared(tmp_path):
    """A fleet whose root takes two of three keys, each on a stick of its own."""
    folder = tmp_path / "shared"
    publisher.init(folder, NOW, publisher.Keeping(root_keys=3, root_threshold=2))
    sticks = []
    for number in (1, 2, 3):
        sticks.append(tmp_path / f"stick-{number}")
        sticks[-1].mkdir()
        (folder / "keys" / f"root-{number}.pem").rename(sticks[-1] / f"root-{number}.pem")
    fleet = Fleet.__new__(Fleet)
    fleet.folder, fleet.size = folder, 2000
    return fleet, sticks


def opened(fleet, *sticks):
    return Custody(fleet.folder, Unlock(folders=sticks))


def keyid(fleet, role):
    return metadata.current_root(fleet.folder).signed.roles[role].keyids[0]


@pytest.mark.parametrize("names", [["timestamp"], ["snapshot"], ["targets"], ["root"], ROLES], ids="-".join)
def test_rotated_role_has_another_key_and_devices_follow(fleet, tmp_path, names):
    device = fleet.device(tmp_path / "device")
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)
    before = {role: keyid(fleet, role) for role in ROLES}
    change = roots.rotate(opened(fleet), names, NOW)
    assert (change.version, change.missing, len(change.made), len(change.dropped)) == (2, 0, len(names), len(names))
    assert {role for role in ROLES if keyid(fleet, role) != before[role]} == set(names)
    for uri in change.dropped:
        (fleet.folder / uri.removeprefix("file:")).unlink()
    assert isinstance(install(fleet, device, fleet.publish(2), deployment="d2"), Installed)
    assert isinstance(install(fleet, fleet.device(tmp_path / "new"), fleet.publish(3)), Installed)


@pytest.mark.slow
def test_device_that_was_away_for_fifty_roots_follows_them_all(fleet, tmp_path):
    device = fleet.device(tmp_path / "device")
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)
    for number in range(50):
        roots.rotate(opened(fleet), [ROLES[number % 4]], NOW + timedelta(days=number))
    late = NOW + timedelta(days=50)
    two = fleet.publish(2, now=late)
    assert isinstance(install(fleet, device, two, deployment="d2", now=late), Installed)
    assert (device.state / "metadata" / "root_history" / "51.root.json").exists()


def test_root_that_expired_between_two_others_does_not_stop_a_device(fleet, tmp_path):
    device = fleet.device(tmp_path / "device")
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)
    roots.renew(opened(fleet), NOW)
    much_later = NOW + timedelta(days=800)  # roots 1 and 2 have expired
    publisher.refresh(fleet.folder, much_later, also=["targets", "model-digits"])
    two = fleet.publish(2, now=much_later)
    with pytest.raises(Expired, match="expired"):
        install(fleet, device, two, deployment="d2", now=much_later)
    roots.renew(opened(fleet), much_later)
    three = fleet.publish(3, now=much_later)
    assert isinstance(install(fleet, device, three, deployment="d3", now=much_later), Installed)


def test_root_of_two_signatures_waits_for_the_second_where_no_device_sees_it(shared, tmp_path):
    fleet, sticks = shared
    device = fleet.device(tmp_path / "device")
    change = roots.rotate(opened(fleet, sticks[0]), ["timestamp"], NOW)
    assert (change.version, change.missing) == (2, 1)
    assert not metadata.place(fleet.folder, "2.root").exists()
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)
    with pytest.raises(UsageError, match="root 2 waits for signatures"):
        roots.rotate(opened(fleet, *sticks), ["snapshot"], NOW)
    assert roots.sign_pending(opened(fleet, sticks[0]), NOW).missing == 1  # the same key once more is no second one
    assert roots.sign_pending(opened(fleet, sticks[2]), NOW).missing == 0
    assert roots.pending(fleet.folder) is None
    assert not change.pending.exists()
    assert isinstance(install(fleet, device, fleet.publish(2), deployment="d2"), Installed)


def test_signature_is_added_on_a_machine_that_has_only_a_key_and_carried_back(shared, tmp_path):
    fleet, sticks = shared
    change = roots.rotate(opened(fleet, sticks[0]), ["snapshot"], NOW)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(change.pending, elsewhere)
    assert roots.sign_copy(Custody(elsewhere), elsewhere / change.pending.name, [f"file:{sticks[1]}/root-2.pem"]) == 2
    assert roots.sign_pending(opened(fleet), NOW, [elsewhere / change.pending.name]).missing == 0
    assert metadata.current_root(fleet.folder).signed.version == 2


def test_last_signature_is_kept_where_an_online_key_is_missing_for_the_rest(shared):
    fleet, sticks = shared
    change = roots.rotate(opened(fleet, sticks[0]), ["timestamp"], NOW)
    snapshot = fleet.folder / "keys" / "snapshot.pem"
    away = snapshot.rename(fleet.folder / "snapshot.away")
    with pytest.raises(KeyAway, match="snapshot key is missing"):
        roots.sign_pending(opened(fleet, sticks[1]), NOW)
    away.rename(snapshot)
    assert roots.sign_pending(opened(fleet), NOW).missing == 0
    assert not change.pending.exists()


def test_copy_that_was_changed_on_the_way_is_not_taken(shared, tmp_path):
    fleet, sticks = shared
    change = roots.rotate(opened(fleet, sticks[0]), ["snapshot"], NOW)
    forged = Metadata.from_file(str(change.pending))
    forged.signed.roles["root"].threshold = 1
    forged.to_file(str(tmp_path / "2.root.json"))
    with pytest.raises(UsageError, match="is not a copy"):
        roots.sign_pending(opened(fleet, sticks[1]), NOW, [tmp_path / "2.root.json"])
    shutil.copy(metadata.place(fleet.folder, "timestamp"), tmp_path)
    with pytest.raises(UsageError, match="timestamp metadata, no root"):
        roots.sign_copy(opened(fleet), tmp_path / "timestamp.json", ["file:keys/timestamp.pem"])


def test_waiting_root_is_given_up(shared):
    fleet, sticks = shared
    roots.rotate(opened(fleet, sticks[0]), ["snapshot"], NOW)
    roots.drop_pending(fleet.folder)
    with pytest.raises(UsageError, match="waits for signatures"):
        roots.drop_pending(fleet.folder)
    with pytest.raises(UsageError, match="waits for signatures"):
        roots.sign_pending(opened(fleet), NOW)
    assert roots.rotate(opened(fleet, *sticks), ["timestamp"], NOW).missing == 0


def test_stolen_root_key_is_dropped_where_the_others_are_enough_and_replaced_where_not(shared, tmp_path):
    fleet, sticks = shared
    device = fleet.device(tmp_path / "device")
    stolen = metadata.current_root(fleet.folder).signed.roles["root"].keyids[0]
    change = roots.rotate(opened(fleet, *sticks[1:]), [stolen[:8]], NOW, is_compromised=True)
    assert (change.missing, change.made) == (0, [])
    assert len(metadata.current_root(fleet.folder).signed.roles["root"].keyids) == 2
    second = metadata.current_root(fleet.folder).signed.roles["root"].keyids[0]
    change = roots.rotate(opened(fleet, *sticks[1:]), [second[:8]], NOW, is_compromised=True)
    assert (change.missing, len(change.made)) == (0, 1)
    after = metadata.current_root(fleet.folder).signed
    assert (after.version, after.roles["root"].threshold, len(after.roles["root"].keyids)) == (3, 2, 2)
    assert not {stolen, second} & set(after.keys)
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)


def test_revoked_timestamp_takes_the_snapshot_along(fleet):
    before = {role: keyid(fleet, role) for role in ROLES}
    roots.rotate(opened(fleet), ["timestamp"], NOW, is_compromised=True)
    assert {role for role in ROLES if keyid(fleet, role) != before[role]} == {"snapshot", "timestamp"}


def test_lost_key_is_replaced_although_it_can_sign_nothing_more(fleet, tmp_path):
    device = fleet.device(tmp_path / "device")
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)
    for role in ("timestamp", "snapshot", "targets"):
        (fleet.folder / "keys" / f"{role}.pem").unlink()
    roots.rotate(opened(fleet), ["timestamp", "snapshot", "targets"], NOW)
    assert isinstance(install(fleet, device, fleet.publish(2), deployment="d2"), Installed)


def test_rotation_without_the_keys_that_must_sign_changes_nothing(fleet):
    fleet.publish(1)
    (fleet.folder / "keys" / "snapshot.pem").unlink()
    before = {path.name: path.read_bytes() for path in metadata.place(fleet.folder, "x").parent.iterdir()}
    with pytest.raises(KeyAway, match="snapshot key is missing"):
        roots.rotate(opened(fleet), ["timestamp"], NOW)
    assert {path.name: path.read_bytes() for path in metadata.place(fleet.folder, "x").parent.iterdir()} == before
    assert roots.pending(fleet.folder) is None


def test_model_is_handed_over_to_another_key_without_a_new_root(fleet, tmp_path):
    device = fleet.device(tmp_path / "device")
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)
    change = roots.rotate(opened(fleet), ["model-digits"], NOW)
    assert (change.version, len(change.made)) == (1, 1)
    assert isinstance(install(fleet, device, fleet.publish(2), deployment="d2"), Installed)
    (mine,) = [row for row in roots.overview(fleet.folder, NOW) if row.role == "model-digits"]
    assert mine.uri == change.made[0]
    again = roots.rotate(opened(fleet), [mine.keyid[:10]], NOW, is_compromised=True)
    assert again.dropped == change.made
    assert isinstance(install(fleet, device, fleet.publish(3), deployment="d3"), Installed)


@pytest.mark.parametrize("name", ["model-digits", "targets"])
def test_model_that_is_spread_over_bins_is_handed_over_with_all_of_them(fleet, tmp_path, monkeypatch, name):
    monkeypatch.setattr(delegations, "MAX_TARGETS", 2)
    device = fleet.device(tmp_path / "device")
    for seed in (1, 2, 3):
        assert isinstance(install(fleet, device, fleet.publish(seed), deployment=f"d{seed}"), Installed)
    roots.rotate(opened(fleet), [name], NOW)
    (fleet.folder / "keys" / "targets.pem").rename(tmp_path / "targets.pem")
    new = fleet.device(tmp_path / "new")
    release = next(r for r in publisher.releases(fleet.folder) if r.profile == new.profile and r.version == 1)
    assert isinstance(install(fleet, new, release), Installed)
    if name == "targets":
        assert isinstance(install(fleet, device, fleet.publish(4), deployment="d4"), Installed)


def test_targets_key_takes_its_models_along_and_leaves_those_that_have_their_own(fleet):
    fleet.publish(1)
    fleet.publish(2, model="cats")
    roots.rotate(opened(fleet), ["model-cats"], NOW)
    own = {row.role: row.keyid for row in roots.overview(fleet.folder, NOW)}
    roots.rotate(opened(fleet), [own["targets"][:8]], NOW)
    new = {row.role: row.keyid for row in roots.overview(fleet.folder, NOW)}
    assert new["model-cats"] == own["model-cats"]
    assert new["model-digits"] == new["targets"] != own["targets"]


def test_offline_fleet_publishes_with_the_models_key_and_asks_for_the_rest_where_it_is_needed(tmp_path):
    folder, away = tmp_path / "fleet", tmp_path / "offline"
    publisher.init(folder, NOW, publisher.Keeping(offline=away, encrypt=False))
    assert sorted(p.name for p in away.iterdir()) == ["authority.pem", "root.pem", "targets.pem"]
    assert sorted(p.name for p in (folder / "keys").iterdir()) == ["models.pem", "snapshot.pem", "timestamp.pem"]
    fleet = Fleet.__new__(Fleet)
    fleet.folder, fleet.size = folder, 2000
    one = fleet.publish(1)
    stick = away.rename(tmp_path / "stick")
    device = Device("pi-1", one.profile, tmp_path / "device", Serving())
    trust.install_root(device.state, publisher.root(folder))
    assert isinstance(install(fleet, device, one), Installed)
    assert isinstance(install(fleet, device, fleet.publish(2), deployment="d2"), Installed)
    with pytest.raises(KeyAway, match="targets key is missing") as caught:
        fleet.publish(3, model="new")
    assert "--keys" in caught.value.hint
    assert fleet.publish(3, model="new", unlock=Unlock(folders=(stick,))).version == 1
    change = roots.rotate(Custody(folder, Unlock(folders=(stick,))), ["models"], NOW)
    assert len(change.made) == len(change.dropped) == 1
    assert isinstance(install(fleet, device, fleet.publish(4), deployment="d4"), Installed)


def test_refresh_tells_what_it_cannot_sign_before_it_is_too_late(tmp_path):
    folder, away = tmp_path / "fleet", tmp_path / "offline"
    publisher.init(folder, NOW, publisher.Keeping(offline=away, encrypt=False))
    stick = away.rename(tmp_path / "stick")
    assert publisher.refresh(folder, NOW + timedelta(days=280)) == []
    (told,) = publisher.refresh(folder, NOW + timedelta(days=310))
    assert "targets expires in 55 days" in told
    assert "targets key is missing" in told
    assert publisher.refresh(folder, NOW + timedelta(days=310), Unlock(folders=(stick,))) == []
    assert publisher.refresh(folder, NOW + timedelta(days=310)) == []
    told = publisher.refresh(folder, NOW + timedelta(days=700))
    assert any("root expires in 30 days" in one for one in told)
    with pytest.raises(UnknownName, match="unknown role 'model-x'"):
        publisher.refresh(folder, NOW, also=["model-x"])


@pytest.mark.parametrize(("names", "words"), [(["root", "nobody"], "unknown role or key"), (["ab"], "unknown role")])
def test_unknown_role_is_told_with_those_that_there_are(fleet, names, words):
    with pytest.raises(UnknownName, match=words):
        roots.rotate(opened(fleet), names, NOW)
    assert metadata.current_root(fleet.folder).signed.version == 1


def test_one_new_key_cannot_replace_several(fleet):
    with pytest.raises(UsageError, match="cannot replace 2 keys"):
        roots.rotate(opened(fleet), ["root", "targets"], NOW, uri="file:keys/root.pem")


@pytest.mark.slow
@pytest.mark.parametrize("names", [["timestamp"], ["targets", "snapshot"], ["root"]], ids="-".join)
def test_kill_at_any_step_of_a_rotation_leaves_what_devices_accept_and_the_next_call_completes(fleet, tmp_path, names):
    one = fleet.publish(1)
    for at in range(1, 200):
        copy = Fleet.__new__(Fleet)
        copy.folder, copy.size = tmp_path / f"copy-{at}", 2000
        shutil.copytree(fleet.folder, copy.folder)
        killed = run_and_kill(lambda folder=copy.folder: roots.rotate(Custody(folder), names, NOW), at)
        device = copy.device(tmp_path / f"device-{at}")
        assert isinstance(install(copy, device, one), Installed)
        if roots.pending(copy.folder):
            roots.sign_pending(Custody(copy.folder), NOW)
        roots.rotate(Custody(copy.folder), names, NOW)
        assert isinstance(install(copy, device, copy.publish(2), deployment="d2"), Installed)
        if not killed:
            break
    assert at > 15


@pytest.mark.slow
def test_kill_at_any_step_of_the_last_signature_leaves_a_root_that_waits_or_is_in_force(shared, tmp_path):
    fleet, sticks = shared
    one = fleet.publish(1)
    roots.rotate(opened(fleet, sticks[0]), ["timestamp"], NOW)
    for at in range(1, 200):
        copy = Fleet.__new__(Fleet)
        copy.folder, copy.size = tmp_path / f"copy-{at}", 2000
        shutil.copytree(fleet.folder, copy.folder)
        killed = run_and_kill(lambda copy=copy: roots.sign_pending(opened(copy, sticks[1]), NOW), at)
        device = copy.device(tmp_path / f"device-{at}")
        assert isinstance(install(copy, device, one), Installed)
        if roots.pending(copy.folder):
            assert roots.sign_pending(opened(copy, sticks[1]), NOW).missing == 0
        assert metadata.current_root(copy.folder).signed.version == 2
        assert isinstance(install(copy, device, copy.publish(2), deployment="d2"), Installed)
        if not killed:
            break
    assert at > 10


@pytest.mark.slow
def test_kill_at_any_step_of_an_offline_init_leaves_a_folder_that_init_completes(tmp_path):
    keeping = publisher.Keeping(root_keys=3, root_threshold=2, encrypt=True, offline=tmp_path / "away")
    unlock = Unlock(ask=lambda _: "correct horse battery")
    for at in range(1, 300, 3):
        folder = tmp_path / f"fleet-{at}"
        if not run_and_kill(lambda folder=folder: publisher.init(folder, NOW, keeping, unlock), at):
            break
        if not metadata.place(folder, "timestamp").exists():
            publisher.init(folder, NOW, keeping, unlock)
        assert publisher.releases(folder) == []
        publisher.refresh(folder, NOW, unlock)
        shutil.rmtree(tmp_path / "away")
    assert at > 20


@pytest.mark.slow
def test_kill_while_a_lost_key_is_replaced_is_mended_by_the_next_refresh(fleet, tmp_path):
    one = fleet.publish(1)
    (fleet.folder / "keys" / "timestamp.pem").unlink()
    for at in range(1, 200):
        copy = Fleet.__new__(Fleet)
        copy.folder, copy.size = tmp_path / f"copy-{at}", 2000
        shutil.copytree(fleet.folder, copy.folder)
        killed = run_and_kill(lambda folder=copy.folder: roots.rotate(Custody(folder), ["timestamp"], NOW), at)
        if metadata.current_root(copy.folder).signed.version == 1:
            roots.rotate(Custody(copy.folder), ["timestamp"], NOW)
        publisher.refresh(copy.folder, NOW)
        assert isinstance(install(copy, copy.device(tmp_path / f"device-{at}"), one), Installed)
        if not killed:
            break
    assert at > 10

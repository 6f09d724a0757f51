"""Killed anywhere, the device comes up with the old bundle or the new one, whole, and the update then completes."""

import os
import shutil

import pytest
from fakes.fleets import NOW, PROFILE, Fleet, Serving, install, wish
from fakes.kills import run_and_kill
from hypothesis import given
from hypothesis import strategies as st

from edgekit import bundle
from edgekit.errors import BundleError, ResourceError
from edgekit.ota.device import slots, staging
from edgekit.ota.device.fetchers import FolderFetcher
from edgekit.ota.device.slots import State, Trial
from edgekit.ota.device.update import recover, update
from edgekit.ota.messages import Installed, RolledBack
from edgekit.ota.release import Release


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path / "fleet")


def a_release(version):
    return Release(model="digits", profile=PROFILE, version=version, bundle=f"{version:064x}")


def a_word(kind=Installed, version=1):
    extra = {"bundle": ""} if kind is Installed else {"reason": "x"}
    return kind(device="pi", deployment="d", attempt=1, version=version, **extra)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), max_size=12))
def test_rolling_back_always_returns_to_what_served_before(steps):
    state, confirmed = State(), None
    for healthy, version in steps:
        release = a_release(version)
        if release == state.current:
            continue
        trial = slots.committed(state, release, Trial(deployment="d", attempt=1))
        assert trial.current == release
        if healthy:
            state = slots.confirmed(trial, a_word())
            confirmed = release
            assert release.path not in state.rolled_back
        else:
            state = slots.rolled_back(trial, release, a_word(RolledBack))
            assert state.rolled_back[release.path] > 0
        assert state.trial is None
        assert state.current == confirmed


def test_failures_are_remembered_for_a_bounded_number_of_releases():
    state = State()
    for version in range(1, 250):
        state = slots.rolled_back(state, a_release(version), a_word(RolledBack))
    assert len(state.rolled_back) == slots.REMEMBERED
    assert a_release(249).path in state.rolled_back
    again = slots.rolled_back(state, a_release(249), a_word(RolledBack))
    assert again.rolled_back[a_release(249).path] == 2


def test_pointer_survives_the_disk(tmp_path):
    state = slots.committed(State(current=a_release(1)), a_release(2), Trial(deployment="d", attempt=3))
    state = slots.with_outcome(state, a_word(RolledBack), a_release(2).path)
    slots.save(tmp_path, state)
    assert slots.load(tmp_path) == state
    assert slots.load(tmp_path / "nowhere") == State()


@pytest.mark.parametrize("data", [b"", b"{", b'{"current": 1}', b"\xff"])
def test_damaged_pointer_is_named(tmp_path, data):
    (tmp_path / slots.STATE).write_bytes(data)
    with pytest.raises(ResourceError, match=r"state\.json is damaged"):
        slots.load(tmp_path)


def test_file_that_is_installed_already_is_not_fetched_again(fleet, tmp_path):
    device = fleet.device(tmp_path / "device")
    one, two = fleet.publish(1), fleet.publish(2)
    install(fleet, device, one)
    labels = next(e for e in FolderRecorder.entries(fleet, "2") if e.path == "labels.txt")
    fetcher = FolderRecorder(fleet.repository)
    update(device, wish(two), fetcher, NOW)
    assert f"blobs/{labels.sha256}" not in fetcher.paths
    assert any(p.startswith("blobs/") for p in fetcher.paths)
    held = bundle.read(slots.bundle_folder(device.state, two.bundle), PROFILE)
    assert held.path("labels.txt").read_bytes() == b"zero\none\n"


def test_damaged_file_is_not_reused(fleet, tmp_path):
    device = fleet.device(tmp_path / "device")
    one, two = fleet.publish(1), fleet.publish(2)
    install(fleet, device, one)
    (slots.bundle_folder(device.state, one.bundle) / "labels.txt").write_bytes(b"evil\nevil")
    assert isinstance(install(fleet, device, two), Installed)
    held = bundle.read(slots.bundle_folder(device.state, two.bundle), PROFILE)
    assert held.path("labels.txt").read_bytes() == b"zero\none\n"


def test_file_system_without_links_is_served_too(fleet, tmp_path, monkeypatch):
    device = fleet.device(tmp_path / "device")
    one, two = fleet.publish(1), fleet.publish(2)
    install(fleet, device, one)

    def refuse(*_args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert isinstance(install(fleet, device, two), Installed)


def test_only_the_current_and_the_previous_bundle_stay(fleet, tmp_path):
    device = fleet.device(tmp_path / "device")
    made = [fleet.publish(seed) for seed in (1, 2, 3)]
    for number, one in enumerate(made):
        install(fleet, device, one, deployment=f"d{number}")
    kept = {p.name for p in (device.state / "bundles").iterdir()}
    assert kept == {made[1].bundle, made[2].bundle}
    assert not (device.state / "staging").exists()


def test_staged_bundle_with_a_foreign_file_is_never_adopted(fleet, tmp_path):
    device = fleet.device(tmp_path / "device")
    one = fleet.publish(1)
    staging = slots.staging_folder(device.state, one.bundle)
    staging.mkdir(parents=True)
    (staging / "evil.so").write_bytes(b"x")
    with pytest.raises(BundleError, match="not listed"):
        install(fleet, device, one)
    assert not staging.exists()
    assert isinstance(install(fleet, device, one), Installed)


def test_remains_of_another_release_are_removed_before_the_next_download(fleet, tmp_path):
    device = fleet.device(tmp_path / "device")
    (device.state / "staging" / ("0" * 64)).mkdir(parents=True)
    install(fleet, device, fleet.publish(1))
    assert not (device.state / "staging").exists()


@pytest.mark.parametrize(
    ("wanted", "deployment"), [(3, "d3"), (3, "d4"), (4, "d4")], ids=["same wish", "same release", "next release"]
)
def test_bundle_that_a_kill_kept_from_being_collected_is_gone_before_the_next_has_to_fit(
    fleet, tmp_path, monkeypatch, wanted, deployment
):
    device = fleet.device(tmp_path / "device")
    made = [fleet.publish(seed) for seed in (1, 2, 3)]
    install(fleet, device, made[0])
    install(fleet, device, made[1], deployment="d2")
    monkeypatch.setattr(slots, "collect", lambda *_: None)  # as a kill right before it
    install(fleet, device, made[2], deployment="d3")
    monkeypatch.undo()
    made.append(fleet.publish(4))
    (device.state / ".state.json.abcdefgh").write_bytes(b"{")
    seen = []
    monkeypatch.setattr(staging, "require_space", lambda *_: seen.extend(bundles_of(device)))
    install(fleet, device, made[wanted - 1], deployment=deployment)
    assert made[0].bundle not in seen
    assert set(bundles_of(device)) == {made[wanted - 1].bundle, made[wanted - 2].bundle}
    assert not list(device.state.glob(".state.json.*"))


def bundles_of(device):
    return [path.name for path in (device.state / "bundles").iterdir()]


class FolderRecorder(FolderFetcher):
    """A folder fetcher that remembers what was read."""

    def __init__(self, repository):
        super().__init__(repository)
        self.paths = []

    def stream(self, path, start, end):
        self.paths.append(path)
        return super().stream(path, start, end)

    @staticmethod
    def entries(fleet, seed):
        return bundle.read(fleet.folder / "sealed" / seed).manifest.files


def whole(device):
    """Return the release the pointer names, after checking every byte of its bundle."""
    state = slots.load(device.state)
    opened = slots.open_current(device.state, state)
    assert (opened is None) == (state.current is None)
    return state.current


@pytest.mark.slow
@pytest.mark.parametrize("fail_at", ["", "try_out", "probation"], ids=["healthy", "fails try-out", "fails probation"])
def test_kill_at_any_step_of_an_update_leaves_the_old_or_the_new_bundle_whole(fleet, tmp_path, fail_at):
    one, two = fleet.publish(1), fleet.publish(2)
    points = 0
    install(fleet, fleet.device(tmp_path / "before"), one)
    for at in range(1, 300):
        shutil.copytree(tmp_path / "before", tmp_path / f"device-{at}")
        device = fleet.device(tmp_path / f"device-{at}", Serving(one.bundle, fail_at=fail_at))

        if not run_and_kill(lambda device=device: install(fleet, device, two, deployment="d2"), at):
            break
        points += 1
        assert whole(device) in (one, two)

        reborn = fleet.device(device.state, Serving(fail_at=fail_at))
        recover(reborn)
        assert reborn.serving.active == whole(reborn).bundle
        outcome = install(fleet, reborn, two, deployment="d2")
        if fail_at:
            assert isinstance(outcome, RolledBack)
            assert whole(reborn) == one
        else:
            assert isinstance(outcome, Installed)
            assert whole(reborn) == two
        assert reborn.serving.active == whole(reborn).bundle
        assert {p.name for p in (device.state / "bundles").iterdir()} <= {one.bundle, two.bundle}
        assert not list(device.state.glob(".state.json.*"))
    assert points > 30


@pytest.mark.slow
def test_kill_at_any_step_of_the_first_installation_leaves_nothing_or_the_whole_bundle(fleet, tmp_path):
    one = fleet.publish(1)
    for at in range(1, 300):
        device = fleet.device(tmp_path / f"device-{at}")
        if not run_and_kill(lambda device=device: install(fleet, device, one), at):
            break
        assert whole(device) in (None, one)
        recover(device)
        assert isinstance(install(fleet, device, one), Installed)
        assert whole(device) == one
    assert at > 30


def test_kill_during_recovery_is_recovered_from(fleet, tmp_path):
    one, two = fleet.publish(1), fleet.publish(2)
    before = fleet.device(tmp_path / "before")
    install(fleet, before, one)
    install(fleet, before, two, deployment="d2")
    slots.save(before.state, slots.on_trial(slots.load(before.state), Trial(deployment="d2", attempt=1)))
    for at in range(1, 100):
        shutil.copytree(before.state, tmp_path / f"device-{at}")
        device = fleet.device(tmp_path / f"device-{at}")
        killed = run_and_kill(lambda device=device: recover(device), at)
        recover(device)
        assert whole(device) in (one, two)
        assert device.serving.active == whole(device).bundle
        assert slots.load(device.state).trial is None
        if not killed:
            break
    assert at > 5

"""What the disk may do to a device: damage one slot, both, the pointer, or take no more writes. Something serves."""

import contextlib
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.fleets import FLEET, NOW, PROFILE, Fleet, Serving, eventually, install, tiny_bundle
from test_agent import HABITS, Town, damage

from edgekit import bundle
from edgekit.durable import BAD_BLOCK
from edgekit.errors import BundleError, ResourceError
from edgekit.ota.device import marks, slots
from edgekit.ota.device.agent import Agent
from edgekit.ota.device.factory import Factory
from edgekit.ota.device.needs import Capabilities
from edgekit.ota.device.update import Device, recover, retreat
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import Hello, Installed, Refused, RolledBack
from edgekit.runtime.sandbox import landlock


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path / "fleet")


@pytest.fixture
def shipped(tmp_path):
    return tiny_bundle(tmp_path / "image", 77)


@pytest.fixture
def story(fleet, tmp_path, shipped):
    """A device with a factory bundle on which version 2 serves, and version 1 did before."""
    made = fleet.device(tmp_path / "device")
    device = Device(made.name, PROFILE, made.state, Serving(), factory=Factory(shipped.folder, shipped.digest))
    one, two = fleet.publish(1), fleet.publish(2)
    install(fleet, device, one)
    install(fleet, device, two, deployment="d2")
    device.serving.active = None
    return device, one, two


def damage_state(device, *names):
    for name in names:
        (device.state / name).write_bytes(b'{"current": \x00\x00\x00')


def test_one_slot_damaged_and_the_other_serves(story):
    device, one, two = story
    damage(device, two)
    assert isinstance(recover(device), RolledBack)
    assert device.serving.active == one.bundle


def test_a_bad_block_under_the_installed_bundle_lets_the_one_before_serve_and_the_next_come(story, fleet, monkeypatch):
    device, one, two = story
    bad = slots.bundle_folder(device.state, two.bundle) / PROFILE / "model.onnx"
    read = bundle.hash_file

    def hash_file(path):
        if path == bad:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(bundle, "hash_file", hash_file)
    assert isinstance(recover(device), RolledBack)
    assert device.serving.active == one.bundle
    three = fleet.publish(3)
    assert isinstance(install(fleet, device, three, deployment="d3"), Installed)
    assert device.serving.active == three.bundle


def test_both_slots_damaged_and_the_factory_bundle_serves_until_the_wish_is_fetched_anew(story, fleet, shipped):
    device, one, two = story
    damage(device, one)
    damage(device, two)
    recover(device)
    assert device.serving.active == shipped.digest
    assert slots.load(device.state).dark
    again = Device(device.name, PROFILE, device.state, Serving(), factory=device.factory)
    recover(again)
    assert again.serving.active == shipped.digest, "and after every restart"
    assert isinstance(install(fleet, again, two, deployment="d2"), Installed)
    assert again.serving.active == two.bundle
    assert not slots.load(device.state).dark
    assert again.factory.open(PROFILE, None).digest == shipped.digest, "it is only read"


def test_a_wish_that_was_answered_is_fetched_anew_once_its_only_bundle_is_lost(fleet, tmp_path, shipped):
    made = fleet.device(tmp_path / "d")
    device = Device(made.name, PROFILE, made.state, Serving(), factory=Factory(shipped.folder))
    one = fleet.publish(1)
    install(fleet, device, one)
    damage(device, one)
    assert recover(device) is None
    assert device.serving.active == shipped.digest
    assert isinstance(install(fleet, device, one), Installed)
    assert device.serving.active == one.bundle


def test_a_bundle_that_is_whole_but_does_not_come_up_gives_way_and_is_tried_at_the_next_start(fleet, tmp_path, shipped):
    made = fleet.device(tmp_path / "d")
    one = fleet.publish(1)
    install(fleet, made, one)
    device = Device(made.name, PROFILE, made.state, Serving(fail_at="activate"), factory=Factory(shipped.folder))
    recover(device)
    assert device.serving.active == shipped.digest
    recover(device)
    assert device.serving.active == one.bundle
    assert not slots.load(device.state).dark


def test_the_first_bundle_that_fails_gives_way_to_the_factorys(fleet, tmp_path, shipped):
    made = fleet.device(tmp_path / "d")
    device = Device(made.name, PROFILE, made.state, Serving(fail_at="probation"), factory=Factory(shipped.folder))
    recover(device)
    assert device.serving.active == shipped.digest
    assert isinstance(install(fleet, device, fleet.publish(1)), RolledBack)
    assert device.serving.active == shipped.digest


@pytest.mark.parametrize("how", ["damaged", "another", "missing", "another class's"])
def test_a_factory_bundle_that_is_not_what_it_should_be_is_not_served(story, how):
    device, one, two = story
    damage(device, one)
    damage(device, two)
    folder, profile = device.factory.folder, PROFILE
    if how == "damaged":
        (folder / "labels.txt").write_bytes(b"evil\nevil")
    if how == "missing":
        folder = folder.with_name("nowhere")
    factory = Factory(folder, "0" * 64 if how == "another" else "")
    if how == "another class's":
        factory, profile = Factory(folder), "pixel-8"
    recover(Device(device.name, profile, device.state, device.serving, factory=factory))
    assert device.serving.active is None


def test_the_factory_bundle_is_opened_in_the_variant_that_runs(tmp_path):
    from test_variants import FP32, INT8, sealed

    made = sealed(tmp_path / "image")
    assert Factory(made.folder).open(PROFILE, None).variant == INT8
    old = Capabilities(frozenset({"onnx"}), {"onnxruntime": "1.2"})
    assert Factory(made.folder).open(PROFILE, old).variant == FP32
    with pytest.raises(BundleError, match="no variant of"):
        Factory(made.folder).open(PROFILE, Capabilities(frozenset()))


def test_a_fleet_sees_a_device_that_lost_its_bundles_as_one_without_and_brings_it_back(tmp_path, shipped):
    town = Town(tmp_path, MemoryBroker().connect)
    one = town.fleet.publish(1)
    made = town.fleet.device(town.folder / "device")
    install(town.fleet, made, one)
    damage(made, one)
    device = Device(made.name, PROFILE, made.state, Serving(), factory=Factory(shipped.folder))
    agent = Agent(FLEET, device, HABITS)
    agent.clock = lambda: NOW
    agent.start(lambda will: town.connect("pi-1", will=will))
    town.agents.append(agent)
    hello = town.heard(Hello)
    assert (hello.release, hello.version, hello.bundle, device.serving.active) == ("", 0, "", shipped.digest)
    town.want(one)
    town.heard(Installed)
    eventually(lambda: [word for word in town.said if isinstance(word, Hello)][-1].bundle == one.bundle)
    assert device.serving.active == one.bundle
    town.end()


@pytest.mark.parametrize("damaged", [slots.STATE, slots.COPY])
def test_one_damaged_copy_of_the_pointer_changes_nothing(story, fleet, damaged):
    device, _, two = story
    before = slots.load(device.state)
    damage_state(device, damaged)
    assert slots.load(device.state) == before
    recover(device)
    assert device.serving.active == two.bundle
    three = fleet.publish(3)
    assert isinstance(install(fleet, device, three, deployment="d3"), Installed)
    for name in (slots.STATE, slots.COPY):
        assert json.loads((device.state / name).read_bytes())["current"]["version"] == 3


def test_a_lost_pointer_begins_anew_keeps_what_is_damaged_and_allows_no_way_back(story, fleet, shipped):
    device, one, two = story
    damage_state(device, slots.STATE, slots.COPY)
    recover(device)
    assert device.serving.active == shipped.digest
    assert (device.state / f"{slots.STATE}.damaged").exists()
    assert marks.load(device.state).versions == {"digits": 2}
    word = install(fleet, device, one, deployment="attack")
    assert isinstance(word, Refused)
    assert "back from version 2 to 1" in word.reason
    (fleet.repository / "blobs").rename(fleet.repository / "gone")
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed), "its bytes are here"
    assert device.serving.active == two.bundle


def test_a_pointer_that_is_damaged_while_the_agent_runs_is_mended_by_the_next_wish(story, fleet):
    device, _, two = story
    recover(device)
    damage_state(device, slots.STATE, slots.COPY)
    with pytest.raises(ResourceError):
        slots.load(device.state)
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)
    assert device.serving.active == two.bundle


def test_after_a_rollback_a_lost_pointer_lets_the_confirmed_version_come_back(story, fleet):
    device, _, two = story
    device.serving.fail_at = "probation"
    assert isinstance(install(fleet, device, fleet.publish(3), deployment="d3"), RolledBack)
    damage_state(device, slots.STATE, slots.COPY)
    assert isinstance(install(fleet, device, two, deployment="d4"), Installed)


READ_ONLY = """
import sys
from pathlib import Path
from fakes.fleets import Fleet, Serving, FolderFetcher, NOW, PROFILE, Device, update
from edgekit.ota.device import slots
from edgekit.errors import ResourceError
from edgekit.ota.device.update import recover
from edgekit.ota.messages import Desired
from edgekit.runtime.sandbox import landlock

assert not landlock.restrict([Path("/")], [])
state, repository, release, version = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
device = Device("pi-1", PROFILE, state, Serving())
held = slots.lock(state)
recover(device)
try:
    wanted = Desired(deployment="d3", attempt=1, release=release, version=version)
    update(device, wanted, FolderFetcher(repository), NOW)
except (OSError, ResourceError) as error:
    print(device.serving.active, error)
"""


@pytest.mark.skipif(not landlock.version(), reason="this kernel cannot take the right to write from a process")
@pytest.mark.parametrize("trial", [False, True], ids=["settled", "on probation"])
def test_a_disk_that_takes_no_writes_serves_on_after_a_restart_too_and_fails_to_update(story, fleet, trial):
    device, _, two = story
    three = fleet.publish(3)
    if trial:
        state = slots.load(device.state)
        slots.save(device.state, slots.on_trial(state, slots.Trial(deployment="d2", attempt=1)))
    slots.lock(device.state).close()
    command = [sys.executable, "-c", READ_ONLY, device.state, fleet.repository, three.path, "3"]
    tests = Path(__file__).parents[1]
    env = {"PYTHONPATH": ":".join([str(tests), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert not done.returncode, done.stderr
    active, why = done.stdout.split(maxsplit=1)
    assert active == two.bundle
    assert ("is not settled, nothing is installed before" if trial else "Permission denied") in why


def test_the_old_bundle_goes_only_after_the_new_one_is_confirmed(story, fleet):
    device, one, two = story
    seen = {}

    class Watching(Serving):
        def _step(self, name, digest):
            super()._step(name, digest)
            seen[name] = {path.name for path in (device.state / "bundles").iterdir()}

    three = fleet.publish(3)
    install(fleet, Device(device.name, PROFILE, device.state, Watching()), three, deployment="d3")
    assert seen["probation"] == {one.bundle, two.bundle, three.bundle}
    assert {path.name for path in (device.state / "bundles").iterdir()} == {two.bundle, three.bundle}
    for name in (two.bundle, three.bundle):
        bundle.read(slots.bundle_folder(device.state, name), PROFILE)


def test_a_wish_for_what_is_whole_but_did_not_come_up_tries_it_again(fleet, tmp_path):
    made = fleet.device(tmp_path / "d")
    one = fleet.publish(1)
    install(fleet, made, one)
    device = Device(made.name, PROFILE, made.state, Serving(fail_at="activate"))
    recover(device)
    assert device.serving.active is None
    assert isinstance(install(fleet, device, one), Installed)
    assert device.serving.active == one.bundle


def test_after_a_retreat_a_lost_pointer_lets_the_version_come_back_that_the_device_went_back_to(story, fleet):
    device, _, two = story
    three = fleet.publish(3)
    assert isinstance(install(fleet, device, three, deployment="d3"), Installed)
    assert isinstance(retreat(device, three.bundle, "it crashes"), RolledBack)
    damage_state(device, slots.STATE, slots.COPY)
    assert isinstance(install(fleet, device, two, deployment="d4"), Installed)


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def cut(story, fleet):
    """The story's device, killed while version 3 was on probation; and what wants version 4, too."""
    device, _, two = story
    three, four = fleet.publish(3), fleet.publish(4)
    device.serving.fail_at = ""
    real, device.serving.probation = device.serving.probation, lambda _: (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        install(fleet, device, three, deployment="d3")
    device.serving.probation = real
    device.serving.calls.clear()
    return device, two, three, four


def refusing(monkeypatch, number):
    """Let one write of the pointer find no room, and return how many there were."""
    written, save = [], slots.save

    def once(folder, state):
        written.append(state)
        if len(written) == number:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / slots.STATE))
        save(folder, state)

    monkeypatch.setattr(slots, "save", once)
    return written


@pytest.mark.parametrize("number", [1, 2], ids=["before the probation", "after it"])
@pytest.mark.parametrize("newer", [False, True], ids=["the same wish", "a newer one"])
def test_a_full_disk_while_a_probation_is_settled_skips_no_probation_and_keeps_the_way_back(
    cut, fleet, monkeypatch, number, newer
):
    device, two, three, four = cut
    before = slots.load(device.state)
    wanted, deployment = (four, "d4") if newer else (three, "d3")
    refusing(monkeypatch, number)
    with pytest.raises(ResourceError, match=f"probation of {three.path} is not settled"):
        install(fleet, device, wanted, deployment=deployment)
    assert device.serving.active == three.bundle
    assert slots.load(device.state) == before, "nor does that start count against it"
    assert {path.name for path in (device.state / "bundles").iterdir()} >= {two.bundle, three.bundle}
    device.serving.calls.clear()
    assert isinstance(install(fleet, device, wanted, deployment=deployment), Installed)
    proven = [digest for name, digest in device.serving.calls if name == "probation"]
    assert proven == ([three.bundle, four.bundle] if newer else [three.bundle])
    assert slots.load(device.state).trial is None


class Strict(Serving):
    """Finds some bundles wanting, each time."""

    bad = ()

    def probation(self, release):
        self.fail_at = "probation" if release.bundle in self.bad else ""
        return super().probation(release)


@pytest.mark.parametrize("is_good", [True, False], ids=["3 is good", "3 is bad"])
def test_a_full_disk_at_any_write_of_an_update_over_an_unsettled_one_ends_with_what_is_proven(
    cut, fleet, monkeypatch, tmp_path, is_good
):
    """Version 3 is not proven yet and version 4 is bad."""
    device, two, three, four = cut
    for number in range(1, 12):
        copy = Device(device.name, PROFILE, tmp_path / f"at-{number}", Strict())
        copy.serving.bad = (four.bundle,) if is_good else (three.bundle, four.bundle)
        shutil.copytree(device.state, copy.state)
        with monkeypatch.context() as patched:
            written = refusing(patched, number)
            with contextlib.suppress(OSError, ResourceError):
                install(fleet, copy, four, deployment="d4")
        recover(copy)
        state = slots.load(copy.state)
        assert state.current == (three if is_good else two), number
        assert copy.serving.active == slots.open_current(copy.state, state).digest, number
        if len(written) < number:
            break
    assert 3 < number < 11


def unreadable(monkeypatch, *names, code=errno.EIO):
    """Put a bad block under files of these names: reading them fails, and writing anew takes another block."""
    read = Path.read_bytes

    def broken(path):
        if path.name in names and path.exists():
            raise OSError(code, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", broken)


@pytest.mark.parametrize("code", BAD_BLOCK)
def test_bad_blocks_under_the_pointer_and_its_copy_begin_anew_and_allow_no_way_back(
    story, fleet, monkeypatch, shipped, code
):
    device, one, two = story
    kept = {name: (device.state / name).read_bytes() for name in (slots.STATE, slots.COPY)}
    with monkeypatch.context() as patched:
        unreadable(patched, *kept, code=code)
        recover(device)
    assert device.serving.active == shipped.digest
    assert {name: (device.state / f"{name}.damaged").read_bytes() for name in kept} == kept
    assert isinstance(install(fleet, device, one, deployment="attack"), Refused)
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)


def test_a_bad_block_under_the_pointer_alone_changes_nothing(story, monkeypatch):
    device, _, two = story
    with monkeypatch.context() as patched:
        unreadable(patched, slots.STATE)
        recover(device)
    assert device.serving.active == two.bundle
    assert not list(device.state.glob("*.damaged"))


def test_bad_blocks_on_a_disk_that_takes_no_writes_let_the_factory_bundle_serve(story, monkeypatch, shipped):
    device, _, _ = story
    unreadable(monkeypatch, slots.STATE, slots.COPY)
    monkeypatch.setattr(
        Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system"))
    )
    assert recover(device) is None
    assert device.serving.active == shipped.digest
    device.serving.active = None
    agent = Agent(FLEET, device, HABITS)
    agent.start(lambda will: MemoryBroker().connect("pi-1", will=will))
    agent.stop()
    assert device.serving.active == shipped.digest


def test_a_folder_in_which_no_pointer_can_be_read_any_more_lets_the_factory_bundle_serve(
    story, fleet, monkeypatch, shipped
):
    """Its own blocks are bad: what is put aside is as bad as what stays."""
    device, one, _ = story
    read = Path.read_bytes

    def broken(path):
        if path.name in (slots.STATE, slots.COPY):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    assert recover(device) is None
    assert device.serving.active == shipped.digest
    with pytest.raises(ResourceError, match=r"state\.json cannot be read"):
        install(fleet, device, one, deployment="d3")
    assert device.serving.active == shipped.digest


def test_a_pointer_that_cannot_be_opened_for_now_is_not_put_aside_because_its_copy_is_damaged(story, monkeypatch):
    device, _, two = story
    damage_state(device, slots.COPY)
    with monkeypatch.context() as patched:
        unreadable(patched, slots.STATE, code=errno.EMFILE)
        with pytest.raises(OSError, match="Input/output"):
            slots.mend(device.state)
    assert slots.load(device.state).current == two


def test_a_bad_block_under_the_marks_costs_no_update(story, fleet, monkeypatch, caplog):
    device, one, _ = story
    unreadable(monkeypatch, marks.FILE)
    assert isinstance(install(fleet, device, fleet.publish(3), deployment="d3"), Installed)
    assert "marks.json is damaged and begun anew" in caplog.text
    assert isinstance(install(fleet, device, one, deployment="attack"), Refused), "the state forbids the way back"


def test_marks_that_cannot_be_opened_for_now_are_not_begun_anew(story, monkeypatch):
    device, _, _ = story
    unreadable(monkeypatch, marks.FILE, code=errno.EMFILE)
    with pytest.raises(OSError, match="Input/output"):
        marks.load(device.state)

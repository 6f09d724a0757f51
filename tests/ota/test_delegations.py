"""A role per model, bins where one grows too long: names never collide, roles stay short, devices find all."""

import json
import re
from datetime import timedelta

import pytest
from fakes.fleets import NOW, PROFILE, Fleet, install
from hypothesis import example, given
from hypothesis import strategies as st
from tuf.api.metadata import Metadata, TargetFile, Targets

from edgekit.errors import ResourceError, UsageError
from edgekit.ota import messages
from edgekit.ota.messages import BlockRequest, Installed
from edgekit.ota.release import Release, to_custom
from edgekit.ota.server import catalogue, delegations, metadata, publisher
from edgekit.ota.server.draft import Draft
from edgekit.ota.server.keys import Custody

MODELS = st.text("ABCXYZabcxyz019._-", min_size=1, max_size=100).filter(lambda name: name[0].isalnum())


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path / "fleet")


def some(model, count):
    """Make that many releases of a model, each of its own class, as targets."""
    made = {}
    for number in range(1, count + 1):
        release = Release(model=model, profile=f"class-{number}", version=1, bundle="a" * 64)
        target = TargetFile.from_data(release.path, b"manifest", ["sha256"])
        target.unrecognized_fields["custom"] = to_custom(release)
        made[release.path] = target
    return made


def lengths(folder):
    draft = Draft.of(Custody(folder), NOW)
    return {name: len(draft.role(name).targets) for name in draft.roles()}


@given(MODELS, MODELS)
def test_no_two_models_share_a_role_also_where_a_disk_knows_no_upper_case(one, other):
    roles = {delegations.role_of(one).lower(), delegations.role_of(other).lower()}
    assert len(roles) == (1 if one == other else 2)
    assert delegations.model_of(delegations.role_of(one)) == one


@example("X" * 100, 2, 255)
@given(MODELS, st.integers(1, 2), st.integers(0, 255))
def test_every_role_can_be_asked_for_over_the_wire_and_its_parent_is_known(model, digits, number):
    role = delegations.role_of(model)
    bin_ = delegations._bin(role, f"{number % 16**digits:0{digits}x}")
    for name, parent in ((role, "targets"), (bin_, role)):
        assert delegations.parent_of(name) == parent
        request = BlockRequest(path=f"metadata/999999999.{name}.json", offset=0, length=1)
        assert messages.decode(messages.encode(request), BlockRequest) == request


@given(MODELS, st.lists(st.text("abcdef0123456789", min_size=1, max_size=8), unique=True, max_size=60))
def test_every_target_lies_in_exactly_one_role_and_where_its_hash_says(model, names):
    role = delegations.role_of(model)
    targets = {f"models/{model}/{name}/1.json": TargetFile.from_data("x", name.encode()) for name in names}
    for digits in (0, 1, 2):
        told, parts = delegations.split(role, targets, digits)
        assert told == digits
        assert sorted(path for part in parts.values() for path in part) == sorted(targets)
        parent = Targets()
        delegations.delegate(parent, role, key())
        if digits:
            delegations.spread(parent, role, digits, key())
            for name, part in parts.items():
                for path in part:
                    assert [found for found, _ in parent.delegations.get_roles_for_target(path)] == [name]


def key():
    from securesystemslib.signer import SSlibKey

    return SSlibKey("ab" * 32, "ed25519", "ed25519", {"public": "00" * 32})


def test_a_model_is_signed_in_a_role_of_its_own_and_the_top_stays_as_it_is(fleet):
    fleet.publish(1)
    first = (fleet.repository / "metadata" / "2.targets.json").read_bytes()
    fleet.publish(2)
    fleet.publish(3, model="Cats_v1.0")
    assert lengths(fleet.folder) == {"targets": 0, "model-digits": 4, "model-_cats__v1.0": 2}
    assert (fleet.repository / "metadata" / "2.targets.json").read_bytes() == first
    assert not (fleet.repository / "metadata" / "4.targets.json").exists()


@pytest.mark.slow
def test_a_role_that_grows_too_long_is_spread_and_devices_still_find_the_old_and_the_new(fleet, tmp_path, monkeypatch):
    monkeypatch.setattr(delegations, "MAX_TARGETS", 20)
    device = fleet.device(tmp_path / "device")
    one = fleet.publish(1)
    assert isinstance(install(fleet, device, one), Installed)
    draft = Draft.of(Custody(fleet.folder), NOW)
    book = catalogue.gather(draft, "digits")
    book.targets |= some("digits", 100)
    catalogue.settle(draft, "digits", book)
    draft.commit()
    found = lengths(fleet.folder)
    assert len(found) == 18
    assert found["model-digits"] == 0
    assert max(found.values()) <= 20
    two = fleet.publish(2)
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)
    assert isinstance(install(fleet, fleet.device(tmp_path / "new"), one), Installed)
    before = lengths(fleet.folder)
    draft = Draft.of(Custody(fleet.folder), NOW)
    book = catalogue.gather(draft, "digits")
    book.targets |= some("digits", 400)
    catalogue.settle(draft, "digits", book)
    draft.commit()
    assert len(lengths(fleet.folder)) == 258 > len(before)
    three = fleet.publish(3)
    assert isinstance(install(fleet, device, three, deployment="d3"), Installed)  # bins that are no more stay listed


def test_only_the_bin_of_a_new_release_is_signed_anew(fleet, monkeypatch):
    monkeypatch.setattr(delegations, "MAX_TARGETS", 2)
    for seed in range(1, 4):
        fleet.publish(seed)

    def versions():
        draft = Draft.of(Custody(fleet.folder), NOW)
        return {name: draft.role(name).version for name in draft.roles()}

    before = versions()
    fleet.publish(4)
    changed = {name for name, version in versions().items() if version != before[name]}
    assert 1 <= len(changed) <= 2
    assert all(name.startswith("bins-digits-") for name in changed)


def test_more_releases_than_all_bins_hold_are_refused(monkeypatch):
    monkeypatch.setattr(delegations, "MAX_TARGETS", 0)
    with pytest.raises(ResourceError, match="more than 256 bins"):
        delegations.split("model-m", some("m", 1))


@pytest.mark.slow
def test_a_device_finds_its_release_among_hundreds_of_models(fleet, tmp_path):
    draft = Draft.of(Custody(fleet.folder), NOW)
    for number in range(300):
        model = f"model-{number}"
        catalogue.settle(draft, model, Targets(targets=some(model, 1)))
    draft.commit()
    device = fleet.device(tmp_path / "device")
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)
    cached = {path.name for path in (device.state / "metadata").glob("model-*.json")}
    assert cached == {"model-digits.json"}


def flat(fleet):
    """Take a fleet back to what was written before there were delegations: all targets in the top-level role."""
    draft = Draft.of(Custody(fleet.folder), NOW)
    every = {path: t for role in draft.roles() for path, t in draft.role(role).targets.items()}
    top = draft.change("targets")
    top.targets, top.delegations = every, None
    draft._meta = {"targets.json": draft._meta["targets.json"]}
    draft.commit()
    for path in (fleet.repository / "metadata").glob("*.model-*"):
        path.unlink()
    (fleet.folder / "keyring.json").unlink()


def test_a_repository_of_before_delegations_is_read_and_migrates_at_the_next_publish(fleet, tmp_path):
    one = fleet.publish(1)
    flat(fleet)
    device = fleet.device(tmp_path / "device")
    assert [r for r in publisher.releases(fleet.folder) if r.profile == PROFILE] == [one]
    assert isinstance(install(fleet, device, one), Installed)
    publisher.refresh(fleet.folder, NOW + timedelta(days=1))
    two = fleet.publish(2)
    assert two.version == 2
    assert lengths(fleet.folder) == {"targets": 0, "model-digits": 4}
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)
    assert json.loads((fleet.folder / "keyring.json").read_text())["keys"]


def test_a_model_may_have_a_key_of_its_own_from_its_first_release_on(fleet, tmp_path, monkeypatch):
    pem = fleet.folder / "keys" / "cats.pem"
    Custody(fleet.folder).make("cats", pem.parent, encrypted=False)
    release = fleet.publish(1, model="cats", key="file:keys/cats.pem")
    assert isinstance(install(fleet, fleet.device(tmp_path / "device"), release), Installed)
    fleet.publish(2, model="cats")
    digits = fleet.publish(3)
    draft = Draft.of(Custody(fleet.folder), NOW)
    assert draft.key_of("model-cats").keyid != draft.key_of("model-digits").keyid
    (fleet.folder / "keys" / "targets.pem").rename(tmp_path / "away.pem")
    assert fleet.publish(4, model="cats").version == 3  # needs the team's key and the online ones only
    with pytest.raises(UsageError, match="is signed by key"):
        fleet.publish(5, model="cats", key="file:keys/root.pem")
    assert digits.version == 1


def test_metadata_that_the_device_keeps_is_named_so_that_no_disk_mixes_it_up(fleet, tmp_path):
    for number, model in enumerate(("cats", "CATS", "c.ats", "c_ats")):
        fleet.publish(number, model=model)
    names = [path.name for path in (fleet.repository / "metadata").iterdir()]
    assert all(re.fullmatch(r"[0-9a-z._-]+", name) for name in names)
    assert {n.split(".", 1)[1] for n in names if "model" in n} == {
        "model-cats.json", "model-_c_a_t_s.json", "model-c.ats.json", "model-c__ats.json",
    }  # fmt: skip
    assert isinstance(Metadata.from_file(str(metadata.place(fleet.folder, "1.model-_c_a_t_s"))).signed, Targets)

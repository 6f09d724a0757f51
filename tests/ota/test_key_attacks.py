"""Attacks by somebody who holds keys: stolen, revoked, too few, of another model; and what a device does then."""

import json

import pytest
from fakes.fleets import NOW, Fleet, install, signer, wish
from securesystemslib.signer import CryptoSigner, SSlibKey
from test_attacks import withstood
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, TargetFile

from edgekit.errors import TrustError
from edgekit.ota.device.trust import Unproven
from edgekit.ota.messages import Installed
from edgekit.ota.release import to_custom
from edgekit.ota.server import delegations, metadata, publisher, roots
from edgekit.ota.server.draft import Draft
from edgekit.ota.server.keys import Custody


@pytest.fixture
def story(tmp_path):
    """A fleet of 2 of 3 root keys, a device on which version 1 serves, and version 2 published."""
    fleet = Fleet.__new__(Fleet)
    fleet.folder, fleet.size = tmp_path / "fleet", 2000
    publisher.init(fleet.folder, NOW, publisher.Keeping(root_keys=3, root_threshold=2))
    device = fleet.device(tmp_path / "victim")
    one = fleet.publish(1)
    assert isinstance(install(fleet, device, one), Installed)
    return fleet, device, one, fleet.publish(2)


def next_root(fleet, change, *signers):
    """Write the next root as somebody would who has these keys."""
    made = metadata.current_root(fleet.folder)
    made.signed.version += 1
    change(made.signed)
    made.signatures.clear()
    for one in signers:
        made.sign(one, append=True)
    path = metadata.place(fleet.folder, f"{made.signed.version}.root")
    path.write_bytes(made.to_bytes())
    return path


def stolen(fleet, number):
    trusted = metadata.current_root(fleet.folder).signed
    return Custody(fleet.folder).signer(trusted.get_key(trusted.roles["root"].keyids[number]))


def nothing(_root):
    pass


def test_root_keys_below_the_threshold_take_nothing_over(story):
    mine = CryptoSigner.generate_ed25519()

    def usurp(root):
        for role in root.roles.values():
            role.keyids, role.threshold = [mine.public_key.keyid], 1
        root.keys[mine.public_key.keyid] = mine.public_key

    next_root(story[0], usurp, stolen(story[0], 0), mine)
    withstood(story, "not to be trusted")


def test_a_new_root_that_its_own_keys_did_not_sign_is_refused(story):
    def orphan(root):
        root.roles["root"].keyids = [CryptoSigner.generate_ed25519().public_key.keyid]

    next_root(story[0], orphan, stolen(story[0], 0), stolen(story[0], 1))
    withstood(story, "not to be trusted")


@pytest.mark.parametrize("threshold", [0, -1])
@pytest.mark.parametrize("role", ["root", "targets", "timestamp"])
def test_threshold_of_none_is_refused_whoever_signed_it(story, role, threshold):
    path = next_root(story[0], nothing, stolen(story[0], 0), stolen(story[0], 1))
    document = json.loads(path.read_bytes())
    document["signed"]["roles"][role]["threshold"] = threshold
    path.write_text(json.dumps(document))
    withstood(story, "not to be trusted")


def test_one_key_that_is_named_twice_is_one_key(story):
    fleet = story[0]
    one = stolen(fleet, 0)
    path = next_root(fleet, nothing, one)
    document = json.loads(path.read_bytes())
    document["signatures"] *= 2
    path.write_text(json.dumps(document))
    withstood(story, "not to be trusted")
    document["signatures"] = document["signatures"][:1]
    document["signed"]["roles"]["root"]["keyids"] = [one.public_key.keyid] * 2
    path.write_text(json.dumps(document))
    withstood(story, "not to be trusted")


def test_one_key_under_two_ids_does_not_outvote_the_root_before(story):
    fleet = story[0]
    one = stolen(fleet, 0)
    public = one.public_key
    alias = SSlibKey("f" * 64, public.keytype, public.scheme, public.keyval)

    def doubled(root):
        root.keys[alias.keyid] = alias
        root.roles["root"].keyids = [public.keyid, alias.keyid]

    next_root(fleet, doubled, one, CryptoSigner(one._private_key, alias))
    withstood(story, "not to be trusted")


def test_root_that_leaves_a_version_out_is_not_followed(story):
    fleet = story[0]
    path = next_root(fleet, nothing, stolen(fleet, 0), stolen(fleet, 1))
    path.rename(metadata.place(fleet.folder, "3.root"))
    assert isinstance(install(fleet, story[1], story[3], deployment="d2"), Installed)


def forge(fleet, number, *, signers):
    """Publish snapshot and timestamp of a version so high that nothing honest ever comes after it."""
    old = metadata.read(fleet.folder, "timestamp")
    snapshot = metadata.read(fleet.folder, f"{old.signed.snapshot_meta.version}.snapshot")
    snapshot.signed.version = old.signed.version = number
    snapshot.sign(signers["snapshot"])
    data = snapshot.to_bytes()
    metadata.place(fleet.folder, f"{number}.snapshot").write_bytes(data)
    old.signed.snapshot_meta = MetaFile.from_data(number, data, ["sha256"])
    old.sign(signers["timestamp"])
    metadata.place(fleet.folder, "timestamp").write_bytes(old.to_bytes())


def test_revoked_key_signs_nothing_any_more(story):
    fleet = story[0]
    thief = {role: signer(fleet, role) for role in ("snapshot", "timestamp")}
    roots.rotate(Custody(fleet.folder), ["timestamp"], NOW, is_compromised=True)
    forge(fleet, 50, signers=thief)
    withstood(story, "not to be trusted")


def test_revoked_targets_key_signs_nothing_any_more_even_with_the_online_keys(story):
    fleet = story[0]
    old = signer(fleet, "targets")
    roots.rotate(Custody(fleet.folder), ["targets"], NOW, is_compromised=True)
    draft = Draft.of(Custody(fleet.folder), NOW)
    role = draft.change("model-digits")
    sealed = dict(draft.seal())
    forged = Metadata(role)
    forged.sign(old)
    name = f"{role.version}.model-digits"
    metadata.write(fleet.folder, name, forged.to_bytes())
    draft._meta["model-digits.json"] = MetaFile.from_data(role.version, forged.to_bytes(), ["sha256"])
    draft._changed.clear()
    draft.write(draft.seal())
    assert name in sealed
    withstood(story, "not to be trusted")


@pytest.mark.parametrize("role", ["timestamp", "snapshot"])
def test_versions_that_a_thief_ran_up_are_forgotten_once_the_keys_are_revoked(story, role):
    fleet, device, _, two = story
    before = {path.name: path.read_bytes() for path in (fleet.repository / "metadata").iterdir()}
    forge(fleet, 10**9, signers={name: signer(fleet, name) for name in ("snapshot", "timestamp")})
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)  # it is signed: the device takes it
    for path in (fleet.repository / "metadata").iterdir():  # the operator restores what he has
        path.unlink()
    for name, data in before.items():
        (fleet.repository / "metadata" / name).write_bytes(data)
    three = fleet.publish(3)
    with pytest.raises(Unproven, match="not to be trusted"):
        install(fleet, device, three, deployment="d3")
    roots.rotate(Custody(fleet.folder), [role], NOW, is_compromised=True)
    assert isinstance(install(fleet, device, three, deployment="d3"), Installed)


def of_its_own(fleet):
    """Give the model cats a key that a team holds; return its signer."""
    custody = Custody(fleet.folder)
    key = custody.make("cats", fleet.folder / "keys", encrypted=False)
    fleet.publish(7, model="cats", key="file:keys/cats.pem")
    return custody.signer(key)


def put(fleet, role, signed, by):
    """Write a targets role signed by somebody, with the online keys' signatures around it."""
    signed.expires = metadata.expiry(role, NOW)
    made = Metadata(signed)
    made.sign(by)
    draft = Draft.of(Custody(fleet.folder), NOW)
    metadata.write(fleet.folder, f"{signed.version}.{role}", made.to_bytes())
    draft._meta[f"{role}.json"] = MetaFile.from_data(signed.version, made.to_bytes(), ["sha256"])
    draft.write(draft.seal())


def forged_release(fleet, two):
    """Return a release of version 3 whose content lies in the repository, as a target."""
    three = type(two)(model=two.model, profile=two.profile, version=3, bundle=two.bundle)
    data = (fleet.repository / "targets" / f"models/digits/{two.profile}/{two.bundle}.2.json").read_bytes()
    (fleet.repository / "targets" / f"models/digits/{two.profile}/{two.bundle}.3.json").write_bytes(data)
    target = TargetFile.from_data(three.path, data, ["sha256"])
    target.unrecognized_fields["custom"] = to_custom(three)
    return three, target


def test_the_key_of_one_model_signs_nothing_of_another(story):
    fleet, _, _, two = story
    team = of_its_own(fleet)
    three, target = forged_release(fleet, two)
    role = Draft.of(Custody(fleet.folder), NOW).change("model-cats")
    role.targets[three.path] = target
    put(fleet, "model-cats", role, team)
    withstood(story, "nobody signed", wish(three, deployment="attack"))


def test_the_key_of_the_model_that_was_there_first_signs_nothing_of_another(tmp_path):
    fleet = Fleet(tmp_path / "fleet")
    team = of_its_own(fleet)
    device = fleet.device(tmp_path / "victim")
    one = fleet.publish(1)
    assert isinstance(install(fleet, device, one), Installed)
    two = fleet.publish(2)
    three, target = forged_release(fleet, two)
    role = Draft.of(Custody(fleet.folder), NOW).change("model-cats")
    role.targets[three.path] = target
    put(fleet, "model-cats", role, team)
    withstood((fleet, device, one, two), "nobody signed", wish(three, deployment="attack"))


def test_the_key_of_one_model_does_not_sign_as_the_role_of_another(story):
    fleet, _, _, two = story
    team = of_its_own(fleet)
    three, target = forged_release(fleet, two)
    role = Draft.of(Custody(fleet.folder), NOW).change("model-digits")
    role.targets[three.path] = target
    put(fleet, "model-digits", role, team)
    withstood(story, "not to be trusted", wish(three, deployment="attack"))


def test_a_model_cannot_delegate_what_it_was_not_given(story):
    fleet, _, _, two = story
    team = of_its_own(fleet)
    three, target = forged_release(fleet, two)
    role = Draft.of(Custody(fleet.folder), NOW).change("model-cats")
    key = team.public_key
    name = "model-evil"
    grabbed = DelegatedRole(name, [key.keyid], 1, terminating=True, paths=["models/*/*/*"])
    role.delegations = Delegations({key.keyid: key}, {name: grabbed})
    put(fleet, "model-cats", role, team)
    draft = Draft.of(Custody(fleet.folder), NOW)
    evil = draft.change(name)
    evil.targets[three.path] = target
    put(fleet, name, evil, team)
    withstood(story, "nobody signed", wish(three, deployment="attack"))


@pytest.mark.parametrize("names", [["model-digits"], ["targets-2", "model-digits"]], ids=["itself", "a ring"])
def test_delegations_that_go_round_in_a_circle_end(story, names):
    fleet, _, _, two = story
    three, _ = forged_release(fleet, two)
    by = signer(fleet, "targets")
    key = by.public_key
    for name, child in zip(["model-digits", *names], names, strict=False):
        role = Draft.of(Custody(fleet.folder), NOW).change(name)
        circle = DelegatedRole(child, [key.keyid], 1, terminating=False, paths=["models/*/*/*"])
        role.delegations = Delegations({key.keyid: key}, {child: circle})
        put(fleet, name, role, by)
    assert len(Draft.of(Custody(fleet.folder), NOW).roles()) == len({"targets", "model-digits", *names})
    withstood(story, "nobody signed", wish(three, deployment="attack"))


def test_a_root_that_counts_one_key_twice_is_noticed_by_the_operator(story):
    from edgekit.cli.ota._verifying import verify

    fleet = story[0]
    one, two = stolen(fleet, 0), stolen(fleet, 1)
    alias = SSlibKey("f" * 64, one.public_key.keytype, one.public_key.scheme, one.public_key.keyval)

    def doubled(root):
        root.keys[alias.keyid] = alias
        root.roles["root"].keyids[2] = alias.keyid

    next_root(fleet, doubled, one, two)
    verdict = verify(fleet.repository, publisher.root(fleet.folder), NOW, lambda *_: None)
    assert any("counts one key twice" in problem.message for problem in verdict.problems)
    assert all(isinstance(problem, TrustError) for problem in verdict.problems)
    assert delegations.TOP in {row.role for row in verdict.rows}


@pytest.mark.parametrize("version", [1, 2])
def test_root_that_somebody_wrote_into_the_repository_is_not_the_base_of_the_next(story, version):
    fleet = story[0]
    mine = CryptoSigner.generate_ed25519()
    if version == 2:
        roots.renew(Custody(fleet.folder), NOW)
    made = metadata.current_root(fleet.folder)
    made.signed.add_key(mine.public_key, "root")
    made.signed.add_key(mine.public_key, "targets")
    made.signed.roles["root"].threshold = 1
    made.sign(mine)
    path = metadata.place(fleet.folder, f"{version}.root")
    path.write_bytes(made.to_bytes())
    words = r"not in keyring\.json" if version == 1 else "not signed as it must be"
    for call in (lambda: roots.renew(Custody(fleet.folder), NOW), lambda: fleet.publish(5)):
        with pytest.raises(TrustError, match=words):
            call()
    assert not metadata.place(fleet.folder, f"{version + 1}.root").exists()
    assert not (fleet.folder / "pending").exists()

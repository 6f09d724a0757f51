"""A repository in memory with every key at hand: signs what an operator would, and what a thief of some keys would.

Serves as a device's `Fetcher`. What it signs is plain metadata that a test changes, and then signs anew, as far as its
thief can. Knows nothing of how edgekit's own publisher lays its folder out.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec
import pytest
from fakes.fleets import NOW, OTHER, PROFILE, QUICK, Serving, tiny_bundle, wish
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from edgekit import manifest as manifests
from edgekit.ota.device import slots, trust
from edgekit.ota.device.fetchers import MissingFile
from edgekit.ota.device.update import Device, update
from edgekit.ota.messages import Installed, Refused
from edgekit.ota.release import Release, to_custom

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.ota.device.slots import Outcome

ROLES = ("root", "targets", "snapshot", "timestamp")
YEAR = timedelta(days=365)
PIECE = 64 << 10


class Simulator:
    """A repository whose signed parts are attributes: change them, then `publish`, or sign a single one."""

    def __init__(self, folder: Path, keys=1, threshold=1):
        self.folder = folder
        self.signers = {role: [CryptoSigner.generate_ed25519() for _ in range(keys)] for role in ROLES}
        self.root = Root(expires=NOW + YEAR, consistent_snapshot=True)
        self.targets = Targets(expires=NOW + YEAR)
        self.snapshot = Snapshot(expires=NOW + YEAR)
        self.timestamp = Timestamp(expires=NOW + timedelta(days=7))
        for role in ROLES:
            getattr(self, role).version = 0
            self.root.roles[role].threshold = threshold
            for signer in self.signers[role]:
                self.root.add_key(signer.public_key, role)
        self.files: dict[str, bytes] = {}
        """What is served, by path."""
        self.endless: set[str] = set()
        """Paths whose bytes go on for as long as somebody reads."""
        self.read = 0
        """Bytes handed out."""
        self.publish_root()
        self.publish()

    def stream(self, path, start, end):
        """Hand out a file from memory; see `edgekit.ota.device.fetchers.Fetcher`."""
        if path not in self.files:
            raise MissingFile(f"there is no {path}")
        whole = bytes(end) if path in self.endless else self.files[path]
        for at in range(start, min(end, len(whole)), PIECE):
            piece = whole[at : min(end, at + PIECE)]
            self.read += len(piece)
            yield piece

    def sign(self, signed, signers):
        """Return the bytes of metadata, signed by those."""
        md = Metadata(signed)
        for signer in signers:
            md.sign(signer, append=True)
        return md.to_bytes()

    def publish_root(self, before=()):
        """Sign the next root; ``before`` are the signers of the old one, where they change."""
        self.root.version += 1
        signers = {s.public_key.keyid: s for s in (*self.signers["root"], *before)}
        self.files[f"metadata/{self.root.version}.root.json"] = self.sign(self.root, signers.values())

    def publish_targets(self, signers=None):
        """Sign the targets as their next version."""
        self.targets.version += 1
        data = self.sign(self.targets, signers or self.signers["targets"])
        self.files[f"metadata/{self.targets.version}.targets.json"] = data
        self.snapshot.meta["targets.json"] = MetaFile.from_data(self.targets.version, data, ["sha256"])

    def publish_snapshot(self, signers=None):
        """Sign the snapshot as its next version."""
        self.snapshot.version += 1
        data = self.sign(self.snapshot, signers or self.signers["snapshot"])
        self.files[f"metadata/{self.snapshot.version}.snapshot.json"] = data
        self.timestamp.snapshot_meta = MetaFile.from_data(self.snapshot.version, data, ["sha256"])

    def publish_timestamp(self, signers=None):
        """Sign the timestamp as its next version."""
        self.timestamp.version += 1
        self.files["metadata/timestamp.json"] = self.sign(self.timestamp, signers or self.signers["timestamp"])

    def publish(self):
        """Sign targets, snapshot and timestamp, as an operator does."""
        self.publish_targets()
        self.publish_snapshot()
        self.publish_timestamp()

    def rotate(self, role):
        """Give a role a new key in a new root, revoke the old ones, and return their signers."""
        old = self.signers[role]
        self.signers[role] = [CryptoSigner.generate_ed25519() for _ in old]
        for signer in old:
            self.root.revoke_key(signer.public_key.keyid, role)
        for signer in self.signers[role]:
            self.root.add_key(signer.public_key, role)
        self.publish_root(before=old if role == "root" else ())
        return old

    def add(self, seed, version=None, profile=PROFILE):
        """Put a bundle of a few bytes and its release into the targets; nothing is signed yet. Returns the release."""
        return self.add_bundle(tiny_bundle(self.folder / f"sealed-{seed}", seed), version or seed, profile)

    def add_bundle(self, sealed, version, profile=PROFILE):
        """Put a sealed bundle and its release into the targets; nothing is signed yet. Returns the release."""
        for entry in sealed.manifest.files:
            self.files[f"blobs/{entry.sha256}"] = sealed.path(entry.path).read_bytes()
        name = sealed.manifest.name
        release = Release(model=name, profile=profile, version=version, bundle=sealed.digest, limits=QUICK)
        self.put(release, (sealed.folder / "manifest.json").read_bytes())
        return release

    def put(self, release, content, path=""):
        """Let the targets name ``content`` as a release's manifest."""
        path = path or release.path
        target = TargetFile.from_data(path, content, ["sha256"])
        target.unrecognized_fields["custom"] = to_custom(release)
        self.targets.targets[path] = target
        folder, _, name = path.rpartition("/")
        self.files[f"targets/{folder}/{hashlib.sha256(content).hexdigest()}.{name}"] = content

    def content_of(self, release):
        """Return the manifest of a release, and the path that it is served under."""
        folder, _, name = release.path.rpartition("/")
        path = f"targets/{folder}/{release.bundle}.{name}"
        return self.files[path], path

    def blob_of(self, release, name=f"{PROFILE}/model.onnx"):
        """Return under which path a file of a release is served."""
        manifest = manifests.decode(self.content_of(release)[0])
        return next(f"blobs/{entry.sha256}" for entry in manifest.files if entry.path == name)


@dataclass
class Victim:
    """A device on which version 1 serves, and to which version 2 was published but not brought."""

    simulator: Simulator
    device: Device
    one: Release
    two: Release
    attacked: str = ""
    """The last deployment that failed without a final word."""

    def attack(self, release=None, *, fetcher=None, now=NOW, deployment="attack") -> Outcome:
        """Let the device be told to install a release, and see what it says."""
        self.device.serving.calls.clear()
        self.attacked = deployment
        outcome = update(self.device, wish(release or self.two, deployment), fetcher or self.simulator, now)
        self.attacked = ""
        return outcome

    def withstands(self, because, release=None, **options):
        """Attack without a key: twice the device must raise the alarm for that reason, and hold it against nothing."""
        before = slots.load(self.device.state)
        for _ in range(2):
            with pytest.raises(trust.Unproven) as caught:
                self.attack(release, **options)
            assert because in caught.value.message, caught.value.message
            assert slots.load(self.device.state) == before
            self.is_unharmed()

    def refuses(self, because, release=None, **options) -> Refused:
        """Attack with keys; the device must say no for good, for that reason, and go on as if nothing had been."""
        outcome = self.attack(release, **options)
        assert isinstance(outcome, Refused), outcome
        assert because in outcome.reason, outcome.reason
        self.is_unharmed()
        return outcome

    def is_unharmed(self):
        """Version 1 serves on, whole, and was never interrupted."""
        state = slots.load(self.device.state)
        assert state.current == self.one
        assert slots.open_current(self.device.state, state).digest == self.one.bundle
        assert self.device.serving.active == self.one.bundle
        assert self.device.serving.calls == []

    def recovers(self, release=None):
        """Once the operator has his repository back, version 2 is installed: by the wish that was attacked, too."""
        outcome = self.attack(release, deployment=self.attacked or "afterwards")
        assert isinstance(outcome, Installed), outcome
        assert self.device.serving.active == (release or self.two).bundle


def victim(folder: Path, **options) -> Victim:
    """Make a repository with two versions and a device that runs the first."""
    simulator = Simulator(folder / "operator", **options)
    one = simulator.add(1)
    simulator.publish()
    device = Device("pi-1", PROFILE, folder / "device", Serving())
    trust.install_root(device.state, simulator.files["metadata/1.root.json"])
    assert isinstance(update(device, wish(one), simulator, NOW), Installed)
    two = simulator.add(2)
    simulator.publish()
    return Victim(simulator, device, one, two)


def renamed(release, profile=OTHER):
    """Return a release that says it is for another class."""
    return msgspec.structs.replace(release, profile=profile)

"""A whole fleet in small: a signed repository, its server, bundles of a few bytes, a serving that obeys the test."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from edgekit import bundle
from edgekit.errors import HealthError, MessageError
from edgekit.manifest import Manifest, Parity, Variant
from edgekit.ota import messages
from edgekit.ota.device import trust
from edgekit.ota.device.fetchers import FolderFetcher
from edgekit.ota.device.update import Device, update
from edgekit.ota.messages import Block, BlockRequest, Desired
from edgekit.ota.release import Limits
from edgekit.ota.server import metadata, publisher, repository
from edgekit.ota.server.delegations import role_of
from edgekit.ota.server.draft import Draft
from edgekit.ota.server.keys import Custody

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
FLEET = "lab"
PROFILE = "raspberry-pi-5"
OTHER = "x86-64"
QUICK = Limits(probation_requests=0, probation_seconds=0)


def noise(seed, size):
    """Return bytes that repeat nowhere."""
    blocks = (hashlib.sha256(f"{seed}-{i}".encode()).digest() for i in range(size // 32 + 1))
    return b"".join(blocks)[:size]


def tiny_bundle(folder: Path, seed=1, size=2000, status="checked", name="digits"):
    """Seal a bundle with a file of each of two classes and one that both share."""
    variants = tuple(
        Variant(
            name=profile,
            format="onnx",
            precision="int8",
            main=f"{profile}/model.onnx",
            files=(f"{profile}/model.onnx",),
            parity=Parity(status=status, reason="no engine here" if status == "unverified" else ""),
        )
        for profile in (PROFILE, OTHER)
    )
    sources = {
        f"{PROFILE}/model.onnx": noise(seed, size),
        f"{OTHER}/model.onnx": noise(f"other{seed}", size),
        "labels.txt": b"zero\none\n",
    }
    return bundle.seal(
        folder, Manifest(name=name, version=str(seed), task="tensor", variants=variants, files=()), sources
    )


@dataclass
class Serving:
    """Serves what it is told and misbehaves where it is told to."""

    active: str | None = None
    calls: list = field(default_factory=list)
    fail_at: str = ""

    def try_out(self, bundle, release):
        self._step("try_out", bundle.digest)
        return {"golden_sqnr_db": 40.0}

    def activate(self, bundle):
        self._step("activate", bundle.digest if bundle else None)
        self.active = bundle.digest if bundle else None

    def probation(self, release):
        self._step("probation", release.bundle)
        return {"p95_ms": 3.5}

    def _step(self, name, digest):
        self.calls.append((name, digest))
        if self.fail_at == name:
            self.fail_at = ""
            raise HealthError(f"{name} failed", "as the test demands")


class Fleet:
    """An operator's folder with the bundles published so far."""

    def __init__(self, folder: Path, size=2000):
        self.folder = folder
        self.size = size
        publisher.init(folder, NOW)

    @property
    def repository(self):
        return self.folder / "repository"

    def publish(self, seed, version=None, now=NOW, **options):
        sealed = tiny_bundle(self.folder / "sealed" / str(seed), seed, self.size)
        releases = publisher.publish(self.folder, sealed, version=version, now=now, limits=QUICK, **options)
        return next(r for r in releases if r.profile == PROFILE)

    def device(self, state: Path, serving=None, profile=PROFILE, name="pi-1"):
        device = Device(name, profile, state, serving or Serving())
        trust.install_root(state, publisher.root(self.folder))
        return device

    def serve(self, channel):
        """Answer block requests the way the fleet's service does; return the list of requests seen."""
        seen = []

        def answer(arrival):
            try:
                request = messages.decode(arrival.payload, BlockRequest)
                block = repository.read_block(self.folder, request)
                seen.append(request)
            except MessageError as error:
                block = Block(error=str(error))
            channel.publish(arrival.reply_to, messages.encode_block(block), correlation=arrival.correlation)

        channel.subscribe(messages.topic(FLEET, "+", "request"), answer)
        return seen


def signer(fleet, role):
    """Return what signs as a role: whoever has the fleet's folder can."""
    trusted = metadata.current_root(fleet.folder).signed
    return Custody(fleet.folder).signer(trusted.get_key(trusted.roles[role].keyids[0]))


def operator_signs(fleet, model, change):
    """Change what is signed of a model and sign the whole chain with the fleet's own keys: the operator attacks."""
    draft = Draft.of(Custody(fleet.folder), NOW)
    change(draft.change(role_of(model)))
    draft.commit()


def wish(release, deployment="d1", attempt=1):
    """Want a release."""
    return Desired(deployment=deployment, attempt=attempt, release=release.path, version=release.version)


def install(fleet, device, release, now=NOW, **options):
    """Update a device straight out of the repository's folder."""
    return update(device, wish(release, **options), FolderFetcher(fleet.repository), now)


def eventually(check, seconds=20.0):
    """Wait until ``check`` is true; return its value."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {seconds} s")
        time.sleep(0.01)
    return value

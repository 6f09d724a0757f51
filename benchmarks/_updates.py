"""Updates for the proofs to break: two versions of a bundle, a signed repository, a device that runs the old one.

The bundles are of the null backend, whose model answers with its version, so that what serves is asked and not
guessed; beside it lie weights that nothing reads, of a size that makes a download of many blocks.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgekit import bundle as bundles
from edgekit.cli import cli
from edgekit.cli.ota._serving import HostServing
from edgekit.manifest import Manifest, Parity, Variant
from edgekit.ota.device import marks, slots, trust
from edgekit.ota.device.update import Device, recover
from edgekit.ota.release import Limits
from edgekit.ota.server import publisher
from edgekit.runtime import acceptance
from edgekit.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgekit.bundle import Bundle

CLASS, MODEL, WEIGHTS, LABELS = "any", "any/model.json", "any/model.safetensors", "labels.txt"
VALUES = {1: 0.25, 2: 0.5, 3: 0.75}
AT_ONCE = Limits(probation_requests=0, probation_seconds=0)


@dataclass(frozen=True)
class Update:
    """A device's state before an update, what it is updated from, and the digests before and after.

    ``old`` is empty where nothing is installed before. ``new`` is what serves in the end: the old one again where the
    device has to refuse the update.
    """

    what: str
    before: Path
    repository: Path
    old: str
    new: str
    offered: str


def full(folder: Path, size: int) -> Update:
    """Prepare an update that brings every changed file as it is."""
    fleet, _, old, new = _fleet(folder, {1: {}, 2: {}, 3: {"unlike": True}}, size)
    for version in (1, 2):  # so that there is one to collect
        _install(folder / "before", fleet, version=version)
    return Update("full update", folder / "before", fleet / "repository", old.digest, new.digest, new.digest)


def delta(folder: Path, size: int) -> Update:
    """Prepare an update whose weights are those of before with some numbers changed, brought as a delta."""
    fleet, _, old, new = _fleet(folder, {1: {}, 2: {}, 3: {}}, size, deltas=True)
    for version in (1, 2):
        _install(folder / "before", fleet, version=version)
    return Update("delta update", folder / "before", fleet / "repository", old.digest, new.digest, new.digest)


def first(folder: Path, size: int) -> Update:
    """Prepare the installation of a device that has nothing yet."""
    fleet, _, new = _fleet(folder, {1: {}, 2: {"unlike": True}}, size)
    trust.install_root(folder / "before", publisher.root(fleet))
    return Update("first installation", folder / "before", fleet / "repository", "", new.digest, new.digest)


def refused(folder: Path, size: int) -> Update:
    """Prepare an update whose model does not load, so that the device goes back."""
    fleet, old, new = _fleet(folder, {1: {}, 2: {"unlike": True, "is_broken": True}}, size)
    _install(folder / "before", fleet, version=1)
    return Update(
        "update that fails its try-out", folder / "before", fleet / "repository", old.digest, old.digest, new.digest
    )


COMPLETING: tuple[Callable[[Path, int], Update], ...] = (full, delta)
KINDS = (*COMPLETING, first, refused)


def command(state: Path, repository: Path) -> list[str]:
    """Return the agent's command that brings a device to the newest release of a folder, and ends."""
    return ["ota", "agent", "--state", str(state), "--device", "pi-1", "--target", CLASS, "--threads", "1", "--once",
            "--no-isolate", "--repository", str(repository)]  # fmt: skip


def update(state: Path, repository: Path) -> str:
    """Run that command in this process; return what it complains of, empty where all went well."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            cli(command(state, repository), prog_name="edgekit")
        except SystemExit as end:
            return told.getvalue() if end.code else ""
    return ""


def try_out_here() -> None:
    """Let this process try bundles out itself from now on, where another interpreter takes long to start."""
    acceptance.try_out = lambda folder, variant, threads, _allowed: acceptance.check(folder, variant, threads)


def served(state: Path) -> str:
    """Start what a device starts, ask its model, stop it, and return the digest of the bundle that answered.

    Raises:
        AssertionError: the answer is not that of the bundle, or the pointer names another one.
    """
    serving = HostServing(CLASS, threads=1)
    try:
        recover(Device("pi-1", CLASS, state, serving))
        current = slots.load(state).current
        if serving.host is None:
            assert current is None, "nothing serves, and the pointer names something"
            return ""
        assert current is not None, "something serves, and the pointer names nothing"
        assert serving.host.digest == current.bundle, "another bundle serves than the pointer names"
        answer = serving.host.run({"image": np.zeros((1, 3), np.float32)}).outputs["scores"]
        assert float(answer[0, 0]) == VALUES[current.version], "the answer is not that of the bundle"
        return current.bundle
    finally:
        serving.close()


def contents(state: Path) -> dict[str, str]:
    """Return the hash of every file of a device; empty for the pointer, its copy and the marks, which hold times."""
    found = {}
    for path in sorted(state.rglob("*")):
        if path.is_file() or path.is_symlink():
            name = str(path.relative_to(state))
            found[name] = "" if name in (slots.STATE, slots.COPY, marks.FILE) else bundles.hash_file(path)
    return found


def _fleet(folder: Path, versions: dict[int, dict[str, Any]], size: int, *, deltas: bool = False) -> tuple[Any, ...]:
    fleet, now, made = folder / "fleet", datetime.now(UTC), []
    publisher.init(fleet, now)
    for version, how in versions.items():
        made.append(sealed(folder / f"v{version}", version, size, **how))
        released = publisher.publish(fleet, made[-1], now=now, version=version, limits=AT_ONCE, allow_unverified=True)
        if deltas:
            publisher.add_deltas(fleet, released, now=now, count=1)
        shutil.copytree(fleet / "repository", folder / f"repository-{version}")
    return fleet, *made


def _install(state: Path, fleet: Path, *, version: int) -> None:
    """Bring a new device to a version, from the repository as it was when that was the newest."""
    trust.install_root(state, publisher.root(fleet))
    told = update(state, fleet.parent / f"repository-{version}")
    assert not told, told


def sealed(folder: Path, version: int, size: int, *, unlike: bool = False, is_broken: bool = False) -> Bundle:
    """Seal a version; its weights are like those of the others unless ``unlike``, its model does not load if broken."""
    outputs = [{"name": "scores", "dtype": "float32", "shape": [-1, 4]}]
    answers = msgspec.json.encode({"outputs": outputs, "value": VALUES[version]})
    one = Variant(
        name=CLASS,
        format="null",
        precision="fp16",
        main=MODEL,
        files=(MODEL, WEIGHTS),
        parity=Parity(status="unverified", reason="a proof's"),
    )
    draft = Manifest(
        name="proof",
        version=str(version),
        task="tensor",
        inputs=(TensorSpec("image", "float32", (-1, 3)),),
        outputs=(TensorSpec("scores", "float32", (-1, 4)),),
        variants=(one,),
        files=(),
    )
    files = {
        MODEL: b"{" if is_broken else answers,
        WEIGHTS: _weights(size, version if unlike else 0, nudged=version),
        LABELS: b"zero\none\ntwo\nthree\n",
    }
    return bundles.seal(folder, draft, files)


def _weights(size: int, seed: int, *, nudged: int) -> bytes:
    """Return safetensors of about ``size`` bytes in fp16; of two with one seed the last eighth differs."""
    random = np.random.default_rng(seed)
    layers = {f"layer{i}": random.normal(0, 0.05, (size // 16, 1)).astype(np.float16) for i in range(8)}
    layers["layer7"] = layers["layer7"] + np.float16(nudged / 1024)
    header, offset = {}, 0
    for name, array in layers.items():
        header[name] = {"dtype": "F16", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in layers.values())

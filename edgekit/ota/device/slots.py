"""Bundles on the device and the one small file that says which of them serves. Crash-safe at every line.

``bundles/<digest>`` are whole, verified bundles; ``staging/<digest>`` is one that is still coming; ``state.json``
is replaced atomically. Transitions are values in, values out. Knows no network, no signature and no engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from typing import TYPE_CHECKING

import msgspec

from edgekit import bundle as bundles
from edgekit import manifest as manifests
from edgekit.durable import sync_folder, sync_tree, write_file
from edgekit.errors import BundleError, ResourceError, UsageError
from edgekit.ota.messages import Installed, Refused, RolledBack
from edgekit.ota.release import Release

if TYPE_CHECKING:
    from io import TextIOWrapper
    from pathlib import Path

    from edgekit.bundle import Bundle
    from edgekit.manifest import FileEntry

STATE = "state.json"
REMEMBERED = 100
"""How many releases that failed here are remembered; the oldest are forgotten first."""

Outcome = Installed | RolledBack | Refused


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A release that serves but has not passed its probation, and how often the device has started since."""

    deployment: str
    attempt: int
    starts: int = 0


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What serves, what served before, what is on probation, what failed here, and the last word to the fleet."""

    current: Release | None = None
    previous: Release | None = None
    trial: Trial | None = None
    rolled_back: dict[str, int] = {}
    outcome: Outcome | None = None


def lock(folder: Path) -> TextIOWrapper:
    """Take the state folder for this process; closing what is returned gives it back.

    Raises:
        ResourceError: another agent, or an update from a stick, uses it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = (folder / "agent.lock").open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.close()
        raise ResourceError(f"another agent uses {folder}", "stop it first, or give each device its own") from error
    return held


def load(folder: Path) -> State:
    """Read the pointer; a device without one has nothing installed.

    Raises:
        ResourceError: the file is damaged, which no kill can do.
    """
    path = folder / STATE
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return State()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResourceError(
            f"{path} is damaged: {error}", "check the disk; remove the file to install the release anew"
        ) from error


def save(folder: Path, state: State) -> None:
    """Replace the pointer in one step."""
    write_file(folder / STATE, msgspec.json.encode(state))


def committed(state: State, release: Release, trial: Trial) -> State:
    """Let ``release`` serve on probation; what served before stays at hand."""
    previous = state.previous if state.current == release else state.current
    return msgspec.structs.replace(state, current=release, previous=previous, trial=trial)


def confirmed(state: State, outcome: Outcome) -> State:
    """End the probation well."""
    assert state.current is not None  # noqa: S101  # only a committed state has a probation
    kept = {path: n for path, n in state.rolled_back.items() if path != state.current.path}
    return msgspec.structs.replace(state, trial=None, rolled_back=kept, outcome=outcome)


def rolled_back(state: State, release: Release, outcome: Outcome) -> State:
    """Go back to what served before ``release``, and count the failure."""
    counts = {path: n for path, n in state.rolled_back.items() if path != release.path}
    counts = dict(list(counts.items())[1 - REMEMBERED :])
    counts[release.path] = state.rolled_back.get(release.path, 0) + 1
    back = msgspec.structs.replace(state, trial=None, rolled_back=counts, outcome=outcome)
    if state.current != release:
        return back
    return msgspec.structs.replace(back, current=state.previous, previous=None)


def on_trial(state: State, trial: Trial) -> State:
    """Note how the probation goes on."""
    return msgspec.structs.replace(state, trial=trial)


def with_outcome(state: State, outcome: Outcome | None) -> State:
    """Remember the last word to the fleet, or forget it."""
    return msgspec.structs.replace(state, outcome=outcome)


def bundle_folder(folder: Path, digest: str) -> Path:
    """Return where a whole bundle lies."""
    return folder / "bundles" / digest


def staging_folder(folder: Path, digest: str) -> Path:
    """Return where a bundle comes together, over as many interrupted downloads as it takes."""
    return folder / "staging" / digest


def open_current(folder: Path, state: State) -> Bundle | None:
    """Open what the pointer names and check every byte; ``None`` where nothing is installed.

    Raises:
        BundleError: the disk lost or changed something.
    """
    if state.current is None:
        return None
    return open_bundle(folder, state.current)


def open_bundle(folder: Path, release: Release) -> Bundle:
    """Open the installed bundle of a release and check every byte.

    Raises:
        BundleError: it is missing, changed, or another one.
    """
    path = bundle_folder(folder, release.bundle)
    try:
        bundle = bundles.read(path, release.profile)
    except UsageError as error:
        raise BundleError(f"the bundle of {release.path} is missing: {path}") from error
    if bundle.digest != release.bundle:
        raise BundleError(f"{path} holds bundle {bundle.digest[:12]}…")
    return bundle


def reuse(folder: Path, entry: FileEntry, target: Path) -> bool:
    """Take a file with the same bytes out of an installed bundle instead of the network; say whether there was one.

    It becomes a hard link: installed files are never written to, and flash wears out.
    """
    for installed in sorted((folder / "bundles").glob("*/" + bundles.MANIFEST)):
        for path in _same_bytes(installed.parent, entry):
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                target.unlink()
            _link(path, target)
            return True
    return False


def adopt(folder: Path, release: Release) -> Bundle:
    """Turn a complete staging folder into an installed bundle, in one rename, after checking every byte.

    Raises:
        BundleError: something is missing, changed or unlisted; the staging folder is removed.
    """
    staging = staging_folder(folder, release.bundle)
    target = bundle_folder(folder, release.bundle)
    try:
        bundles.read(staging, release.profile)
    except BundleError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_tree(staging)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # one that lost bytes: whole ones are never staged again
        shutil.rmtree(target)
    staging.rename(target)
    sync_folder(target.parent)
    return open_bundle(folder, release)


def collect(folder: Path, state: State) -> None:
    """Remove every bundle and every staging folder that the pointer does not name, and what kills left behind."""
    for path in folder.glob(f".{STATE}.*"):
        path.unlink()
    named = {release.bundle for release in (state.current, state.previous) if release is not None}
    for path in (folder / "bundles").glob("*"):
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder / "staging", ignore_errors=True)


def discard_other_staging(folder: Path, digest: str) -> None:
    """Remove what came of releases that nobody wants any more."""
    for path in (folder / "staging").glob("*"):
        if path.name != digest:
            shutil.rmtree(path, ignore_errors=True)


def _same_bytes(installed: Path, entry: FileEntry) -> list[Path]:
    try:
        manifest = manifests.decode((installed / bundles.MANIFEST).read_bytes())
    except (BundleError, OSError):
        return []
    same = [installed / e.path for e in manifest.files if e.sha256 == entry.sha256]
    return [path for path in same if path.is_file() and bundles.hash_file(path) == entry.sha256]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links, such as FAT
        shutil.copyfile(source, target)

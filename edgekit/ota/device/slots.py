"""Bundles on the device and the one small file that says which of them serves. Crash-safe at every line.

``bundles/<name>`` are whole, verified bundles; ``staging/<name>`` is one that is still coming; ``state.json``
is replaced atomically, and so is its copy. The name is the digest, with another variant than the class's that as well.
Transitions are values in, values out. Knows no network, no signature and no engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from typing import TYPE_CHECKING

import msgspec

from edgekit import bundle as bundles
from edgekit import manifest as manifests
from edgekit.durable import BAD_BLOCK, sync_folder, sync_tree, write_file
from edgekit.errors import BundleError, ResourceError, UsageError
from edgekit.ota.device import marks
from edgekit.ota.messages import Installed, Refused, RolledBack
from edgekit.ota.release import Release

if TYPE_CHECKING:
    from collections.abc import Collection
    from io import TextIOWrapper
    from pathlib import Path

    from edgekit.bundle import Bundle
    from edgekit.manifest import FileEntry

log = logging.getLogger(__name__)

STATE, COPY = "state.json", "state.copy.json"
"""The pointer, and what stands in where that is damaged: written right after it, so the same or one step older."""
REMEMBERED = 100
"""How many releases that failed here are remembered; the oldest are forgotten first."""

Outcome = Installed | RolledBack | Refused


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A release that serves but has not passed its probation, and how often the device has started since."""

    deployment: str
    attempt: int
    starts: int = 0


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The variant of a release that runs here, and why each that is better does not."""

    variant: str
    left: dict[str, str] = {}


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What serves, what served before, what is on probation, what failed here, and the last word to the fleet.

    ``answered`` is the path of the release that the last word is about: a forged wish of the same deployment, attempt
    and version must not speak for the real one. Empty: written before there was such a field.
    ``choices``, ``begun`` and ``unrunnable`` are by a release's path: the variant that runs, how many try-outs never
    ended, and which variants were found not to run, and why.
    """

    current: Release | None = None
    previous: Release | None = None
    trial: Trial | None = None
    rolled_back: dict[str, int] = {}
    outcome: Outcome | None = None
    answered: str = ""
    choices: dict[str, Choice] = {}
    begun: dict[str, int] = {}
    unrunnable: dict[str, dict[str, str]] = {}
    dark: str = ""
    """Why what is named here does not serve, and nothing older either."""

    def variant_of(self, release: Release) -> str:
        """Return the variant of an installed release that runs here."""
        choice = self.choices.get(release.path)
        return choice.variant if choice else release.order[0]


def lock(folder: Path) -> TextIOWrapper:
    """Take the state folder for this process; closing what is returned gives it back.

    Raises:
        ResourceError: another agent, or an update from a stick, uses it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / "agent.lock"
    try:
        held = file.open("a")
    except OSError:
        if not file.exists():
            raise
        held = file.open()  # a disk that takes no more writes: what is installed there serves all the same
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.close()
        raise ResourceError(f"another agent uses {folder}", "stop it first, or give each device its own") from error
    return held


def load(folder: Path) -> State:
    """Read the pointer, or its copy where that cannot be read; a device without either has nothing installed.

    Raises:
        ResourceError: both are damaged, which no kill can do; see `mend`.
    """
    try:
        found = _read(folder / STATE)
    except (OSError, ResourceError):  # what is raised is about the pointer: one that can be read later is no lost one
        found = None
        with contextlib.suppress(ResourceError):
            found = _read(folder / COPY)
        if found is None:
            raise
    return found or _read(folder / COPY) or State()


def known(folder: Path) -> State:
    """Read the pointer; one that can neither be read nor put aside, on a disk that takes no writes, names nothing."""
    try:
        return load(folder)
    except (OSError, ResourceError) as error:
        log.error("what is installed is not known: %s", error)  # noqa: TRY400  # no trace: it is no bug
        return State()


def _read(path: Path) -> State | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResourceError(f"{path} is damaged: {error}", "check the disk; the agent begins anew") from error
    except OSError as error:
        if error.errno not in BAD_BLOCK:
            raise
        raise ResourceError(f"{path} cannot be read: {error}", "check the disk; the agent begins anew") from error


def save(folder: Path, state: State) -> None:
    """Replace the pointer in one step, then its copy."""
    data = msgspec.json.encode(state)
    write_file(folder / STATE, data)
    write_file(folder / COPY, data)


def mend(folder: Path) -> None:
    """Put a pointer aside whose copy is damaged too, as if nothing were installed; `marks` still allow no way back.

    What lies in the bundles is not guessed from: no folder says whether its release was confirmed or given up. A wish
    finds it there, and fetches nothing twice.
    """
    try:
        load(folder)
    except ResourceError as error:
        log.error("%s and its copy are put aside, the device begins anew: %s", folder / STATE, error)  # noqa: TRY400  # no trace: it is no bug
        for name in (STATE, COPY):
            with contextlib.suppress(FileNotFoundError):
                (folder / name).replace(folder / f"{name}.damaged")
        sync_folder(folder)


def beginning(state: State, release: Release) -> State:
    """Count a try-out that begins: one that takes the device down with it never ends."""
    begun = {**state.begun, release.path: state.begun.get(release.path, 0) + 1}
    return msgspec.structs.replace(state, begun=dict(list(begun.items())[-REMEMBERED:]))


def failures(state: State, path: str) -> int:
    """Count how often a release was rolled back, or its try-out took the agent down."""
    return state.rolled_back.get(path, 0) + state.begun.get(path, 0)


def ended(state: State, release: Release) -> State:
    """Forget that a try-out began, and which variants did not run."""
    begun = {path: n for path, n in state.begun.items() if path != release.path}
    unrunnable = {path: why for path, why in state.unrunnable.items() if path != release.path}
    return msgspec.structs.replace(state, begun=begun, unrunnable=unrunnable)


def passed_over(state: State, release: Release, variant: str, why: str) -> State:
    """Note that a variant does not run here, so that it is not fetched again while the next one comes."""
    return msgspec.structs.replace(
        state, unrunnable={release.path: {**state.unrunnable.get(release.path, {}), variant: why}}
    )


def committed(state: State, release: Release, trial: Trial, choice: Choice | None = None) -> State:
    """Let ``release`` serve on probation; what served before stays at hand."""
    previous = state.previous if state.current == release else state.current
    kept = {one.path: state.choices[one.path] for one in (previous,) if one is not None and one.path in state.choices}
    choices = {**kept, release.path: choice} if choice else kept
    state = ended(state, release)
    return msgspec.structs.replace(state, current=release, previous=previous, trial=trial, choices=choices, dark="")


def darkened(state: State, why: str) -> State:
    """Note that what is named does not serve; what has been told of it is forgotten, and it is fetched anew."""
    return msgspec.structs.replace(state, dark=why[:500], outcome=None)


def lit(state: State) -> State:
    """Note that what is named serves."""
    return msgspec.structs.replace(state, dark="")


def confirmed(state: State, outcome: Outcome) -> State:
    """End the probation well."""
    assert state.current is not None  # noqa: S101  # only a committed state has a probation
    kept = {path: n for path, n in state.rolled_back.items() if path != state.current.path}
    return with_outcome(msgspec.structs.replace(state, trial=None, rolled_back=kept), outcome, state.current.path)


def rolled_back(state: State, release: Release, outcome: Outcome) -> State:
    """Go back to what served before ``release``, and count the failure."""
    failed = state.rolled_back.get(release.path, 0) + max(1, state.begun.get(release.path, 0))
    state = ended(state, release)
    counts = {path: n for path, n in state.rolled_back.items() if path != release.path}
    counts = dict(list(counts.items())[1 - REMEMBERED :])
    counts[release.path] = failed
    back = with_outcome(msgspec.structs.replace(state, trial=None, rolled_back=counts), outcome, release.path)
    if state.current != release:
        return back
    return msgspec.structs.replace(back, current=state.previous, previous=None)


def without_previous(state: State) -> State:
    """Let go of what served before; there is no way back any more."""
    return msgspec.structs.replace(state, previous=None)


def on_trial(state: State, trial: Trial) -> State:
    """Note how the probation goes on."""
    return msgspec.structs.replace(state, trial=trial)


def with_outcome(state: State, outcome: Outcome | None, path: str) -> State:
    """Remember the last word to the fleet and which release it is about, or forget it."""
    return msgspec.structs.replace(state, outcome=outcome, answered=path)


def slot_name(release: Release, variant: str) -> str:
    """Name the folder of a release's bundle: another variant of the same bundle must not replace what serves."""
    return release.bundle if variant == release.profile else f"{release.bundle}.{variant}"


def bundle_folder(folder: Path, name: str) -> Path:
    """Return where a whole bundle lies."""
    return folder / "bundles" / name


def staging_folder(folder: Path, name: str) -> Path:
    """Return where a bundle comes together, over as many interrupted downloads as it takes."""
    return folder / "staging" / name


def scratch_folder(folder: Path) -> Path:
    """Return where deltas lie until they are applied."""
    return folder / "deltas"


def open_current(folder: Path, state: State) -> Bundle | None:
    """Open what the pointer names and check every byte; ``None`` where nothing is installed.

    Raises:
        BundleError: the disk lost or changed something.
    """
    if state.current is None:
        return None
    return open_bundle(folder, state.current, state.variant_of(state.current))


def open_bundle(folder: Path, release: Release, variant: str) -> Bundle:
    """Open the installed bundle of a release and check every byte of a variant.

    Raises:
        BundleError: it is missing, changed, or another one.
    """
    path = bundle_folder(folder, slot_name(release, variant))
    try:
        bundle = bundles.read(path, variant)
    except UsageError as error:
        raise BundleError(f"the bundle of {release.path} is missing: {path}") from error
    except OSError as error:
        if error.errno not in BAD_BLOCK:
            raise
        raise BundleError(f"the bundle of {release.path} cannot be read: {error}") from error
    if bundle.digest != release.bundle:
        raise BundleError(f"{path} holds bundle {bundle.digest[:12]}…")
    return bundle


def is_whole(folder: Path, release: Release) -> bool:
    """Say whether the bundle of a release is here, in the variant that was chosen, with every byte."""
    try:
        open_bundle(folder, release, load(folder).variant_of(release))
    except BundleError:
        return False
    return True


def reuse(folder: Path, entry: FileEntry, target: Path) -> bool:
    """Take a file with the same bytes out of an installed bundle instead of the network; say whether there was one.

    It becomes a hard link: installed files are never written to, and flash wears out.
    """
    path = find(folder, entry.sha256)
    if path is None:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        target.unlink()
    _link(path, target)
    return True


def find(folder: Path, sha256: str) -> Path | None:
    """Return a file of an installed bundle that has these bytes now, ``None`` where there is none."""
    for installed in sorted((folder / "bundles").glob("*/" + bundles.MANIFEST)):
        for path in _same_bytes(installed.parent, sha256):
            return path
    return None


def adopt(folder: Path, release: Release, variant: str) -> Bundle:
    """Turn a complete staging folder into an installed bundle, in one rename, after checking every byte.

    Raises:
        BundleError: something is missing, changed or unlisted; the staging folder is removed.
    """
    name = slot_name(release, variant)
    staging, target = staging_folder(folder, name), bundle_folder(folder, name)
    try:
        bundles.read(staging, variant)
    except BundleError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_tree(staging)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # one that lost bytes: whole ones are never staged again
        shutil.rmtree(target)
    staging.rename(target)
    sync_folder(target.parent)
    return open_bundle(folder, release, variant)


def collect(folder: Path, state: State) -> None:
    """Remove every bundle and every staging folder that the pointer does not name, and what kills left behind."""
    for name in (STATE, COPY, marks.FILE):
        for path in folder.glob(f".{name}.*"):
            path.unlink()
    collect_unnamed(folder, state)
    shutil.rmtree(folder / "staging", ignore_errors=True)
    shutil.rmtree(scratch_folder(folder), ignore_errors=True)


def collect_unnamed(folder: Path, state: State) -> None:
    """Remove every bundle that the pointer does not name."""
    kept = [release for release in (state.current, state.previous) if release is not None]
    named = {slot_name(release, state.variant_of(release)) for release in kept}
    for path in (folder / "bundles").glob("*"):
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)


def bytes_of_previous(folder: Path, state: State) -> int:
    """Return what giving up the bundle before would free: its files that no other bundle and no staging shares."""
    names = [slot_name(one, state.variant_of(one)) for one in (state.previous, state.current) if one is not None]
    if state.previous is None or names.count(names[0]) > 1:  # two releases of the very same bundle
        return 0
    files = [path.lstat() for path in bundle_folder(folder, names[0]).rglob("*") if path.is_file()]
    return sum(file.st_size for file in files if file.st_nlink == 1)


def discard_other_staging(folder: Path, name: str, deltas: Collection[str] = ()) -> None:
    """Remove what came of releases, and of deltas, that nobody wants any more."""
    for path in scratch_folder(folder).glob("*"):
        if path.name not in deltas:
            path.unlink()
    for path in (folder / "staging").glob("*"):
        if path.name != name:
            shutil.rmtree(path, ignore_errors=True)


def _same_bytes(installed: Path, sha256: str) -> list[Path]:
    try:
        manifest = manifests.decode((installed / bundles.MANIFEST).read_bytes())
    except (BundleError, OSError):
        return []
    same = [installed / e.path for e in manifest.files if e.sha256 == sha256]
    return [path for path in same if path.is_file() and _hash(path) == sha256]


def _hash(path: Path) -> str:
    try:
        return bundles.hash_file(path)
    except OSError:  # a bad block: nothing to reuse
        return ""


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links, such as FAT
        shutil.copyfile(source, target)

"""Keeps a bounded number of raw inputs on this device, where somebody said so: at random, and after an alert.

Sends nothing anywhere. A disk that refuses costs samples, never a request.
"""

from __future__ import annotations

import io
import logging
import random
import re
import threading
import time
import zipfile
from typing import TYPE_CHECKING

import msgspec

from edgekit.durable import MIB, write_file
from edgekit.errors import from_os
from edgekit.runtime.afterwards import Afterwards

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from edgekit.runtime.drift import Above
    from edgekit.runtime.session import Session
    from edgekit.tensors import Array

log = logging.getLogger(__name__)

MAX_FILES, MAX_BYTES = 128, 128 * MIB
"""Of samples kept at random, and again of those kept after alerts; the oldest of their kind go."""
AFTER_ALERT = 16
"""So many requests are kept once an alert is raised."""
ABOUT = "about.json"


class Samples:
    """A folder of ``.npz`` files, one a request: its arrays by name, and ``about.json`` with time, model and reason.

    Raises:
        UsageError, ResourceError: the folder cannot be made.
    """

    def __init__(self, folder: Path, rate: float) -> None:
        self.chance: Callable[[], float] = random.random
        self.kept = self.dropped = 0
        self._folder = folder
        self._rate = rate
        self._lock = threading.Lock()
        self._stands: dict[str, frozenset[tuple[str, str]]] = {}
        self._left: dict[str, tuple[int, str]] = {}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise from_os(error, "inputs cannot be kept") from error
        self._afterwards = Afterwards("edgekit-samples")

    def consider(self, session: Session, inputs: Mapping[str, Array], above: Collection[Above]) -> None:
        """Keep the inputs of a request where chance, or an alert that was raised lately, wants them."""
        reason = self._alerted(session.digest, above)
        if reason:
            self._keep(session, inputs, ("alert", reason))
        elif self.chance() < self._rate:
            self._keep(session, inputs, ("random", "random"))

    def close(self) -> None:
        """Write what waits, and end."""
        self._afterwards.close()

    def _alerted(self, digest: str, above: Collection[Above]) -> str:
        """Return the alert for which a request is kept, if any; the same one counts once until it has passed."""
        if not above and digest not in self._stands:
            return ""
        with self._lock:
            before, now = self._stands.get(digest, frozenset()), frozenset((one.kind, one.what) for one in above)
            self._stands[digest] = now
            if fresh := now - before:
                self._left[digest] = (AFTER_ALERT, ", ".join(f"{kind} of {what}" for kind, what in sorted(fresh)))
            left, reason = self._left.get(digest, (0, ""))
            self._left[digest] = (max(0, left - 1), reason)
            return reason if left else ""

    def _keep(self, session: Session, inputs: Mapping[str, Array], why: tuple[str, str]) -> None:
        import numpy as np

        given, now = {name: np.array(array) for name, array in inputs.items()}, time.time_ns()
        if not self._afterwards.put(
            lambda: self._write(session, given, why, now), sum(a.nbytes for a in given.values())
        ):
            self.dropped += 1

    def _write(self, session: Session, inputs: Mapping[str, Array], why: tuple[str, str], now: int) -> None:
        group, reason = why
        about = {"time": now / 1e9, "model": session.digest, "name": session.contract.name, "reason": reason}
        data = _packed(inputs, about)
        try:
            self._make_room(group, len(data))
            write_file(self._folder / f"{group}-{now:020d}.npz", data, 0o600)
            self.kept += 1
        except OSError as error:
            if not self.dropped:
                log.warning("inputs are not kept: %s", error)
            self.dropped += 1

    def _make_room(self, group: str, size: int) -> None:
        files = sorted(self._folder.glob(f"{group}-*.npz"), reverse=True)
        sizes = [path.stat().st_size for path in files]
        for number, path in enumerate(files):
            if number >= MAX_FILES - 1 or size + sum(sizes[: number + 1]) > MAX_BYTES:
                path.unlink(missing_ok=True)


def _packed(inputs: Mapping[str, Array], about: Mapping[str, object]) -> bytes:
    import numpy as np

    file = io.BytesIO()
    keys = {
        name: name if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name) else f"tensor {number}"
        for number, name in enumerate(inputs)
    }
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr(ABOUT, msgspec.json.encode({**about, "tensors": {key: name for name, key in keys.items()}}))
        for name, array in inputs.items():
            with packed.open(f"{keys[name]}.npy", "w", force_zip64=True) as member:
                np.save(member, array, allow_pickle=False)
    return file.getvalue()

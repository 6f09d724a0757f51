"""One line of JSON a decision, for audits: when, which model, what it was given, what it said. Holds no input.

Written off the request's path. A disk that refuses costs lines, which are counted and told, never a request.
"""

from __future__ import annotations

import hashlib
import logging
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.errors import EdgekitError
from edgekit.runtime.afterwards import Afterwards
from edgekit.runtime.rotation import RotatingFile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from edgekit.runtime.session import Session, TextSession
    from edgekit.tensors import Array

log = logging.getLogger(__name__)

TRACE: ContextVar[str] = ContextVar("trace", default="")
"""The caller's trace, where the request that is computed here told one."""
SIZE = 128 << 20
TOLD_SAMPLES = 16
"""Answers to so many samples of a batch stand in a line; its hash is of all."""


class DecisionLog:
    """Writes the decisions of all models of a process. Safe to call from several threads.

    Raises:
        UsageError, ResourceError: the file cannot be written, or another process does.
    """

    def __init__(self, path: Path, size: int = SIZE) -> None:
        self.written = self.dropped = 0
        self._untold = 0
        self._file = RotatingFile(path, size)
        self._afterwards = Afterwards("edgekit-decisions")

    def note(self, session: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Let a decision be written; arrays are copied, for their owner may write into them."""
        import numpy as np

        now, trace = time.time(), TRACE.get()
        given, told = ({name: np.array(a, order="C") for name, a in arrays.items()} for arrays in (inputs, outputs))
        size = sum(a.nbytes for a in (*given.values(), *told.values()))
        self._put(lambda: {**_head(session, now, trace), **_of_tensors(session, given, told)}, size)

    def note_text(self, session: TextSession, asked: bytes, said: str) -> None:
        """Let an answer of a language model be written; ``asked`` is the request's body as it came."""
        now, trace = time.time(), TRACE.get()
        self._put(lambda: {**_head(session, now, trace), **_of_text(asked, said)}, len(asked) + len(said))

    def close(self) -> None:
        """Write all that waits, and close the file."""
        self._afterwards.close()
        self._tell_dropped()
        self._file.close()

    def _put(self, told: Callable[[], Mapping[str, object]], size: int) -> None:
        if not self._afterwards.put(lambda: self._write(told()), size):
            self._drop("too many decisions wait")

    def _write(self, told: Mapping[str, object]) -> None:
        if self._untold and not self._tell_dropped():
            self._drop("the disk refuses")
            return
        try:
            self._file.write(msgspec.json.encode(told) + b"\n")
            self.written += 1
        except OSError as error:
            self._drop(str(error))

    def _tell_dropped(self) -> bool:
        """Say in the log itself how many lines it lacks here."""
        lacking = self._untold
        if not lacking:
            return True
        try:
            self._file.write(msgspec.json.encode({"time": round(time.time(), 6), "dropped": lacking}) + b"\n")
        except OSError:
            return False
        self._untold -= lacking
        log.warning("the decision log is written again, and lacks %d lines", lacking)
        return True

    def _drop(self, why: str) -> None:
        if not self._untold:
            log.warning("decisions are not logged: %s", why)
        self.dropped += 1
        self._untold += 1


def digest_of(arrays: Mapping[str, Array]) -> str:
    """Return the SHA-256 over the tensors in the order of their names: name, type, shape, then little-endian bytes.

    Before the bytes stands ``name dtype shape`` with the shape as ``1,64``, each ended by a zero byte, in UTF-8.
    """
    import numpy as np

    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        shape = ",".join(map(str, array.shape))
        total.update(b"".join(part.encode() + b"\0" for part in (name, array.dtype.name, shape)))
        total.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return total.hexdigest()


def _head(session: Session | TextSession, now: float, trace: str) -> dict[str, object]:
    contract = session.contract
    found = {"time": round(now, 6), "model": session.digest, "name": contract.name, "version": contract.version}
    return {**found, "variant": session.variant.name, **({"trace_id": trace} if trace else {})}


def _of_tensors(session: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, object]:
    samples = next((len(array) for array in inputs.values() if array.ndim), 1)
    hashes = {"input": digest_of(inputs), "output": digest_of(outputs)}
    return {**hashes, "samples": samples, **_answers(session, outputs)}


def _of_text(asked: bytes, said: str) -> dict[str, object]:
    hashes = [hashlib.sha256(data).hexdigest() for data in (asked, said.encode(errors="replace"))]
    return {"input": hashes[0], "output": hashes[1], "characters": len(said)}


def _answers(session: Session, outputs: Mapping[str, Array]) -> dict[str, Any]:
    """Say the best label of each sample, or its objects, or what the outputs measure; nothing of what holds NaN."""
    contract = session.contract
    few = {name: array[:TOLD_SAMPLES] if array.ndim else array for name, array in outputs.items()}
    try:
        if contract.postprocess:
            best = [labels[0] for labels in session.labels(few, 1)]
            return {"answers": [{"label": label, "probability": round(share, 6)} for label, share in best]}
        if contract.detection and contract.preprocess:
            found = [[{"label": o.label, "score": round(o.score, 6)} for o in one] for one in session.objects(few)]
            return {"answers": [{"objects": len(one), "best": one[:1]} for one in found]}
    except EdgekitError as error:
        return {"answers": [], "unread": error.message}
    return {"summary": {name: _summary(array) for name, array in outputs.items() if array.size}}


def _summary(array: Array) -> dict[str, float]:
    return {"least": float(array.min()), "mean": float(array.mean()), "most": float(array.max())}

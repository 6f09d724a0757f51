"""Every error that edgekit raises, split by what the caller does next.

::

    EdgekitError           1   something edgekit noticed; base of the tree, never raised itself
    ├── UsageError         2   the call is wrong: change it
    │   ├── UnknownName    2   a name nobody knows; the nearest ones are offered
    │   └── InputError     2   a tensor, picture or message the model does not take
    │       └── ContextError  2  more tokens than the model's context holds: shorten the text
    ├── MissingExtra       3   an optional package is not installed: install it
    ├── CompressionError   4   a pass cannot do that to this model: change recipe, data or model
    │   └── BudgetError   13   no candidate keeps the budgets: loosen one; the best candidate was kept
    ├── ExportError        5   a format cannot hold this model: change target or model
    │   └── ParityError    6   the written file computes something else: do not ship it
    ├── BundleError        7   bytes are missing, changed or unlisted: fetch the bundle again
    ├── TransferError      8   the network or broker failed: retry
    ├── MessageError       9   a malformed message: drop it and count it
    ├── TrustError        10   a signature, version or class rule was broken: never retry, alarm
    ├── HealthError       11   the model misbehaves on this device: roll back
    │   ├── EngineCrashed 14   its engine's process died: ask again later, it starts anew
    │   └── Unrunnable    15   this device cannot run that variant at all: try the next one
    └── ResourceError     12   disk, port, permission or memory: free it, run again

The number is the exit code of the command line. Knows nothing of where an error is shown.
"""

from __future__ import annotations

import difflib
import errno
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class EdgekitError(Exception):
    """Say what happened, with the value, and hint at what to do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EdgekitError):
    """The call is wrong: change it."""

    exit_code = 2


class UnknownName(UsageError):
    """Nobody knows that name; the nearest known ones are offered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        folded = {one.casefold(): one for one in names}
        near = [folded[one] for one in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names) or 'none'}"
        super().__init__(f"unknown {kind} {name!r}", hint)


class InputError(UsageError):
    """The model does not take this tensor, picture or message."""


class ContextError(InputError):
    """A text has more tokens than the model's context holds."""

    def __init__(self, tokens: int, context: int) -> None:
        super().__init__(
            f"the text has {tokens} tokens, and the model's context holds {context}",
            "shorten it, or serve with a larger --context if the model was trained for one",
        )
        self.tokens = tokens
        self.context = context


class MissingExtra(EdgekitError):
    """An optional package is not installed."""

    exit_code = 3

    def __init__(self, extra: str, module: str, command: str = "") -> None:
        super().__init__(f"this needs {module}, which is not installed", command or f"pip install 'edgekit[{extra}]'")
        self.extra = extra
        self.module = module


class CompressionError(EdgekitError):
    """A pass cannot do that to this model."""

    exit_code = 4


class BudgetError(CompressionError):
    """No candidate keeps every budget; the best one was kept."""

    exit_code = 13


class ExportError(EdgekitError):
    """A format cannot hold this model."""

    exit_code = 5


class ParityError(ExportError):
    """The written file computes something else than the model."""

    exit_code = 6


class BundleError(EdgekitError):
    """Bytes of a bundle are missing, changed or unlisted: fetch it again."""

    exit_code = 7


class TransferError(EdgekitError):
    """The network or the broker failed: retry."""

    exit_code = 8


class MessageError(EdgekitError):
    """A message is malformed: drop it and count it."""

    exit_code = 9


class TrustError(EdgekitError):
    """A signature, version or class rule was broken: never retry, raise the alarm."""

    exit_code = 10


class HealthError(EdgekitError):
    """The model misbehaves on this device: roll back. ``measured`` are the figures that were taken before, by name."""

    exit_code = 11

    def __init__(self, message: str, hint: str = "", measured: Mapping[str, float] | None = None) -> None:
        super().__init__(message, hint)
        self.measured = dict(measured or {})


class Unrunnable(HealthError):
    """This device cannot run that variant at all: an engine, an operator or an instruction is missing."""

    exit_code = 15


class EngineCrashed(HealthError):
    """The process that runs the engine died; ``retry_seconds`` from now another one should run."""

    exit_code = 14

    def __init__(self, message: str, hint: str = "", retry_seconds: float = 1.0) -> None:
        super().__init__(message, hint)
        self.retry_seconds = retry_seconds


class ResourceError(EdgekitError):
    """Disk, port, permission or memory stands in the way: free it and run again."""

    exit_code = 12


_HINTS = {
    errno.ENOSPC: "free disk space, then run the same command again: nothing was half-written",
    errno.EDQUOT: "raise the disk quota, then run the same command again",
    errno.EADDRINUSE: "stop what listens there, or choose another port with --port",
    errno.EACCES: "check the owner and the mode of that path",
    errno.EPERM: "check the owner and the mode of that path",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def from_os(error: OSError, what: str) -> EdgekitError:
    """Translate an operating system's refusal: a missing path is a usage error, the rest a resource error."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | FileExistsError):
        return UsageError(f"{what}: {error.strerror}: {error.filename}", "check the path")
    hint = _HINTS.get(error.errno or 0, "see the message of the operating system")
    path = error.filename2 or error.filename  # of a rename that failed, the name that a person gave
    place = f": {path}" if path else ""
    return ResourceError(f"{what}: {error.strerror or error}{place}", hint)


_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "bad allocation", "failed to allocate memory")


def out_of_memory(error: BaseException) -> ResourceError | None:
    """Return the error of a machine whose memory ran out, if that is what ``error`` or its cause says.

    PyTorch and ONNX Runtime raise a plain RuntimeError then.
    """
    for found in causes(error):
        if isinstance(found, MemoryError) or any(word in str(found).lower() for word in _MEMORY):
            return ResourceError(
                "out of memory: nothing was half-written",
                "use a smaller batch or fewer calibration samples in the recipe, or a machine with more memory",
            )
    return None


def causes(error: BaseException) -> list[BaseException]:
    """Return an error and what it was raised from, the deepest last; a chain that bites its tail is cut."""
    chain = [error]
    while chain[-1].__cause__ is not None and chain[-1].__cause__ not in chain:
        chain.append(chain[-1].__cause__)
    return chain

"""Backends for tests that misbehave on purpose; registered by an entry point that child processes see too."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fakes import bundles

from edgekit import bundle
from edgekit.errors import HealthError, InputError
from edgekit.manifest import Manifest
from edgekit.tensors import TensorSpec

CRASH, HANG, BUG, ABORT, QUIT, REFUSE, FAIL, NAP, SPAWN, STUCK = range(-1, -11, -1)
"""What the first number of an input makes the touchy engine do."""

CODE = "#!python\n"
"""So begins a file that takes the engine over when it is opened."""


def _nap():
    time.sleep(0.4)


def _raise(error):
    raise error


DEEDS = {
    CRASH: lambda: ctypes.string_at(0),
    HANG: lambda: time.sleep(60),
    BUG: lambda: {}["nothing"],
    ABORT: os.abort,
    QUIT: lambda: os._exit(7),
    REFUSE: lambda: _raise(InputError("the engine takes no -6", "give another number")),
    FAIL: lambda: _raise(HealthError("the engine failed on -7")),
    NAP: _nap,
    STUCK: lambda: ctypes.PyDLL(None).sleep(60),  # holds Python's lock: no other thread of that process runs
    SPAWN: lambda: subprocess.Popen(["sleep", "600"]),
}


class _Engine:
    engine = "misbehaving"

    def __init__(self, kind):
        self.kind = kind

    def run(self, inputs):
        import numpy as np

        if self.kind == "crash":
            signal.raise_signal(signal.SIGSEGV)  # of this thread, so that nothing is answered any more
        if self.kind == "hang":
            time.sleep(60)
        if self.kind == "quit":
            os._exit(7)
        return {"scores": np.full((len(next(iter(inputs.values()))), 4), np.nan, np.float32)}

    def close(self):
        pass


class _Touchy:
    """Gives the sum of each sample four times, but for numbers that make it misbehave."""

    engine = "touchy 1"

    def run(self, inputs):
        import numpy as np

        image = inputs["image"]
        DEEDS.get(int(image[0, 0]), lambda: None)()
        return {"scores": np.repeat(image.sum(1, keepdims=True), 4, 1)}

    def close(self):
        pass


class _Calm(_Touchy):
    """Gives the sum whatever comes."""

    engine = "calm 1"

    def run(self, inputs):
        import numpy as np

        return {"scores": np.repeat(inputs["image"].sum(1, keepdims=True), 4, 1)}


class _Mirror:
    """Gives every input back as it came, under its own name, in another order."""

    engine = "mirror"

    def run(self, inputs):
        return dict(reversed(inputs.items()))

    def close(self):
        pass


class _Backend:
    extra = "onnx"

    def open(self, main, options):
        kind = main.read_text()
        if kind == "crash when opened":
            ctypes.string_at(0)
        if kind.startswith(CODE):
            exec(kind.removeprefix(CODE), {})  # noqa: S102  # a hostile file: what an exploit in a parser would do
        return {"touchy": _Touchy, "calm": _Calm, "mirror": _Mirror}.get(kind, lambda: _Engine(kind))()


MISBEHAVING = _Backend()


def register(folder):
    """Write a distribution's metadata under ``folder``; on sys.path it offers the backend ``misbehaving``."""
    info = folder / "misbehaving-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: misbehaving\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgekit.runtime.backends]\nmisbehaving = fakes.engines:MISBEHAVING\n")


def install(folder, monkeypatch):
    """Let this process and those that it starts find the backend ``misbehaving``."""
    register(folder)
    tests = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(tests), *sys.path]))
    monkeypatch.syspath_prepend(str(folder))


def sealed(folder, kind, *, version="1", specs=None, profile="any"):
    """Seal a bundle whose engine misbehaves in that way; ``specs`` are its inputs and its outputs."""
    variant = bundles.variant(profile, "misbehaving", f"{profile}/m.txt")
    inputs, outputs = specs or (
        (TensorSpec("image", "float32", (-1, 3)),),
        (TensorSpec("scores", "float32", (-1, 4)),),
    )
    manifest = Manifest(
        name="touchy", version=version, task="tensor", inputs=inputs, outputs=outputs, variants=(variant,), files=()
    )
    return bundle.seal(folder, manifest, {variant.main: kind.encode()})

"""Backends for tests that misbehave on purpose; registered by an entry point that child processes see too."""

from __future__ import annotations

import os
import signal
import time


class _Engine:
    engine = "misbehaving"

    def __init__(self, kind):
        self.kind = kind

    def run(self, inputs):
        import numpy as np

        if self.kind == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.kind == "hang":
            time.sleep(60)
        if self.kind == "quit":
            os._exit(7)
        return {"scores": np.full((len(next(iter(inputs.values()))), 4), np.nan, np.float32)}

    def close(self):
        pass


class _Backend:
    extra = "onnx"

    def open(self, main, options):
        return _Engine(main.read_text())


MISBEHAVING = _Backend()


def register(folder):
    """Write a distribution's metadata under ``folder``; on sys.path it offers the backend ``misbehaving``."""
    info = folder / "misbehaving-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: misbehaving\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgekit.runtime.backends]\nmisbehaving = fakes.engines:MISBEHAVING\n")

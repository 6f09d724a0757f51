"""edgekit takes a trained model to a healthy fleet: compress, export, run on the device, update over the air."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekit.runtime import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

# ONNX Runtime 1.31 for Linux tells Microsoft of the machine and of each session unless this stands before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> object:
    # `import edgekit` stays instant and bare; the runtime is imported when `edgekit.load` is first touched.
    if name == "load":
        from edgekit.runtime import load

        return load
    raise AttributeError(f"module 'edgekit' has no attribute {name!r}")

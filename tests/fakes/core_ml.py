"""Stands for Apple's framework where there is no Mac: what coremltools' `MLModel` calls, by our own interpreter.

Not proved by it are Apple's refusals, numerics and compute units.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgekit.export import mil


class Framework:
    """Takes what coremltools hands to the framework, and is as strict with what it is given."""

    refuses = ""
    units: str = ""
    """On which the last model was opened."""

    def __init__(self, path, units, *_):
        if Framework.refuses:
            raise RuntimeError(Framework.refuses)
        Framework.units = units
        self._package = Path(path)

    @staticmethod
    def maximum_supported_specification_version():
        """Read everything."""
        return 99

    def predict(self, data, _state):
        """Compute one sample; whoever gave float16 gave float32 by now."""
        for name, array in data.items():
            if array.dtype.name not in ("float32", "int32") or len(array) != 1:
                raise RuntimeError(f"value type not convertible: {name} {array.dtype} {array.shape}")
        return {name: np.asarray(array) for name, array in mil.run(self._package, data).items()}


def stand_in(monkeypatch):
    """Make the backend and coremltools believe that this is a Mac."""
    model = pytest.importorskip("coremltools.models.model", reason="coremltools writes and reads the packages")
    from edgekit.runtime.backends import coreml

    monkeypatch.setattr(coreml, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(coreml.platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(model, "_MLModelProxy", Framework)
    monkeypatch.setattr(Framework, "refuses", "")
    return Framework

"""Runs Core ML packages through coremltools, on macOS; elsewhere it says that there is no such engine.

A lock orders the calls: Core ML is not said to allow several at once on one model. The batch is one, `Session` loops.
"""

from __future__ import annotations

import platform
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

from edgekit.errors import HealthError, UsageError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.runtime.backends import Backend, EngineOptions
    from edgekit.tensors import Array

UNITS = {"all": "ALL", "cpu-and-ne": "CPU_AND_NE", "cpu-and-gpu": "CPU_AND_GPU", "cpu-only": "CPU_ONLY"}


class CoremlEngine:
    """A loaded package; tensors go by their names in it."""

    def __init__(self, model: Any, engine: str) -> None:  # noqa: ANN401  # coremltools is untyped
        self.engine = engine
        self._model = model
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one sample; callers queue.

        Raises:
            HealthError: a tensor does not fit the package, or Core ML fails.
        """
        with self._lock:
            if self._model is None:
                raise UsageError("this Core ML engine is closed", "load the bundle again")
            try:
                return dict(self._model.predict(dict(inputs)))
            except (RuntimeError, ValueError, TypeError, KeyError) as error:
                raise HealthError(f"Core ML failed: {error}") from error

    def close(self) -> None:
        """Free the model once the run in flight is done."""
        with self._lock:
            self._model = None


class CoremlBackend:
    """Opens packages on the compute units of the class."""

    extra = "coreml"

    def absence(self) -> str:
        """Say that this is no Mac, where it is none."""
        return "" if sys.platform == "darwin" else f"Core ML runs on macOS and iOS, this is {platform.system()}"

    def open(self, main: Path, options: EngineOptions) -> CoremlEngine:
        """Load the package whose ``Manifest.json`` is ``main``.

        Raises:
            MissingExtra: coremltools is not installed.
            HealthError: this is no Mac, or Core ML refuses the package.
        """
        if self.absence():
            raise HealthError(
                self.absence(), "serve another variant here, or take the package to a Mac, or into an app with Xcode"
            )
        with extra(self.extra), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the versions of converters that are not used here
            import coremltools
        units = UNITS[options.runtime.compute_units]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it warns of here is raised below
                model = coremltools.models.MLModel(
                    str(main.parent), compute_units=getattr(coremltools.ComputeUnit, units)
                )
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise _refused(main, error) from error
        if model.__proxy__ is None:  # Core ML did not take it; coremltools waits with its error for the first call
            raise _refused(main, model._framework_error)  # noqa: SLF001  # nothing else tells why
        return CoremlEngine(model, f"Core ML of macOS {platform.mac_ver()[0]} {units}")


def _refused(main: Path, why: object) -> HealthError:
    return HealthError(
        f"Core ML refuses {main.parent.name}: {why or 'no reason given'}",
        "the package is damaged, or made for a newer macOS",
    )


PLUGIN: Backend = CoremlBackend()

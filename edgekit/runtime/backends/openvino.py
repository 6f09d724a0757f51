"""Runs OpenVINO's IR on the CPU. One request is reused and a lock orders the calls."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from edgekit.errors import HealthError, UsageError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgekit.runtime.backends import Backend, EngineOptions
    from edgekit.tensors import Array


class OpenvinoEngine:
    """A compiled network; tensors go by their names in the file."""

    def __init__(self, compiled: Any, names: Sequence[str], engine: str) -> None:  # noqa: ANN401  # openvino has no types here
        self.engine = engine
        self._request = compiled.create_infer_request()
        self._outputs = dict(zip(names, compiled.outputs, strict=True))
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one batch; callers queue.

        Raises:
            HealthError: OpenVINO fails on an input that fits the manifest.
        """
        with self._lock:
            if self._request is None:
                raise UsageError("this OpenVINO engine is closed", "load the bundle again")
            try:
                found = self._request.infer(dict(inputs), share_inputs=False, share_outputs=False)
            except (RuntimeError, ValueError, TypeError, KeyError) as error:
                raise HealthError(f"OpenVINO failed: {_first_line(error)}") from error
            return {name: found[output] for name, output in self._outputs.items()}

    def close(self) -> None:
        """Free the network once the run in flight is done."""
        with self._lock:
            self._request = None


class OpenvinoBackend:
    """Opens IR files on the CPU, in the float width that the file has."""

    extra = "openvino"

    def open(self, main: Path, options: EngineOptions) -> OpenvinoEngine:
        """Load a file.

        Raises:
            MissingExtra: OpenVINO is not installed.
            HealthError: OpenVINO refuses the file.
        """
        with extra("openvino"):
            import openvino
        settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": options.workers,
            "NUM_STREAMS": 1,
            # processors with units for it would compute float networks in bfloat16, at 40 dB
            "INFERENCE_PRECISION_HINT": "f32",
        }
        try:
            core = openvino.Core()
            network = core.read_model(str(main))
            if options.cuts_sums and any(node.get_type_name() == "FakeQuantize" for node in network.get_ops()):
                settings["LP_TRANSFORMS_MODE"] = False  # integers as floats: slower, and right
            compiled = core.compile_model(network, "CPU", settings)
        except (RuntimeError, ValueError) as error:
            raise HealthError(
                f"OpenVINO {openvino.__version__} refuses {main.name}: {_first_line(error)}",
                "the file is damaged or too new for this OpenVINO",
            ) from error
        # those of the file: compiling gives an output the names of what it was fused with as well
        names = [output.get_any_name() for output in network.outputs]
        return OpenvinoEngine(compiled, names, f"openvino {openvino.__version__.partition('-')[0]} CPU")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


PLUGIN: Backend = OpenvinoBackend()

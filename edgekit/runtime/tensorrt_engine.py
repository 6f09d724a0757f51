"""Runs a built TensorRT engine: deserializes it, holds buffers on the GPU, and copies in and out. Builds nothing."""

from __future__ import annotations

import importlib
import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.errors import HealthError, UsageError
from edgekit.runtime.cuda import open_cuda

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.runtime.cuda import Cuda
    from edgekit.tensors import Array


@dataclass(frozen=True)
class _Tensor:
    """One input or output of an engine: its type in NumPy, its room on the GPU, and whether it takes any batch."""

    name: str
    dtype: Any
    is_input: bool
    is_batched: bool
    address: int


class TensorRtEngine:
    """A deserialized engine with one context; a lock orders the calls. Larger batches are computed in pieces."""

    def __init__(self, loaded: Any, trt: Any, cuda: Cuda, max_batch: int) -> None:  # noqa: ANN401  # TensorRT has no types
        self.engine = f"{trt.__name__} {trt.__version__}"
        self._lock = threading.Lock()
        self._cuda = cuda
        self._max_batch = max_batch
        cuda.enter()
        self._loaded = loaded
        self._context = loaded.create_execution_context()
        if self._context is None:
            raise HealthError("TensorRT makes no context of its engine", "the GPU may lack memory")
        self._stream = cuda.stream()
        self._tensors = self._allocated(trt)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one batch; callers queue.

        Raises:
            HealthError: TensorRT or the driver fails.
        """
        import numpy as np

        with self._lock:
            if self._context is None:
                raise UsageError("this TensorRT engine is closed", "load the bundle again")
            self._cuda.enter()
            batched = {tensor.name for tensor in self._tensors if tensor.is_batched}
            batch = max((len(array) for name, array in inputs.items() if name in batched), default=1)
            cuts = [slice(start, start + self._max_batch) for start in range(0, batch, self._max_batch)]
            parts = [self._once({n: a[cut] if n in batched else a for n, a in inputs.items()}) for cut in cuts]
        if len(parts) == 1:
            return parts[0]
        return {n: np.concatenate([part[n] for part in parts]) if n in batched else parts[0][n] for n in parts[0]}

    def close(self) -> None:
        """Free the engine and its memory once the run in flight is done."""
        with self._lock:
            if self._context is None:
                return
            self._cuda.enter()
            self._context = self._loaded = None
            for tensor in self._tensors:
                self._cuda.free(tensor.address)

    def _allocated(self, trt: Any) -> list[_Tensor]:  # noqa: ANN401  # TensorRT has no types
        """Make room for the largest batch: outputs know their shapes once every input has its own."""
        loaded, context = self._loaded, self._context
        names = [loaded.get_tensor_name(number) for number in range(loaded.num_io_tensors)]
        kinds = {name: loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        for name in names:
            if kinds[name]:
                context.set_input_shape(name, tuple(loaded.get_tensor_profile_shape(name, 0)[2]))
        tensors = []
        for name in names:
            dtype = trt.nptype(loaded.get_tensor_dtype(name))
            size = math.prod(context.get_tensor_shape(name)) * dtype().itemsize
            is_batched = tuple(loaded.get_tensor_shape(name))[:1] == (-1,)
            tensors.append(_Tensor(name, dtype, kinds[name], is_batched, self._cuda.allocate(size)))
            context.set_tensor_address(name, tensors[-1].address)
        return tensors

    def _once(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import numpy as np

        for tensor in (one for one in self._tensors if one.is_input):
            array = np.ascontiguousarray(inputs[tensor.name], tensor.dtype)
            if not self._context.set_input_shape(tensor.name, array.shape):
                raise HealthError(f"TensorRT's engine takes no input {tensor.name!r} of shape {list(array.shape)}")
            self._cuda.upload(tensor.address, array)
        if not self._context.execute_async_v3(self._stream):
            raise HealthError("TensorRT fails to run its engine")
        self._cuda.wait(self._stream)
        outputs: dict[str, Array] = {}
        for tensor in (one for one in self._tensors if not one.is_input):
            outputs[tensor.name] = np.empty(tuple(self._context.get_tensor_shape(tensor.name)), tensor.dtype)
            self._cuda.download(outputs[tensor.name], tensor.address)
        return outputs


def open_engine(module: str, engine: bytes, max_batch: int, cuda: Cuda | None = None) -> TensorRtEngine:
    """Deserialize an engine on the first GPU.

    Raises:
        HealthError: there is no GPU, or TensorRT does not take the engine.
    """
    trt = importlib.import_module(module)
    cuda = cuda or open_cuda()
    cuda.enter()
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        raise HealthError("TensorRT does not take the engine that was built for this device")
    return TensorRtEngine(loaded, trt, cuda, max_batch)

"""The few calls of NVIDIA's driver that an engine needs, through ``libcuda``, which comes with every driver.

Knows no TensorRT. Driver API: https://docs.nvidia.com/cuda/cuda-driver-api/
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import HealthError

if TYPE_CHECKING:
    from edgekit.tensors import Array

LIBRARY = "libcuda.so.1"
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
VERSIONS = ("proc/driver/nvidia/version", "etc/nv_tegra_release")


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name with its compute capability, and its driver."""

    name: str
    driver: str


class Cuda:
    """The first GPU's primary context, in which TensorRT works as well."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._call("cuInit", 0)
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._device = device
        self._context = ctypes.c_void_p()

    def gpu(self, root: Path = Path("/")) -> Gpu:
        """Name the GPU and the driver."""
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), self._device)
        level = ".".join(str(self._attribute(which)) for which in (MAJOR, MINOR))
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        told = [_first_line(root / path) for path in VERSIONS]
        driver = " ".join(filter(None, (f"CUDA {version.value}", *told)))
        return Gpu(f"{name.value.decode(errors='replace')} {level}", driver)

    def enter(self) -> None:
        """Make the context that of the calling thread: every thread has its own notion of that."""
        if not self._context:
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes on the GPU."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, size)))
        return address.value

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the GPU, and wait for that."""
        source = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.nbytes))

    def download(self, array: Array, address: int) -> None:
        """Fill a contiguous array from the GPU, and wait for that."""
        target = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))

    def stream(self) -> int:
        """Return a queue of its own for work on the GPU."""
        handle = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(handle), 1)  # CU_STREAM_NON_BLOCKING
        return handle.value or 0

    def wait(self, stream: int) -> None:
        """Wait until a queue is empty; what failed in it fails here."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device)
        return value.value

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise HealthError(f"{name} of the NVIDIA driver fails with {code}", "see CUresult in the driver's API")


def open_cuda(library: str = LIBRARY) -> Cuda:
    """Open the driver.

    Raises:
        HealthError: there is none, or it finds no GPU.
    """
    try:
        return Cuda(ctypes.CDLL(library))
    except OSError as error:
        raise HealthError("this machine has no NVIDIA driver") from error


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    except OSError:
        return ""

"""What there is on this machine to build and to run TensorRT engines with. Builds nothing itself."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit.errors import HealthError
from edgekit.runtime import tensorrt_build
from edgekit.runtime.cuda import Gpu, open_cuda
from edgekit.runtime.tensorrt_engine import open_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgekit.runtime.backends import Engine
    from edgekit.runtime.tensorrt_build import Job

MODULES = ("tensorrt", "tensorrt_rtx")
TRTEXEC = "/usr/src/tensorrt/bin/trtexec"
"""Where JetPack and Debian's packages put it, outside of every PATH."""


@dataclass(frozen=True)
class Tools:
    """A GPU, a builder by its name and version, the command that builds a job, and how its engine is opened."""

    gpu: Gpu
    builder: str
    module: str
    command: Callable[[Job, Path], Sequence[str]]
    open: Callable[[bytes, int], Engine]


def find() -> Tools:
    """Return what builds and runs engines here.

    Raises:
        HealthError: no NVIDIA driver, no GPU, or no TensorRT; says which.
    """
    gpu = open_cuda().gpu()
    module = next((name for name in MODULES if importlib.util.find_spec(name)), None)
    if module is None:
        way = "make the environment with --system-site-packages, so that Python sees JetPack's TensorRT"
        found = f"; {find_trtexec()} builds engines, but Python cannot run them: {way}" if find_trtexec() else ""
        raise HealthError(f"Python finds no TensorRT{found}", "pip install 'edgekit[device,tensorrt]'")
    return Tools(gpu, _version(module), module, child_command, lambda data, batch: open_engine(module, data, batch))


def child_command(job: Job, folder: Path) -> list[str]:
    """Write the job into a folder and return the command that builds it by Python's TensorRT."""
    path = folder / "job.json"
    path.write_bytes(msgspec.json.encode(job))
    # -P: the folder one stands in must not shadow a package of the child
    return [sys.executable, "-P", "-m", tensorrt_build.__name__, str(path)]


def find_trtexec() -> str:
    """Return the path of TensorRT's own program, empty where there is none."""
    return shutil.which("trtexec") or (TRTEXEC if Path(TRTEXEC).is_file() else "")


def _version(module: str) -> str:
    return f"{module} {importlib.import_module(module).__version__}"

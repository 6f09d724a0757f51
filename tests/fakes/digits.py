"""The digits example, trained once a test process: a real network of 63,000 weights, its data and its checkpoint."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
FILE = EXAMPLES / "digits.py"
BUILD, STUDENT, DATA = (f"{FILE}:{name}" for name in ("build", "build_student", "data"))


@functools.cache
def example():
    """Return the example as a module."""
    spec = importlib.util.spec_from_file_location("digits_example", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits_example"] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def checkpoint():
    """Train for a few seconds and return the checkpoint's path."""
    import torch

    torch.set_num_threads(1)  # threads that spin beside other work make it 20 times slower
    folder = Path(tempfile.mkdtemp(prefix="edgekit-digits-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return example().write_checkpoint(folder / "digits.safetensors", epochs=8)


@functools.cache
def model():
    """Return the trained network as a `Model` with its data."""
    from edgekit import workload

    return workload.load(BUILD, checkpoint(), example().data())


@functools.cache
def quantized():
    """Return the network with its int8 plan."""
    from edgekit.compress import compress
    from edgekit.compress.recipe import default

    return compress(model(), default())


@functools.cache
def onnx_file():
    """Return an fp32 ONNX file of the folded network, any batch."""
    import torch

    from edgekit import workload

    path = checkpoint().parent / "digits.onnx"
    program = workload.trace(quantized())
    names = {"input_names": ["image"], "output_names": ["scores"]}
    torch.onnx.export(program, f=path, dynamo=True, external_data=False, verbose=False, **names)
    return path
